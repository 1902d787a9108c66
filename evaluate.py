"""Judge a trained run: numbers, pictures, and samples for an image of your own.

    python evaluate.py runs/ssn-lidc-0                           # its test split
    python evaluate.py runs/ssn-lidc-0 --ambiguous               # can samples find ambiguous cases?
    python evaluate.py runs/ssn-lidc-0 --ood                     # ... blurred and foreign images?
    python evaluate.py runs/ssn-lidc-0 --image my.png            # samples for one picture
    python evaluate.py runs/ssn-lidc-0 --split all --path other.pickle    # another hospital's cases
    python evaluate.py runs/vae_unet-synapse-0 --per-volume      # slices judged as volumes
    python evaluate.py runs/ssn-lidc-0 --compare runs/unet-lidc-0 ...     # a table, tests, curves
    torchrun --nproc_per_node=4 evaluate.py runs/ssn-lidc-0      # the cases shared by 4 processes

Results are written to the run's folder. For other weights than best.pt, or other cases than the
run's test split, they are written to a folder inside it, which is named after them (for --path,
with a few letters that differ between paths of the same name):
    metrics.json     {name: {"mean", "stderr", "n"}}; stderr by resampling patients (groups)
    per_case.csv     every measure of every case
    report.html      every number and picture, explained, and cases to page through, in one file
    per_class.csv    Dice and 95% Hausdorff distance of every class
    per_volume.csv   the same with --per-volume, of volumes (VAE U-Net's Tables 2 and 3), and
                     per_volume_case.csv, a line for each volume
    samples.png      image, up to 7 annotators, prediction and 16 samples
and further pictures. analysis/page.py explains the pictures and every measure in metrics.json; the
end of this help lists these explanations. --image writes a picture of samples
(NAME_samples.png), the samples and maps (NAME_arrays.npz, or NIfTI files for a NIfTI), 16-bit PNGs
and sizes in pixels or mm^3; analysis/predict.py explains their contents. analysis/uncertainty.py
cites the sources of its measures, and says with which published numbers they must not be compared.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see train.py

import numpy as np
import torch
import torch.distributed as dist

import data
import metrics
import models
from analysis.ambiguity import ambiguity
from analysis.calibration import mode_rows, pooled, total_variation
from analysis.classes import class_rows, volume_rows, write_classes
from analysis.compare import compare
from analysis.instances import (find_instances, instance_scores, instances_to_show, kl_terms,
                                rand_errors)
from analysis.ood import ood
from analysis.page import explained, write_page
from analysis.pictures import cases_to_show, short_names, spread
from analysis.predict import DRAWN, predict_images
from analysis.run_pictures import plot_all
from analysis.scores import draw, gather, measure, rank_and_world, sample_ged
from analysis.uncertainty import calibration, failure_detection
from common import (Progress, UserError, key_values, out_of_memory, pick_device, say, set_tf32,
                    start_processes)
from models import labels_of, sample_batches
from sources.files import write_text
from sources.runs import read_config, read_split

SAMPLES = (1, 4, 8, 16, 100)
PAGED = 20  # cases in report.html, at most
LIKELIHOOD_SAMPLES = 16
PER_VOLUME = 10  # samples for --per-volume, as in VAE U-Net's paper
CLUSTERED = 16  # samples from which objects are found
MOST_SAMPLES = 1000  # all pairs of them are compared
HEADLINES = ("ged", "hungarian_iou", "diversity", "ncc", "dice", "dice_present", "dice_mean",
             "iou_rec", "ece", "log_likelihood", "mode_pooled_tv", "rand_error",
             "rand_error_components")  # printed
# Options with their defaults, and which of them each mode takes; judging a split takes all.
OPTIONS = dict(split="test", path=None, data_args=None, weights="best", cases="all", whole=False,
               per_class=False, cluster=None, samples=None, likelihood_samples=None)
MODES = dict(image=("weights", "samples"), compare=(), ambiguous=("path", "weights"),
             ood=("split", "path", "weights"),
             per_volume=("split", "path", "weights", "samples"))


# ------------------------------------------------------------------------------------- one run


@torch.no_grad()
def report(folder, *, split="test", cases="all", weights="best", samples=SAMPLES, path=None,
           data_args=None, whole=False, classes=False, cluster=None,
           likelihood_samples=LIKELIHOOD_SAMPLES, device=None) -> dict:
    """Judge best.pt or last.pt of a run, write the files that the module lists, and return the
    content of metrics.json.

    Under torchrun the processes share the cases; all but the first write and return nothing. The
    parameters are the command line's options; cluster: (samples,) or (samples, alpha).
    Raises UserError or DataError for anything the user can correct.
    """
    folder = Path(folder)
    settings, model, (judged,) = open_run(folder, (split,), path, device, weights, whole, data_args)
    judged = choose(judged, cases, f"the {split} split of {settings['data']}")
    if cluster and judged.instances is None:
        raise UserError(f"--cluster is for sets with instances; {settings['data']} has none")
    count, *alpha = cluster or (CLUSTERED,)
    cluster = (count, alpha[0] if alpha else None)
    classes = classes or (judged.images.dim() == 4 and 3 <= judged.num_classes <= 20)
    pictured = judged.subset(spread(len(judged), PAGED))
    shown = dict(zip(pictured.names, short_names(pictured.names)))

    n = max(samples) if judged.instances is None else max(*samples, cluster[0])
    first = rank_and_world()[0] == 0
    out = folder_of(folder, split, cases, weights, path, whole) if first else None
    if first and len(set(judged.groups)) < 3:
        say(f"note: the cases are of {len(set(judged.groups))} patients or other groups: too few "
            "for standard errors, some of which are printed as 0")
    found = score(model, judged, samples, n, likelihood_samples,
                  lambda drawn: details(model, drawn, classes, cluster, shown))
    if not first:
        return {}

    values, summary = summarise(found, judged, n)
    write_text(out / "metrics.json",
               json.dumps(summary, indent=2, allow_nan=False, default=float) + "\n")
    write_csv(out / "per_case.csv", judged, values)
    plot_all(out, model, pictured, found, values, summary, "hide" in settings["data_args"])
    words = ["all cases" if split == "all" else f"{split} split"]
    if path:
        words[0] += f" of {path}"
    if cases == "agreed":
        words.append("agreed cases")
    if whole:
        words.append("whole images")
    what = ", ".join([*words, f"{len(judged)} cases"])
    write_page(out, folder, f"{what}, {weights}.pt", found["shown"], shown)
    headlines = {name: result for name, result in summary.items()
                 if re.sub(r"(_\d+)+$", "", name) in HEADLINES and name != "diversity_1"}
    say(f"{table(headlines)}\n{what}: all {len(summary)} numbers and pictures in {out}, look at "
        "report.html")
    return summary


def summarise(found: dict, judged, n: int) -> tuple[dict, dict]:
    """From what `score` found, {measure: (N,) its values}, and the content of metrics.json."""
    values = {name: v for name, v in found.items() if isinstance(v, np.ndarray) and v.ndim == 1}
    if judged.exact:
        values[f"mode_tv_{n}"] = total_variation(found)
    if "class_dice" in found:
        for k in range(1, judged.num_classes):
            values[f"dice_class_{k}"] = found["class_dice"][:, 0, k - 1]
        for k in range(1, judged.num_classes):
            values[f"hd95_class_{k}"] = found["class_hd95"][:, 0, k - 1]
    summary = {name: metrics.bootstrap(v, judged.groups) for name, v in values.items()
               if not np.isnan(v).all()}
    summary |= calibration(found["reliability"], judged.groups)
    summary |= failure_detection(values, judged.groups)
    if judged.exact:
        summary |= pooled(found, n, judged.groups)
    return values, summary


def choose(split, cases: str, name: str):
    """The cases of a split that can be judged, a note about the others; with cases="agreed", only
    those that every annotator marked. UserError where none is left."""
    if cases == "agreed":
        agreed = (split.marked | ~split.present).all(1)
        if not agreed.any():
            raise UserError(f"--cases agreed: no case of {name} was marked by every annotator; use "
                            "--cases all")
        split = split.subset(agreed.nonzero().flatten().tolist())
    labelled = split.present.any(1)
    if not labelled.all():
        text = (f"{int((~labelled).sum())} of {len(split)} cases of {name} are left out: all their "
                "pixels are ignored (255)")
        if not labelled.any():
            raise UserError(text)
        say(f"note: {text}")
        split = split.subset(labelled.nonzero().flatten().tolist())
    return split


def open_run(folder, splits, path=None, device=None, weights="best", whole=False, data_args=None):
    """Read a run: (its settings, its model, its splits), the last two on the device. Images are
    cropped or padded to the run's --image-size unless `whole`."""
    settings, device = read_config(folder)["settings"], device or pick_device()
    model = models.load(folder / f"{weights}.pt", device)
    if data_args is not None:
        settings = settings | dict(data_args=data_args)
    loaded, config = load_data(folder, settings, splits, path), model.config
    for split in loaded:
        channels, dims = split.images.shape[1], split.images.dim() - 2
        if (channels, dims) != (config.in_channels, config.dims) or (
                split.num_classes > config.num_classes):
            raise UserError(f"{path or settings['data']}: {channels} channels of {dims}D and "
                            f"{split.num_classes} classes; this model takes {config.in_channels} of"
                            f" {config.dims}D and {config.num_classes} classes")
        split.num_classes = config.num_classes  # other data may lack the last ones
    if settings["image_size"] is not None and not whole:
        loaded = [data.center(split, settings["image_size"]) for split in loaded]
    return settings, model, [split.to(device) for split in loaded]


def load_data(folder, settings, splits, path=None, **options) -> list:
    """The splits of a run's data, at `path` if they have moved; or as "all" every case, also of
    other data at `path`. Says how many cases of "all" were trained on.

    The splits are those of split.json, because one more image in the data would reshuffle all
    patients. If split.json has no cases for a split (such as test images that were added later),
    the data set's own splits are used.
    """
    options, parts = settings["data_args"] | options, read_split(folder)
    source, moved = data.DATASETS.get(settings["data"]), path is not None and "all" not in splits
    if "all" in splits:
        options.pop("split_file", None)
    elif source and source.layout and all(parts.get(split) for split in splits):
        options["split_file"] = str(folder / "split.json")
    try:
        loaded = data.load(settings["data"], splits, path or settings["path"], **options)
    except data.DataError as error:
        hint = "; --split all judges every case of other data" if moved else ""
        raise UserError(f"{error}{hint}") from error
    if "all" in splits:
        names = {name.rpartition("-")[0] if options.get("hide") else name
                 for name in loaded[0].names}
        if seen := names & set(parts.get("train", ())):
            say(f"note: {len(seen)} of these {len(names)} cases have names of training cases, such "
                f"as {min(seen)!r}")
    return loaded


def folder_of(folder, split, cases="all", weights="best", path=None, whole=False) -> Path:
    """Make and return the folder for results on these cases; see the module's docstring."""
    words = [split, cases]
    if weights == "last":
        words.append("last")
    if whole:
        words.append("whole")
    if path:
        place = Path(path).resolve()
        digest = hashlib.sha256(str(place).encode(errors="replace")).hexdigest()
        words += [*place.parts[1:][-2:], digest[:4]]
    out = Path(folder) if words == ["test", "all"] else Path(folder, "-".join(words))
    out.mkdir(exist_ok=True)
    return out


def details(model, drawn, classes: bool, cluster, shown: dict) -> dict:
    """What tables and pictures need besides the measures: {name: (B, ...), or a list of a few cases
    for pictures}; shown {name of a case: its name in pictures}."""
    batch, hard, prediction = drawn.batch, drawn.hard, drawn.prediction
    rows = {"shown": cases_to_show(batch, shown, prediction, hard, drawn.moments)}
    if batch.exact:
        rows |= mode_rows(batch, hard)
    if batch.instances is not None:
        n, alpha = cluster
        found = find_instances(hard[:n], alpha, batch.fixed)
        ending = f"{n}_{alpha}" if alpha else f"{n}"
        rows |= instance_scores(batch, found, prediction, drawn.moments.mean, hard, ending)
        if hasattr(model, "reconstruct"):
            rows |= kl_terms(model, batch)
        rows["instances_shown"] = instances_to_show(model, batch, shown, found, hard)
    elif classes:
        rows |= class_rows(batch, prediction, hard)
    return rows


# ------------------------------------------------------------------------------------ measures


@torch.no_grad()
def score(model, split, samples=(16,), n=0, likelihood_samples=LIKELIHOOD_SAMPLES,
          more=lambda drawn: {}) -> dict:
    """Every measure of every case: {name: (N,) float64 array}; "reliability", from which
    `calibration` is computed; and what `more` returns for every batch (`scores.Drawn`).

    At least n samples are drawn; some measures use the first m of them, for each m in `samples`.
    The model is in eval mode afterwards. Under torchrun the processes share the cases, and every
    process returns the results of all cases, the same as a single process would.
    """
    rank, world = rank_and_world()
    progress, rows = Progress(len(split)), []
    model.eval()
    for batch, chunks in sample_batches(model, split, max(n, *samples), rank, world):
        drawn = draw(model, batch, chunks, samples)
        rows.append(measure(model, drawn, samples, likelihood_samples) | more(drawn))
        done = world * sum(len(row["dice"]) for row in rows)
        progress.update(min(done, len(split)), "cases evaluated")
    progress.say("", end="")  # clears its line
    return gather(rows)


@torch.no_grad()
def validation_score(model, split) -> tuple[str, float]:
    """(name, value) of the measure by which training keeps its best checkpoint; lower is better.

    The mean GED of 16 samples; of sets with instances the mean Rand error of the objects found in
    them, because GED hardly tells perfect objects in random classes from noise. Processes share
    the cases as in `score`.
    """
    was_training, rows = model.training, []
    model.eval()
    for batch, chunks in sample_batches(model, split, CLUSTERED, *rank_and_world()):
        hard = torch.cat([labels_of(logits, 2) for logits in chunks])
        rows.append({"ged": sample_ged(batch, hard)})
        if batch.instances is not None:
            rows[-1]["rand_error"] = rand_errors(batch, find_instances(hard, None, batch.fixed))
    model.train(was_training)
    values = {name: v for name, v in gather(rows).items() if not np.isnan(v).all()}
    name = "rand_error" if "rand_error" in values else "ged"  # also where no case has an object
    return f"{name}_{CLUSTERED}", float(np.nanmean(values[name]))


# -------------------------------------------------------------------------------------- tables


def write_csv(path, split, values) -> None:
    """Write a line for each case: its name, its group and every measure."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["name", "group", *values])
    columns = [[f"{value:.6g}" for value in v] for v in values.values()]
    rows.writerows(zip(split.names, split.groups, *columns))
    write_text(path, text.getvalue())


def table(summary: dict) -> str:
    """The content of metrics.json as lines to read."""
    return "\n".join(f"  {name:25} {s['mean']:10.4f} +- {s['stderr']:.4f}"
                     for name, s in summary.items())


# ----------------------------------------------------------------------------- the command line


def parse(argv=None) -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, epilog=explained(),
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("run", help="folder that train.py wrote")
    p.add_argument("--split", choices=["test", "val", "all"], default="test",
                   help="the cases to judge (default test)")
    p.add_argument("--cases", choices=["all", "agreed"], default="all",
                   help="agreed: only cases that every annotator marked (later papers' subset B)")
    p.add_argument("--weights", choices=["best", "last"], default="best",
                   help="best: of lowest validation GED; last: at the end of training")
    p.add_argument("--path", help="the data, if they have moved; with --split all, any other file "
                   "of the same data set")
    p.add_argument("--data-args", nargs="+", metavar="K=V",
                   help="with --split all --path: options of the other data, instead of the run's")
    p.add_argument("--whole", action="store_true",
                   help="whole images, not the centre of the run's --image-size")
    p.add_argument("--samples", type=int, nargs="+", metavar="N",
                   help=f"numbers of samples to score, up to {MOST_SAMPLES} (default "
                   f"{' '.join(map(str, SAMPLES))}); another highest number draws other samples. For "
                   f"--image (default {DRAWN}) and --per-volume (default {PER_VOLUME}) give one")
    p.add_argument("--likelihood-samples", type=int, metavar="N",
                   help=f"samples for the log-likelihood (default {LIKELIHOOD_SAMPLES})")
    modes = p.add_mutually_exclusive_group()
    modes.add_argument("--ambiguous", action="store_true",
                   help="can samples tell on which cases annotators disagree?")
    p.add_argument("--per-class", action="store_true",
                   help="judge every class by itself, too (default: for 2D and 3 to 20 classes)")
    modes.add_argument("--per-volume", action="store_true",
                   help="sets of slices (synapse, folder with slices=axial): Dice and Hausdorff "
                   "distance of whole volumes, for the deterministic prediction and for samples")
    p.add_argument("--cluster", type=int, nargs="+", metavar=("N", "ALPHA"),
                   help="sets with instances: cluster N samples (default 16) within a Hamming "
                   "distance of ALPHA, one number (default N); choose it on --split val: a larger "
                   "one breaks fewer objects")
    modes.add_argument("--ood", action="store_true", help="can samples warn of corrupted images?")
    p.add_argument("--ood-data", nargs="+", metavar=("NAME", "PATH"), help="--ood: data set whose "
                   "images are the foreign ones (default: a synthetic one)")
    modes.add_argument("--compare", nargs="+", metavar="RUN", help="compare with these runs: "
                       "compare.md, a table, and compare*.png, curves, in this run's folder")
    modes.add_argument("--image", metavar="FILE",
                   help="samples for this picture, .npy or NIfTI file, a folder of them, or a "
                   "BraTS patient")
    p.add_argument("--temperature", type=float, default=1.0, metavar="T",
                   help="--image with ssn: scale the covariance of the samples by T")
    p.add_argument("--scale-class", nargs="+", default=[], metavar="K=FACTOR",
                   help="--image with ssn: scale class K's part of (sample - mean) by FACTOR")
    p.add_argument("--out", help="where --image writes (default: the run's folder)")
    p.add_argument("--precision", choices=["fp32", "tf32"], default="fp32",
                   help="tf32: products and convolutions of a GPU round their inputs to 10 bits")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N")
    return p.parse_args(argv)


def check(args) -> None:
    """Raise UserError for values that make no sense, and for options without an effect."""
    args.ood = args.ood or bool(args.ood_data)
    for mode, takes in MODES.items():
        for option, default in OPTIONS.items():
            if getattr(args, mode) and getattr(args, option) != default and option not in takes:
                raise UserError("--{} has no effect with --{}: leave it out".format(
                    option.replace("_", "-"), mode.replace("_", "-")))
    if args.data_args and not (args.path and args.split == "all"):
        raise UserError("--data-args is for other data: give --split all and --path as well")
    if unfit := {"path", "split_file"} & key_values("--data-args", args.data_args or []).keys():
        raise UserError(f"--data-args {min(unfit)}=...: all cases at --path are judged; leave it "
                        "out")
    others = [mode for mode in MODES if mode != "ood" and getattr(args, mode)]
    if args.ood_data and others:
        raise UserError(f"--ood-data has no effect with --{others[0]}: leave it out".replace(
            "_", "-"))
    if args.out and not args.image:
        raise UserError("--out is for --image: other results are written to the run's folder")
    if (args.image or args.per_volume) and len(args.samples or ()) > 1:
        raise UserError("--samples: give one number for --image and --per-volume")
    if "" in (args.image, args.out, args.path):  # a shell's unset variable
        raise UserError("--image, --out or --path is empty: give a path, or leave the option out")
    for option, counts in (("samples", args.samples), ("cluster", (args.cluster or ())[:1]),
                           ("likelihood-samples", (args.likelihood_samples,))):
        for count in counts or ():
            if count is not None and not 1 <= count <= MOST_SAMPLES:
                raise UserError(f"--{option} {count}: give 1 to {MOST_SAMPLES} samples")
    if args.cluster and (len(args.cluster) > 2 or min(args.cluster) < 1):
        raise UserError("--cluster: give a number of samples and, optionally, a distance; both at "
                        "least 1")
    if args.ood_data and len(args.ood_data) > 2:
        raise UserError("--ood-data: a data set's name, and its path if it needs one")
    if not args.image and (args.temperature != 1 or args.scale_class):
        raise UserError("--temperature and --scale-class are for --image")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature:g}: a number from 0 up")


def judge_volumes(args, device) -> None:
    """--per-volume: every class of whole volumes, at the size that annotators drew them in.

    A class counts only where it is annotated; if it is missed there, its Dice is 0 and it has no
    distance. (In VAE U-Net's code, both cases have a Dice of 1 and a distance of 0.) Distances are
    in voxels, also in the code, although the paper says mm.
    """
    folder = Path(args.run)
    settings, model, (split,) = open_run(folder, (args.split,), args.path, device, args.weights,
                                         whole=True)
    if split.images.dim() != 4 or split.instances is not None:
        advice = ("cases are volumes already: judge them without --per-volume, classes with "
                  "--per-class" if split.images.dim() == 5 else f"{settings['data']} has none")
        raise UserError(f"--per-volume is for sets of slices of volumes; {advice}")
    labels = split.all_maps().labels
    if settings["data"] == "synapse":  # its slices were resampled
        labels = load_data(folder, settings, (args.split,), args.path, size=0)[0].labels
    n = args.samples[0] if args.samples else PER_VOLUME
    rows = volume_rows(model, split, labels, n)
    file = folder_of(folder, args.split, weights=args.weights, path=args.path) / "per_volume.csv"
    write_classes(file, rows)
    say(f"{file}: {len(rows['class_dice'])} volumes, {n} samples of each")


def warn_of_foreign(args, device) -> None:
    """Test whether samples can tell corrupted and foreign images, as --ood asks."""
    folder = Path(args.run)
    settings, model, (split,) = open_run(folder, (args.split,), args.path, device, args.weights)
    name, *place = args.ood_data or ["organs" if settings["data"] == "shapes" else "shapes"]
    foreign = data.load(name, "test", *place).images
    out = folder_of(folder, args.split, weights=args.weights, path=args.path)
    summary = ood(model, split, foreign, name, out)
    print("Area under the ROC curve, by how much samples differ (variance) or by PHiSeg's gamma "
          "map, of images changed against the same images as they are; 0.5 is chance.\n"
          "blur: std in pixels; patch: per cent of the side; noise: in deviations of the images")
    print(table({name.removeprefix("auroc_"): values for name, values in summary.items()
                 if name.startswith("auroc_")}))


def main(argv=None) -> int:
    """Run the command line; a user's mistake is one line on stderr and exit status 2."""
    args = parse(argv)
    try:
        check(args)
        device, _, world = start_processes(args.device)
        set_tf32(args.precision == "tf32")
        if world > 1 and any(getattr(args, mode) for mode in MODES):
            raise UserError("torchrun only works for judging a split; start this option with "
                            "python")
        if args.image:
            predict_images(args, device)
        elif args.compare:
            say(compare([args.run, *args.compare]), end="")
            say(f"also in {Path(args.run, 'compare.md')}, with pictures of the curves beside it")
        elif args.ambiguous:
            folder = Path(args.run)
            _, model, splits = open_run(folder, ("val", "test"), args.path, device, args.weights)
            out = folder_of(folder, "test", weights=args.weights, path=args.path)
            result = ambiguity(model, *splits, out)
            say("{n} test cases, {samples} samples: do some annotators mark nothing where others "
                "mark something?\nright in {accuracy:.1%} of the cases; the commoner answer alone "
                "in {commoner:.1%}\nthe answer is yes if fewer than {threshold} samples mark "
                "something, a number chosen on the validation split\n".format(**result)
                + f"{out / 'ambiguity.json'}, {out / 'ambiguity.png'}")
        elif args.ood:
            warn_of_foreign(args, device)
        elif args.per_volume:
            judge_volumes(args, device)
        else:
            report(args.run, split=args.split, cases=args.cases, weights=args.weights,
                   samples=tuple(args.samples or SAMPLES), path=args.path, whole=args.whole,
                   data_args=args.data_args and key_values("--data-args", args.data_args),
                   classes=args.per_class, cluster=args.cluster,
                   likelihood_samples=args.likelihood_samples or LIKELIHOOD_SAMPLES,
                   device=device)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        return 0
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print("error: out of memory: give fewer --samples, smaller images or another --device",
              file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
