"""Judge a trained run: numbers, pictures, and samples for an image of your own.

    python evaluate.py runs/ssn-lidc-0                           # its test split
    python evaluate.py runs/ssn-lidc-0 --cases agreed            # cases that every reader marked
    python evaluate.py runs/ssn-lidc-0 --ambiguous               # ... on which readers disagree?
    python evaluate.py runs/ssn-lidc-0 --ood                     # ... and blurred, foreign images?
    python evaluate.py runs/ssn-lidc-0 --image my.png            # samples for one picture
    python evaluate.py runs/ssn-lidc-0 --compare runs/unet-lidc-0 ...     # a table, paired tests
    torchrun --nproc_per_node=4 evaluate.py runs/ssn-lidc-0      # its test split, shared out

In the run's folder (test split, all cases; otherwise in a folder of its own inside it):
    metrics.json     {name: {"mean", "stderr", "n"}}; stderr is the bootstrap's, over cases
    per_case.csv     every measure of every case
    per_class.csv    2D with 3 to 20 classes, or --per-class: Dice and 95% Hausdorff distance of
                     every class, of `predict` and of samples (VAE U-Net's Table 2)
    samples.png      image, every reader, prediction and 16 samples, a column a case
    overview.png     the same in short, a row a case
    uncertainty.png  readers' and samples' mean, PHiSeg's gamma map, variance over samples
    maps.png         does the model vary where readers contradict it? (PHiSeg's Fig. 3)
    dice.png         the spread of the samples' Dice beside the prediction's (SSN's Fig. 5)
    ged.png          GED against the number of samples (Probabilistic U-Net's Fig. 4)
    manipulation.png SSN: one sample, its classes scaled after the fact (SSN's Fig. 6)
    levels.png       PHiSeg: samples growing level by level, and their residuals (its Fig. 1)
    scales.png       HPU-Net: all latents drawn, the most local, the most global ones (its Fig. 3)
    extrapolation.png    HPU-Net with --data-args hide=50: what it puts where nothing is known
    instances.png    sets with instances: objects clustered from samples (HPU-Net's Fig. 4)
    modes.png        sets of known odds: frequencies of modes and of pixels' classes against them

Names in metrics.json, for n samples: ged_<n> diversity_<n> hungarian_iou_<n> ncc_<n>. For the
deterministic `predict`: dice, dice_present, and ged_predict, the GED it would have alone. For the
mean of the samples' probabilities: dice_mean. dice_better is the share of samples whose Dice beats
the prediction's, dice_q05 to dice_q95 are quantiles of the samples' Dice. log_likelihood in nats;
iou_rec for models with latents. Where the odds are known: mode_tv_<n>, the total variation between
the modes drawn for a case and its odds (n true draws have some too); mode_pooled_tv_<n>, the same
with frequencies and odds averaged over the cases first, and mode_gap_<n>, the worst mode's
difference then. Of sets with instances: rand_error_<n>, ap_<n>, ap50_<n> of objects clustered from
n samples (--cluster N ALPHA: rand_error_<n>_<alpha>, ...), and rand_error_components of what hangs
together in the prediction. dice_class_<k> and hd95_class_<k> (in pixels): of `predict`, over the
cases that have class k.
"""

import argparse
import csv
import itertools
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
import metrics
import models
from analysis.ambiguity import ambiguity
from analysis.calibration import calibrate, plot_modes, pooled
from analysis.instances import instances
from analysis.ood import ood
from analysis.paper_figures import (plot_extrapolation, plot_instances, plot_levels,
                                    plot_manipulation, plot_maps, plot_scales)
from analysis.pictures import (COLUMNS, plot_dice, plot_ged, plot_overview, plot_samples,
                               plot_uncertainty, plane)
from analysis.predict import pictures, predict_image
from common import IGNORE, Progress, UserError, pick_device, start_processes
from hpunet import HPUNet
from models import labels_of, read_config, sample_batches
from phiseg import PHiSeg
from sources.files import write_atomically, write_text
from ssn import SSN

SAMPLES = (1, 4, 8, 16, 100)


def report(folder, *, split="test", cases="all", weights="best", samples=SAMPLES, path=None,
           classes=False, cluster=None, device=None, quiet=False) -> dict:
    """Judge `folder`/best.pt, write the files the module lists, and return metrics.json's content.

    Under torchrun the processes share the cases; all but the first write and return nothing.
    split: "test", "val" or "all". cases: "all", or "agreed", those every reader marked. weights:
    "best", the checkpoint of lowest validation GED, or "last". classes: every class by itself, too,
    as is done anyway where it costs little. cluster: (samples,) or (samples, Hamming distance) by
    which objects are found; default 16.
    Raises UserError or DataError for what the user can mend.
    """
    folder = Path(folder)
    settings = read_config(folder)["settings"]
    device = device or pick_device()
    model = models.load(folder / f"{weights}.pt", device)
    part = data.load(settings["data"], split, path or settings["path"], **settings["data_args"])
    if settings["image_size"] is not None:
        part = data.center(part, settings["image_size"])
    if cases == "agreed":
        part = part.subset(agreed(part))
        if not len(part):
            raise UserError(f"--cases agreed: no case of {settings['data']}'s {split} split was "
                            "marked by every reader; use --cases all")
    if cluster and part.instances is None:
        raise UserError(f"--cluster is for sets with instances; {settings['data']} has none")
    part = part.to(device)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    progress = Progress(len(part), quiet=quiet or not first)
    values = score(
        model, part, samples, progress=lambda done: progress.update(done, "cases evaluated"))
    if not first:
        return {}
    values = {name: v.numpy() for name, v in values.items()}

    named = [split, cases] + ["last"] * (weights == "last")
    out = folder if named == ["test", "all"] else folder / "-".join(named)
    out.mkdir(exist_ok=True)
    modes = calibrate(model, part, max(samples)) if part.exact else None
    if modes:
        values[f"mode_tv_{max(samples)}"] = abs(modes.frequency - modes.probabilities).sum(1) / 2
    if part.instances is not None:
        found, shown = instances(model, part, *cluster or (16,))
        values |= found
        plot_instances(out / "instances.png", shown)
    elif classes or part.images.dim() == 4 and 3 <= part.num_classes <= 20:
        by_class = per_class(model, part)
        write_per_class(out / "per_class.csv", by_class)
        values |= {f"{name}_class_{k}": v[0, :, k - 1] for name, v in by_class.items()
                   for k in range(1, part.num_classes)}
    summary = {name: {k: b[k] for k in ("mean", "stderr", "n")}
               for name, v in values.items() if (b := metrics.bootstrap(v))["n"]}
    if modes:
        summary |= pooled(modes, max(samples))
    write_text(out / "metrics.json", json.dumps(summary, indent=2, allow_nan=False,
                                                      default=float) + "\n")
    write_csv(out / "per_case.csv", part, values)
    draw(out, model, part, values, summary, hidden="hide" in settings["data_args"])
    if modes:
        plot_modes(out / "modes.png", modes)
    progress.say(table(summary))
    progress.say(f"{split} split, {len(part)} cases: numbers and pictures in {out}")
    return summary


@torch.no_grad()
def score(model, split, samples=(16,), seed=0, full=True, progress=None) -> dict:
    """Every measure of every case: {name: (N,) float64}, for each n in `samples`.

    full=False only measures `ged_<n>`, as validation during training does. `progress(done)` is
    called after every batch. Under torchrun the processes share the cases, and all get everything,
    the same as one would.
    """
    was_training = model.training
    model.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches, done = [], 0
    for part, logits in sample_batches(model, split, max(samples), seed, rank, world):
        scores = score_batch(model, part, logits, samples, full)
        batches.append({name: values.double().cpu() for name, values in scores.items()})
        done += len(part) * world
        if progress:
            progress(min(done, len(split)))
    model.train(was_training)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, batches)
        batches = [batch for turn in itertools.zip_longest(*shares) for batch in turn if batch]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def score_batch(model, part, logits, samples, full) -> dict:
    """The measures of a batch of cases, each (B,), given its samples' logits; see `evaluate`."""
    weights, probs = part.weights, logits.softmax(2) if full else None
    labels, hard = only_scored(part, part.labels), only_scored(part, labels_of(logits, 2))
    # where the papers average over a few of many classes, absent ones are left out
    empty = float("nan") if part.scored or part.instances is not None else 1.0
    classes = scored_classes(part)
    if not full:
        return {f"ged_{n}": metrics.ged(hard[:n], labels, classes, weights, empty)
                for n in samples}
    out = metrics.sample_scores(hard, labels, classes, weights, empty, samples)
    for n in samples:
        out[f"ncc_{n}"] = metrics.ncc(probs[:n], part.labels, weights)
    prediction = only_scored(part, labels_of(model.predict(part.images), 1))
    out["ged_predict"] = metrics.ged(prediction[None], labels, classes, weights, empty)
    out["dice"] = metrics.dice(prediction, labels, classes, weights)
    out["dice_present"] = metrics.dice_present(prediction, labels, classes, weights)
    mean = only_scored(part, labels_of(probs.mean(0), 1))
    out["dice_mean"] = metrics.dice(mean, labels, classes, weights)
    dices = metrics.sample_dice(hard, labels, classes, weights)  # (n, B)
    out["dice_better"] = (dices > out["dice"]).double().mean(0)
    for percent in (5, 25, 50, 75, 95):
        out[f"dice_q{percent:02}"] = dices.quantile(percent / 100, dim=0)
    return out | likelihoods(model, part, max(samples))


def scored_classes(split) -> int:
    """How many classes the maps of `only_scored` have."""
    return 1 + len(split.scored) if split.scored else split.num_classes


def only_scored(split, maps):
    """Label maps whose classes are those that the split's paper averages over, counted from 1; all
    others are 0, and 255 stays."""
    if not split.scored:
        return maps
    table = torch.zeros(256, dtype=torch.uint8, device=maps.device)
    table[list(split.scored)] = torch.arange(1, 1 + len(split.scored), device=maps.device).byte()
    table[IGNORE] = IGNORE
    return table[maps.long()]


def likelihoods(model, part, n) -> dict:
    """What needs the readers' maps one by one: log_likelihood, and iou_rec of models with latents.

    The expectation over a case's label maps; over two drawn from it where there are more than 8.
    """
    odds = part.probabilities  # (B, A)
    rows = torch.arange(len(odds), device=odds.device)
    if odds.shape[1] > 8:
        drawn = torch.multinomial(odds, 2, replacement=True)
        chosen = [(drawn[:, i], torch.full_like(odds[:, 0], 0.5)) for i in range(2)]
    else:
        chosen = [(torch.full_like(rows, a), odds[:, a]) for a in range(odds.shape[1])]
    out = {"log_likelihood": torch.zeros_like(odds[:, 0])}
    for reader, weight in chosen:
        label = part.labels[rows, reader]  # (B, *S)
        nats = model.log_likelihood(part.images, label.long(), n)
        out["log_likelihood"] += weight * nats
        if hasattr(model, "reconstruct"):
            again = labels_of(model.reconstruct(part.images, label.long()), 1)
            # The GED of two single maps is 2 (1 - IoU); NaN for a reader that is not there.
            iou = 1 - metrics.ged(only_scored(part, again)[None], only_scored(part, label)[:, None],
                                  scored_classes(part)) / 2
            out["iou_rec"] = out.get("iou_rec", 0) + weight * iou.nan_to_num()
    return out


def agreed(split) -> list[int]:
    """Cases in which every reader that there is marked something (the later papers' subset B)."""
    foreground = ((split.labels > 0) & (split.labels != IGNORE)).flatten(2).any(2)
    missing = (split.labels == IGNORE).flatten(2).all(2)
    return torch.nonzero((foreground | missing).all(1)).flatten().tolist()


def write_csv(path, split, values) -> None:
    """A line a case: its name, its group and every measure."""
    def write(name):
        with open(name, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["name", "group", *values])
            for i, case in enumerate(split.names):
                rows.writerow([case, split.groups[i], *(f"{v[i]:.6g}" for v in values.values())])

    write_atomically(path, write)


def table(summary: dict) -> str:
    """metrics.json for people."""
    return "\n".join(f"  {name:20} {s['mean']:10.4f} +- {s['stderr']:.4f}"
                     for name, s in summary.items())


# ----------------------------------------------------------------------------------- pictures


def draw(out, model, split, values, summary, hidden=False) -> None:
    """The pictures of an evaluation, of cases spread evenly over the split; `hidden`: of data.hide.
    """
    rows = np.linspace(0, len(split) - 1, min(COLUMNS, len(split))).round().astype(int)
    some = split.subset(rows.tolist()).all_maps()
    generator = torch.Generator(some.images.device).manual_seed(0)
    probs = model.sample(some.images, 16, generator).float().softmax(2)  # (16, B, K, *S)
    prediction = model.predict(some.images)  # (B, K, *S)
    error = metrics.error_map(probs, some.labels, some.weights)
    gamma, ncc = metrics.gamma_map(probs), metrics.ncc(probs, some.labels, some.weights)
    shown = [plane(some, case, probs[:, case], prediction[case], error[case], gamma[case])
             for case in range(len(some))]
    plot_samples(out / "samples.png", shown)
    plot_overview(out / "overview.png", shown)
    plot_uncertainty(out / "uncertainty.png", shown)
    plot_maps(out / "maps.png", [dict(name=c.name, image=c.image, labels=c.labels, error=c.error,
                                      gamma=c.gamma, samples=c.probs.argmax(1), ncc=ncc[i])
                                 for i, c in enumerate(shown)])
    plot_dice(out / "dice.png", values)
    plot_ged(out / "ged.png", {out.name: summary})
    if isinstance(model, SSN) and model.config.dims == 2:
        plot_manipulation(model, some.images[0], out / "manipulation.png")
    if isinstance(model, PHiSeg) and model.config.dims == 2:
        plot_levels(model, some.images[0], out / "levels.png")
    if isinstance(model, HPUNet) and model.config.dims == 2:
        plot_scales(model, some.images[0], out / "scales.png")
        if hidden:
            plot_extrapolation(model, some.images, some.labels[:, 0], out / "extrapolation.png")


# ----------------------------------------------------------------------- several runs, ambiguity


COMPARED = ("ged_16", "ged_100", "hungarian_iou_16", "ncc_100", "diversity_16", "dice",
            "dice_present", "dice_mean", "iou_rec", "log_likelihood", "mode_pooled_tv_100")


def compare(folders) -> str:
    """A table of finished runs, one a line, and `compare.png`, both in the first run's folder.

    p: the paired permutation test, over cases, of a run's `ged_16` against the first's.
    Raises UserError where runs were not judged on the same cases.
    """
    folders = [Path(f) for f in folders]
    summaries, cases = {}, []
    for folder in folders:
        try:
            summaries[folder.name] = json.loads((folder / "metrics.json").read_text())
            with open(folder / "per_case.csv", newline="", encoding="utf-8") as file:
                cases.append({row["name"]: float(row["ged_16"]) for row in csv.DictReader(file)})
        except (OSError, ValueError, KeyError):
            raise UserError(f"{folder}: not judged yet, or without ged_16; run: "
                            f"python evaluate.py {folder}") from None
        if cases[-1].keys() != cases[0].keys():
            raise UserError(f"{folder} and {folders[0]} were judged on different cases")
    names = [n for n in COMPARED if any(n in s for s in summaries.values())]
    lines = ["| run | " + " | ".join(names) + " | p |", "|---" * (len(names) + 2) + "|"]
    for (run, summary), values in zip(summaries.items(), cases):
        cells = [f"{s['mean']:.3f} ± {s['stderr']:.3f}" if (s := summary.get(n)) else ""
                 for n in names]
        p = metrics.paired_test([values[c] for c in cases[0]], list(cases[0].values()))
        lines.append(f"| {run} | " + " | ".join(cells) +
                     (f" | {p:.2g} |" if values is not cases[0] else " | |"))
    text = "\n".join(lines) + "\n"
    write_text(folders[0] / "compare.md", text)
    plot_ged(folders[0] / "compare.png", summaries)
    return text


# -------------------------------------------------------------------------- objects by sampling


# -------------------------------------------------------------------------- every class by itself


@torch.no_grad()
def per_class(model, split, n=8) -> dict:
    """Dice and 95% Hausdorff distance (pixels) of every foreground class, as (1 + n, N, K - 1).

    First `predict` (the VAE U-Net's prior mode), then n samples, each judged by itself. Reference
    is each case's likeliest reader, the first of equals. NaN where that reader's map lacks the
    class; for the distance also where the prediction does.
    """
    dices, distances = [], []
    for part, logits in sample_batches(model, split, n):
        first = part.probabilities.argmax(1)
        label = part.labels[torch.arange(len(part), device=first.device), first]  # (B, *S)
        maps = torch.cat([labels_of(model.predict(part.images), 1)[None],
                          labels_of(logits, 2)])  # (1 + n, B, *S)
        of_class = [torch.where(label == IGNORE, IGNORE, label == k).byte()
                    for k in range(1, split.num_classes)]
        absent = torch.stack([(x != 1).flatten(1).all(1) for x in of_class], 1)  # (B, K - 1)
        dice = torch.stack([metrics.sample_dice((maps == k).byte(), x[:, None])
                            for k, x in enumerate(of_class, 1)], 2)
        distance = torch.stack([metrics.hausdorff95(x, label, split.num_classes) for x in maps])
        dices.append(dice.masked_fill(absent, np.nan).cpu().double())
        distances.append(distance.masked_fill(absent, np.nan).cpu().double())
    return {"dice": torch.cat(dices, 1).numpy(), "hd95": torch.cat(distances, 1).numpy()}


def write_per_class(path, values: dict) -> None:
    """per_class.csv, laid out as the VAE U-Net's Table 2: a line a mode and class, and their mean.

    A sample's Dice of a class is its mean over the cases that have the class; the line of the
    samples holds mean and standard deviation of that over the samples. missed: cases of the class
    in which nothing of it was predicted, so that they have no distance.
    """
    with warnings.catch_warnings():  # a class that no case has is NaN all over: empty in the table
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = {name: np.nanmean(v, 1) for name, v in values.items()}  # (1 + n, K - 1)
        mean = {name: np.c_[v, np.nanmean(v, 1)] for name, v in mean.items()}
        cases = (~np.isnan(values["dice"][0])).sum(0)
        missed = (np.isnan(values["hd95"]) & ~np.isnan(values["dice"])).sum(1)  # (1 + n, K - 1)
    text = ["mode,class,dice,dice_deviation,hd95,hd95_deviation,cases,missed"]
    for mode, rows in (("predict", slice(0, 1)), ("samples", slice(1, None))):
        for k in range(mean["dice"].shape[1]):
            last = k == len(cases)
            cells = [mode, "mean" if last else str(k + 1)]
            for name in ("dice", "hd95"):
                column = mean[name][rows, k]
                cells += [f"{column.mean():.6g}"]
                cells += [f"{column.std():.6g}" if mode == "samples" else ""]
            cells += ["", ""] if last else [str(cases[k]), f"{missed[rows, k].mean():.6g}"]
            text.append(",".join("" if cell == "nan" else cell for cell in cells))
    write_text(path, "\n".join(text) + "\n")


# ------------------------------------------------------------------------- out of distribution


# -------------------------------------------------------------------------- one image of yours


# -------------------------------------------------------------------------- the command line


def parse(argv=None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="folder that train.py wrote")
    p.add_argument("--split", choices=["test", "val", "all"], default="test")
    p.add_argument("--cases", choices=["all", "agreed"], default="all",
                   help="agreed: only cases that every reader marked")
    p.add_argument("--weights", choices=["best", "last"], default="best",
                   help="best: of lowest validation GED; last: at the end of training")
    p.add_argument("--path", help="judge on this file of the same data set")
    p.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES), metavar="N")
    p.add_argument("--ambiguous", action="store_true", help="tell cases on which readers disagree")
    p.add_argument("--per-class", action="store_true",
                   help="Dice and Hausdorff distance of every class by itself")
    p.add_argument("--cluster", type=int, nargs="+", metavar=("N", "ALPHA"),
                   help="sets with instances: cluster N samples (16) within Hamming distance ALPHA "
                   "(N); choose on --split val: fewer broken objects with a larger one")
    p.add_argument("--ood", action="store_true", help="can samples tell corrupted images?")
    p.add_argument("--ood-data", nargs="+", metavar=("NAME", "PATH"),
                   help="--ood: data set whose images are the foreign ones (default: a made one)")
    p.add_argument("--compare", nargs="+", metavar="RUN", help="one table and figure with these")
    p.add_argument("--image", metavar="FILE",
                   help="samples for this picture or NIfTI, a folder of them, a BraTS patient")
    p.add_argument("--out", help="where --image writes (default: the run's folder)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    return p.parse_args(argv)


def main(argv=None) -> int:
    """The command line; a user's mistake is one line on stderr and exit status 2."""
    args = parse(argv)
    try:
        if min(args.samples) < 1:
            raise UserError("--samples: numbers from 1 up")
        if args.cluster and (len(args.cluster) > 2 or min(args.cluster) < 1):
            raise UserError("--cluster: samples and, if you like, a distance, both from 1 up")
        device, _, world = start_processes(args.device)
        if world > 1 and (args.image or args.compare or args.ambiguous or args.ood or
                          args.ood_data):
            raise UserError("torchrun shares out the judging of a test split alone; start this "
                            "with python")
        if args.image:
            if args.out and Path(args.image).is_dir() and \
                    Path(args.out).resolve() == Path(args.image).resolve():
                raise UserError("--out: another folder than --image, whose files are all read")
            for file in pictures(Path(args.image)):
                print(predict_image(args.run, file, out=args.out, device=device,
                                    samples=16 if len(args.samples) > 1 else args.samples[0]))
        elif args.compare:
            print(compare([args.run, *args.compare]), end="")
        elif args.ambiguous:
            result = ambiguity(args.run, path=args.path, device=device)
            print(", ".join(f"{k} {v:.4g}" for k, v in result.items()))
        elif args.ood or args.ood_data:
            if args.ood_data and len(args.ood_data) > 2:
                raise UserError("--ood-data: a data set's name, and its path if it needs one")
            summary = ood(args.run, split=args.split, path=args.path, device=device,
                          foreign=args.ood_data and (*args.ood_data, None)[:2])
            print("AUROC against the same images left as they are:")
            print(table({name.removeprefix("auroc_"): values for name, values in summary.items()
                         if name.startswith("auroc_")}))
        else:
            report(args.run, split=args.split, cases=args.cases, weights=args.weights,
                   samples=tuple(args.samples), path=args.path, classes=args.per_class,
                   cluster=args.cluster, device=device)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return 0
    except (UserError, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.strerror}{f' ({error.filename})' if error.filename else ''}",
              file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: out of memory: fewer --samples, or --device cpu", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
