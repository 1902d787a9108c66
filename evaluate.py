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
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
import metrics
import train
from common import (COLORS, IGNORE, UserError, new_plot, paint_image, paint_label, paint_map,
                    pick_device, reflect_pad, save_figure, save_grid, write_atomically)
from hpunet import (HPUNet, clean_instances, cluster_instances, draw_extrapolation, draw_instances,
                    draw_scales)
from phiseg import PHiSeg, draw_levels, draw_maps
from ssn import SSN, draw_manipulation

SAMPLES = (1, 4, 8, 16, 100)
COLUMNS = 6  # cases a picture shows
QUANTILES = ("dice_q05", "dice_q25", "dice_q50", "dice_q75", "dice_q95")
LINES = [c for c in COLORS if c != "#F0E442"]  # yellow lines do not show on white
READERS = 7  # label maps of a case a picture shows


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
    model = train.load(folder / f"{weights}.pt", device)
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
    progress = train.Progress(len(part), quiet=quiet or not first)
    values = train.evaluate(
        model, part, samples, progress=lambda done: progress.update(done, "cases evaluated"))
    if not first:
        return {}
    values = {name: v.numpy() for name, v in values.items()}

    named = [split, cases] + ["last"] * (weights == "last")
    out = folder if named == ["test", "all"] else folder / "-".join(named)
    out.mkdir(exist_ok=True)
    modes = calibrate(model, part, max(samples)) if part.exact else None
    if modes:
        values[f"mode_tv_{max(samples)}"] = abs(modes.frequency - modes.odds).sum(1) / 2
    if part.instances is not None:
        found, shown = instances(model, part, *cluster or (16,))
        values |= found
        draw_instances(out / "instances.png", shown)
    elif classes or part.images.dim() == 4 and 3 <= part.num_classes <= 20:
        by_class = per_class(model, part)
        write_per_class(out / "per_class.csv", by_class)
        values |= {f"{name}_class_{k}": v[0, :, k - 1] for name, v in by_class.items()
                   for k in range(1, part.num_classes)}
    summary = {name: {k: b[k] for k in ("mean", "stderr", "n")}
               for name, v in values.items() if (b := metrics.bootstrap(v))["n"]}
    if modes:
        summary |= pooled(modes, max(samples))
    train.write_text(out / "metrics.json", json.dumps(summary, indent=2, allow_nan=False,
                                                      default=float) + "\n")
    write_csv(out / "per_case.csv", part, values)
    draw(out, model, part, values, summary, hidden="hide" in settings["data_args"])
    if modes:
        draw_modes(out / "modes.png", modes)
    progress.say(table(summary))
    progress.say(f"{split} split, {len(part)} cases: numbers and pictures in {out}")
    return summary


def read_config(folder: Path) -> dict:
    """The run's config.json."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder}: no run there (config.json is missing or broken); give a folder "
                        "that train.py wrote") from None


def agreed(split) -> list[int]:
    """Cases in which every reader that there is marked something (the later papers' subset B)."""
    foreground = ((split.labels > 0) & (split.labels != IGNORE)).flatten(2).any(2)
    missing = (split.labels == IGNORE).flatten(2).all(2)
    return torch.nonzero((foreground | missing).all(1)).flatten().tolist()


@torch.no_grad()
def calibrate(model, split, n) -> SimpleNamespace:
    """Do modes, and classes of pixels, appear as often as the known odds say?

    frequency, odds: (N, M), of each mode of each case (Kohl et al. 2018, App. C). marginal (20, 2):
    for pixels and foreground classes sorted into 20 bins by their known probability (0 and 1 left
    out): its mean and the mean share of the samples; NaN where a bin is empty.
    """
    frequency, odds, totals = [], [], torch.zeros(20, 3, dtype=torch.float64)
    for part, logits in train.drawn(model, split, n):
        hard = train.labels_of(logits, 2)
        frequency.append(metrics.mode_frequencies(hard, part.labels, part.num_classes).cpu())
        odds.append(part.odds.cpu())
        for k in range(1, part.num_classes):
            known = torch.einsum("bm,bm...->b...", part.odds, (part.labels == k).float()).flatten()
            share = (hard == k).float().mean(0).flatten()
            open_ = (known > 1e-4) & (known < 1 - 1e-4)
            known, share = known[open_].double().cpu(), share[open_].double().cpu()
            row = (known * 20).long().clamp(max=19)
            totals.index_add_(0, row, torch.stack([known, share, torch.ones_like(known)], 1))
    return SimpleNamespace(frequency=torch.cat(frequency).numpy(), odds=torch.cat(odds).numpy(),
                           marginal=(totals[:, :2] / totals[:, 2:]).numpy())


def pooled(modes, n) -> dict:
    """mode_pooled_tv_<n> and mode_gap_<n> with standard errors by resampling cases."""
    rng = np.random.default_rng(0)
    excess = modes.frequency - modes.odds
    again = excess[rng.integers(len(excess), size=(200, len(excess)))].mean(1)  # (200, M)
    mean = excess.mean(0)
    return {f"mode_pooled_tv_{n}": {"mean": abs(mean).sum() / 2, "n": len(excess),
                                    "stderr": np.std(abs(again).sum(1) / 2)},
            f"mode_gap_{n}": {"mean": abs(mean).max(), "stderr": np.std(abs(again).max(1)),
                              "n": len(excess)}}


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
    draw_samples(out / "samples.png", shown)
    draw_overview(out / "overview.png", shown)
    draw_uncertainty(out / "uncertainty.png", shown)
    draw_maps(out / "maps.png", [dict(name=c.name, image=c.image, labels=c.labels, error=c.error,
                                      gamma=c.gamma, samples=c.probs.argmax(1), ncc=ncc[i])
                                 for i, c in enumerate(shown)])
    draw_dice(out / "dice.png", values)
    draw_ged(out / "ged.png", {out.name: summary})
    if isinstance(model, SSN) and model.config.dims == 2:
        draw_manipulation(model, some.images[0], out / "manipulation.png")
    if isinstance(model, PHiSeg) and model.config.dims == 2:
        draw_levels(model, some.images[0], out / "levels.png")
    if isinstance(model, HPUNet) and model.config.dims == 2:
        draw_scales(model, some.images[0], out / "scales.png")
        if hidden:
            draw_extrapolation(model, some.images, some.labels[:, 0], out / "extrapolation.png")


def plane(split, case, probs, prediction, error, gamma) -> SimpleNamespace:
    """One case as arrays a picture can show, on the CPU: 1D as a band, of 3D one slice.

    probs (n, K, *S), prediction (K, *S), error and gamma maps (*S) -> image (C, H, W), labels
    (A, H, W) with their weights where they differ, the likeliest first; the others with H, W.
    """
    maps = [x.cpu() for x in (split.images[case], split.labels[case], probs, prediction, error,
                              gamma)]
    if maps[0].dim() == 2:
        maps = [x.unsqueeze(-2).expand(*x.shape[:-1], x.shape[-1] // 2, x.shape[-1]) for x in maps]
    if maps[0].dim() == 4:  # the slice with the most foreground
        marked = (maps[1] > 0) & (maps[1] != IGNORE)
        at = int(marked.sum((0, 2, 3)).argmax())
        maps = [x.select(-3, at) for x in maps]
    image, labels, probs, prediction, error, gamma = maps
    weights = None if split.weights is None else split.weights[case].cpu()
    mean_label = reader_mean(labels, weights)
    if weights is None:
        chosen = torch.arange(min(len(labels), READERS))
    else:
        chosen = weights.argsort(descending=True)[:READERS]
        chosen = chosen[weights[chosen] > 0]
        weights = weights[chosen]
    return SimpleNamespace(name=short_name(split, case), image=image, labels=labels[chosen],
                           weights=weights, probs=probs, prediction=prediction,
                           mean_label=mean_label, error=error, gamma=gamma)


def short_name(split, case: int, most: int = 16) -> str:
    """The end of a case's name, where the names of a set differ, and its number if they do not."""
    ends = [name[-most:] for name in split.names]
    return ends[case] if ends.count(ends[case]) == 1 else f"{ends[case]} ({case})"


def reader_mean(labels, weights) -> torch.Tensor:
    """Share of the readers (A, H, W) that drew any foreground, (H, W)."""
    valid = (labels != IGNORE).float()
    weights = valid if weights is None else valid * weights[:, None, None]
    return (weights * (labels > 0)).sum(0) / weights.sum(0).clamp(min=1e-6)


def draw_samples(path, cases) -> None:
    """Image, readers, prediction and samples of every case, a column each."""
    readers, n = max(len(c.labels) for c in cases), len(cases[0].probs)
    named = [f"reader {i + 1}" if cases[0].weights is None else f"mode {i + 1}"
             for i in range(readers)]
    rows = {"image": [paint_image(c.image) for c in cases]}
    for i, name in enumerate(named):
        rows[name] = [paint_label(c.labels[i], c.image) if i < len(c.labels) else None
                      for c in cases]
    rows["prediction"] = [paint_label(c.prediction.argmax(0), c.image) for c in cases]
    for i in range(n):
        rows[f"sample {i + 1}"] = [paint_label(c.probs[i].argmax(0), c.image) for c in cases]
    notes = {(named[i], column): f"{p:.2f}" for column, c in enumerate(cases)
             if c.weights is not None for i, p in enumerate(c.weights)}
    save_grid(path, rows, [c.name for c in cases], notes)


def draw_overview(path, cases) -> None:
    """`draw_samples` in short, a row a case: four cases, four readers, eight samples."""
    rows = {}
    for c in cases[:: -(-len(cases) // 4)]:
        labels = [paint_label(label, c.image) for label in c.labels[:4]]
        rows[c.name] = [paint_image(c.image), *labels, *[None] * (4 - len(labels))]
        rows[c.name] += [paint_label(p.argmax(0), c.image) for p in c.probs[:8]]
    columns = ["image", *(f"{'reader' if cases[0].weights is None else 'mode'} {i}"
                          for i in range(1, 5)), *(f"sample {i}" for i in range(1, 9))]
    notes = {(c.name, 1 + i): f"{p:.2f}" for c in cases if c.name in rows and c.weights is not None
             for i, p in enumerate(c.weights[:4])}
    save_grid(path, rows, columns, notes, cell=0.8)


def draw_uncertainty(path, cases) -> None:
    """Where readers differ and where samples do, a column a case."""
    rows = {"image": [], "readers:\nforeground": [], "samples:\nforeground": [], "gamma map": [],
            "variance /\nmaximum": []}
    for case in cases:
        probs = case.probs.unsqueeze(1)  # (n, 1, K, H, W)
        pictures = (paint_image(case.image), paint_map(case.mean_label, 1),
                    paint_map(1 - probs.mean(0)[0, 0], 1), paint_map(case.gamma),
                    paint_map(metrics.uncertainty_map(probs)[0], 1))
        for row, picture in zip(rows.values(), pictures):
            row.append(picture)
    save_grid(path, rows, [c.name for c in cases])


def draw_dice(path, values) -> None:
    """SSN's Fig. 5: the samples' Dice of each case, and the share above the prediction's."""
    order = np.argsort(values["dice"], kind="stable")
    order = order[np.linspace(0, len(order) - 1, min(80, len(order))).round().astype(int)]
    low, quarter, median, three, high, predicted, better = (
        values[name][order] for name in (*QUANTILES, "dice", "dice_better"))
    x = np.arange(len(order))
    figure, axes = new_plot(size=(8, 3.6))
    ax = axes[0, 0]
    ax.bar(x, better, width=0.9, color=COLORS[4], alpha=0.6, label="share of samples above the "
           "prediction")
    ax.axhline(values["dice_better"].mean(), color="#666666", linestyle="--", linewidth=1,
               label=f"its mean, {values['dice_better'].mean():.1%}")
    ax.vlines(x, low, high, color=COLORS[1], linewidth=1.2, label="samples: 5% to 95%")
    ax.vlines(x, quarter, three, color=COLORS[5], linewidth=3, label="samples: 25% to 75%")
    ax.plot(x, median, ".", color="white", markersize=2)
    ax.plot(x, predicted, "x", color=COLORS[6], markersize=5, label="prediction")
    ax.set(ylim=(0, 1.02), xlabel="case, by the prediction's Dice", yticks=[0, 0.5, 1])
    ax.set_title(f"Dice of the samples: mean 95% quantile {values['dice_q95'].mean():.3f}, "
                 f"prediction {values['dice'].mean():.3f}", fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=5)
    save_figure(figure, path)


def draw_ged(path, summaries: dict) -> None:
    """GED against the number of samples, a line a run; `summaries`: {name: metrics.json}."""
    figure, axes = new_plot(size=(5, 3.2))
    ax = axes[0, 0]
    for (name, summary), color in zip(summaries.items(), itertools.cycle(LINES)):
        counts = sorted(int(k[4:]) for k in summary if k.startswith("ged_") and k[4:].isdigit())
        geds = [summary[f"ged_{n}"] for n in counts]
        ax.errorbar(counts, [g["mean"] for g in geds], [g["stderr"] for g in geds], label=name,
                    color=color, marker="o", markersize=3, capsize=2)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="samples", ylabel="squared GED", xticks=counts, xticklabels=counts)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)
    save_figure(figure, path)


def draw_modes(path, modes) -> None:
    """Frequencies against known odds: of modes, averaged over cases; and of pixels' classes."""
    odds, frequency = modes.odds.mean(0), modes.frequency.mean(0)
    figure, axes = new_plot(1, 3, size=(9, 2.9))
    bars, modewise, pixelwise = axes[0]
    x = np.arange(len(odds))
    order = np.argsort(-odds, kind="stable")
    bars.bar(x - 0.2, odds[order], 0.4, color=COLORS[7], label="known odds")
    bars.bar(x + 0.2, frequency[order], 0.4, color=COLORS[5], label="share of samples")
    bars.set(xticks=x[:: 1 + len(x) // 16], xticklabels=order[:: 1 + len(x) // 16], xlabel="mode")
    bars.legend(fontsize=7)
    seen = np.concatenate([odds, frequency])
    floor = seen[seen > 0].min() / 2  # where modes that were never drawn are put
    modewise.plot([floor, 2 * seen.max()], [floor, 2 * seen.max()], color=COLORS[7])
    modewise.plot(odds, frequency.clip(floor), "o", color=COLORS[5], markersize=3)
    modewise.set(xscale="log", yscale="log", xlabel="odds of a mode", ylabel="its frequency")
    pixelwise.plot([0, 1], [0, 1], color=COLORS[7])
    pixelwise.plot(*modes.marginal.T, "s", color=COLORS[6], markersize=4)
    pixelwise.set(xlabel="odds of a pixel's class", ylabel="its frequency")
    for ax in (modewise, pixelwise):
        ax.set_aspect("equal")
    figure.suptitle(f"total variation, pooled over cases: {abs(odds - frequency).sum() / 2:.3f}",
                    fontsize=9)
    save_figure(figure, path)


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
    train.write_text(folders[0] / "compare.md", text)
    draw_ged(folders[0] / "compare.png", summaries)
    return text


@torch.no_grad()
def ambiguity(folder, *, path=None, device=None, n=16) -> dict:
    """Can the samples tell which cases the readers disagree on? (Kohl et al. 2018, App. E.)

    A case is ambiguous if a reader marked nothing and another something. It is called so if fewer
    than t of its n samples mark something, with the t that is right most often on the validation
    split. Writes ambiguity.json and ambiguity.png; returns accuracy on the test split, the share
    that the commoner answer would get right, and t.
    """
    folder = Path(folder)
    settings = read_config(folder)["settings"]
    device = device or pick_device()
    model = train.load(folder / "best.pt", device)
    splits = data.load(settings["data"], ("val", "test"), path or settings["path"],
                       **settings["data_args"])
    counts, truth = [], []
    for split in splits:
        if settings["image_size"] is not None:
            split = data.center(split, settings["image_size"])
        marked = [((train.labels_of(logits, 2) > 0).flatten(2).any(2)).sum(0).cpu()
                  for _, logits in train.drawn(model, split.to(device), n)]
        counts.append(torch.cat(marked).numpy())
        drew = ((split.labels > 0) & (split.labels != IGNORE)).flatten(2).any(2)
        there = (split.labels != IGNORE).flatten(2).any(2)
        truth.append(((drew & there).any(1) & (~drew & there).any(1)).numpy())
    right = [((counts[0] < t) == truth[0]).mean() for t in range(n + 2)]
    threshold = int(np.argmax(right))
    result = dict(accuracy=float(((counts[1] < threshold) == truth[1]).mean()),
                  commoner=float(max(truth[1].mean(), 1 - truth[1].mean())),
                  threshold=threshold, samples=n, n=len(truth[1]))
    train.write_text(folder / "ambiguity.json", json.dumps(result, indent=2) + "\n")
    figure, axes = new_plot(size=(5, 3))
    ax = axes[0, 0]
    ax.hist([counts[1][truth[1]], counts[1][~truth[1]]], bins=np.arange(n + 2) - 0.5,
            color=[COLORS[6], COLORS[5]], label=["readers disagree", "readers agree"])
    ax.axvline(threshold - 0.5, color="black", linestyle="--", linewidth=1)
    ax.set(xlabel=f"samples of {n} that mark something", ylabel="test cases")
    ax.set_title(f"accuracy {result['accuracy']:.3f} (commoner answer {result['commoner']:.3f})",
                 fontsize=9)
    ax.legend(fontsize=8)
    save_figure(figure, folder / "ambiguity.png")
    return result


# -------------------------------------------------------------------------- objects by sampling


@torch.no_grad()
def instances(model, split, n=16, alpha=None) -> tuple[dict, list[dict]]:
    """Objects found by sampling (HPU-Net's Algorithm 1 and Appendix H) against the split's ids:
    {name: (N,)}, and a few cases for `draw_instances`.

    rand_error_<n>, ap_<n>, ap50_<n> of the clusters of n samples, with _<alpha> behind it if it is
    given (see hpunet.cluster_instances); an object's confidence is the samples' mean probability,
    over it, of the classes that stand for objects: those from split.fixed up. To other classes it
    is all background, and so are pixels of theirs. rand_error_components: what a deterministic
    network could do, the connected components of the foreground in `predict`. Pixels of id -1
    count nowhere.
    """
    scores, shown, device, first = {}, [], split.images.device, split.fixed
    generator = torch.Generator().manual_seed(0)

    def objects(maps):  # object classes, or ids, from 1; 0 for all else
        return (maps.long() - first + 1).clamp(min=0)

    for part, logits in train.drawn(model, split, n):
        samples = objects(train.labels_of(logits, 2))  # (n, B, H, W)
        foreground = logits.softmax(2)[:, :, first:].sum(2).mean(0)
        boxes = (5, 11) if min(samples.shape[2:]) >= 128 else (3, 7)  # the paper's are for 256
        found = torch.stack([clean_instances(cluster_instances(s, alpha, generator), *boxes,
                                             keep=first == 1)
                             for s in samples.unbind(1)]).to(device)
        parts = metrics.connected_components(
            objects(train.labels_of(model.predict(part.images), 1)) > 0)
        known, truth = part.instances >= 0, objects(part.instances)
        batch = metrics.average_precision(found * known, truth, foreground)
        batch["rand_error"] = metrics.rand_error(found * known, truth)
        batch = {f"{name}_{n}" + f"_{alpha}" * bool(alpha): values
                 for name, values in batch.items()}
        batch["rand_error_components"] = metrics.rand_error(parts * known, truth)
        for name, values in batch.items():
            scores.setdefault(name, []).append(values.double().cpu())
        again = None
        if hasattr(model, "reconstruct"):
            again = objects(train.labels_of(
                model.reconstruct(part.images, part.labels[:, 0].long()), 1))
        for i in range(len(part) if len(shown) < 4 else 0):
            shown.append(dict(name=short_name(part, i), image=part.images[i], found=found[i],
                              truth=truth[i].where(known[i], -1), samples=samples[:, i],
                              again=truth[i] * 0 if again is None else again[i]))
    return {name: torch.cat(values).numpy() for name, values in scores.items()}, shown[:4]


# -------------------------------------------------------------------------- every class by itself


@torch.no_grad()
def per_class(model, split, n=8) -> dict:
    """Dice and 95% Hausdorff distance (pixels) of every foreground class, as (1 + n, N, K - 1).

    First `predict` (the VAE U-Net's prior mode), then n samples, each judged by itself. Reference
    is each case's likeliest reader, the first of equals. NaN where that reader's map lacks the
    class; for the distance also where the prediction does.
    """
    dices, distances = [], []
    for part, logits in train.drawn(model, split, n):
        first = part.odds.argmax(1)
        label = part.labels[torch.arange(len(part), device=first.device), first]  # (B, *S)
        maps = torch.cat([train.labels_of(model.predict(part.images), 1)[None],
                          train.labels_of(logits, 2)])  # (1 + n, B, *S)
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
    train.write_text(path, "\n".join(text) + "\n")


# ------------------------------------------------------------------------- out of distribution


CORRUPTIONS = {"blur": (1, 2, 4, 8), "patch": (5, 10, 20, 40), "noise": (0.25, 0.5, 1, 2)}
UNITS = {"blur": "blur, sigma in pixels", "patch": "patch, % of the side",
         "noise": "noise, in std of the images"}
OOD_CASES, OOD_SAMPLES = 64, 10
MARGIN = 5  # pixels round the predicted foreground that count


def corrupt(images, kind: str, strength: float, seed=0) -> torch.Tensor:
    """Images (B, C, H, W) taken out of their distribution (Bai and Bai 2023, Sec. 4.2).

    blur: Gaussian, sigma of `strength` pixels. patch: a rectangle of `strength` percent of both
    sides, at random, as bright as the image's maximum. noise: white, `strength` times as strong as
    the images vary (std). Places and noise depend on seed and case alone, not on the strength.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "blur":
        radius = math.ceil(4 * strength)
        at = torch.arange(-radius, radius + 1, device=images.device)
        weight = torch.exp(-(at / strength).square() / 2)
        weight = (weight / weight.sum()).view(1, 1, -1, 1)
        rows = reflect_pad(images, [(radius, radius)] * 2).flatten(0, 1).unsqueeze(1)
        return F.conv2d(F.conv2d(rows, weight), weight.mT).view_as(images)
    if kind == "patch":
        images = images.clone()
        height, width = (max(1, round(strength / 100 * side)) for side in images.shape[2:])
        places = torch.rand(len(images), 2, generator=generator).tolist()
        for image, (down, right) in zip(images, places):
            top = int(down * (image.shape[1] - height + 1))
            left = int(right * (image.shape[2] - width + 1))
            image[:, top : top + height, left : left + width] = image.max()
        return images
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return images + strength * images.std() * noise


def as_foreign(images, like) -> torch.Tensor:
    """Images (M, C', H', W') in size, channels, mean and std of `like` (N, C, H, W).

    So that what they show is foreign, not their scale: (M, C, H, W).
    """
    grey = images.mean(1, keepdim=True).expand(-1, like.shape[1], -1, -1)
    same = images if images.shape[1] == like.shape[1] else grey
    same = F.interpolate(same, like.shape[2:], mode="bilinear", antialias=True)
    return (same - same.mean()) / same.std().clamp(min=1e-6) * like.std() + like.mean()


def warning_scores(probs) -> dict:
    """How much an image's samples differ, in one number: probs (n, B, K, H, W) -> two of (B,).

    The mean of a map over the predicted foreground, where the class of highest mean probability is
    not 0, and MARGIN pixels round it in every direction; over the whole image where nothing is
    predicted. variance: over the samples, added over the classes. It is not divided by its maximum,
    as in metrics.uncertainty_map, or the worst pixel of every image would count the same. gamma:
    PHiSeg's map, which also sees what is uncertain within each sample.
    """
    foreground = (train.labels_of(probs.mean(0), 1) > 0).float().unsqueeze(1)
    near = F.max_pool2d(foreground, 2 * MARGIN + 1, 1, MARGIN).flatten(1)  # (B, H*W)
    near = torch.where(near.any(1, keepdim=True), near, torch.ones_like(near))
    maps = {"variance": probs.var(0, correction=0).sum(1), "gamma": metrics.gamma_map(probs)}
    return {name: (m.flatten(1) * near).sum(1) / near.sum(1) for name, m in maps.items()}


@torch.no_grad()
def ood(folder, *, split="test", path=None, foreign=None, device=None) -> dict:
    """Do the samples of corrupted and foreign images differ more than those of the split's own?

    (Bai and Bai 2023, Sec. 4.2.) For every corruption and strength the AUROC of both warning scores
    against the same cases left as they are. foreign: (data set, its path or None) of the foreign
    images; None takes a made set. Writes ood.json, which is returned, ood.csv with every score,
    ood.png and ood_curve.png. Raises UserError for data that are not 2D.
    """
    folder = Path(folder)
    settings = read_config(folder)["settings"]
    device = device or pick_device()
    part = data.load(settings["data"], split, path or settings["path"], **settings["data_args"])
    name, place = foreign or ("organs" if settings["data"] == "shapes" else "shapes", None)
    others = data.load(name, "test", place)
    for owner, images in ((settings["data"], part.images), (name, others.images)):
        if images.dim() != 4:
            raise UserError(f"--ood is for 2D images; those of {owner} have "
                            f"{images.dim() - 2} axes")
    if settings["image_size"] is not None:
        part = data.center(part, settings["image_size"])
    model = train.load(folder / "best.pt", device)
    part = part.subset(spread(len(part), OOD_CASES)).to(device)
    others = as_foreign(others.images[spread(len(others), len(part))].to(device), part.images)

    strengths = [(kind, strength) for kind in CORRUPTIONS for strength in CORRUPTIONS[kind]]
    conditions = [("clean", ""), *strengths, ("foreign", name)]
    marked = ((part.labels > 0) & (part.labels != IGNORE)).flatten(1).sum(1)
    scores, shown = {}, {}  # by condition: {score: (cases,)}, and images for the picture
    progress = train.Progress(len(conditions))
    for kind, strength in conditions:
        images = {"clean": part.images, "foreign": others}.get(kind)
        images = corrupt(part.images, kind, strength) if images is None else images
        cases = replace(part.subset(range(len(images))), images=images)
        batches = [warning_scores(logits.softmax(2))
                   for _, logits in train.drawn(model, cases, OOD_SAMPLES)]
        scores[kind, strength] = {key: torch.cat([b[key] for b in batches]).double().cpu().numpy()
                                  for key in batches[0]}
        rows = range(min(3, len(images))) if kind == "foreign" else [int(marked.argmax())]
        shown[kind, strength] = images[rows]
        progress.update(len(scores), f"{kind} {strength}")

    out = folder if split == "test" else folder / f"{split}-all"
    out.mkdir(exist_ok=True)
    summary = ood_summary(scores)
    train.write_text(out / "ood.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    lines = ["kind,strength,case,variance,gamma"]
    lines += [f"{kind},{strength},{i},{variance:.6g},{gamma:.6g}"
              for (kind, strength), both in scores.items()
              for i, (variance, gamma) in enumerate(zip(both["variance"], both["gamma"]))]
    train.write_text(out / "ood.csv", "\n".join(lines) + "\n")
    draw_ood(out / "ood.png", model, shown)
    draw_ood_curve(out / "ood_curve.png", summary)
    return summary


def ood_summary(scores: dict) -> dict:
    """{"<score>_<kind>_<strength>": {"mean", "stderr", "n"}}, and under "auroc_..." the AUROC.

    scores {(kind, strength): {score: (cases,)}} with ("clean", "") among them. Standard errors are
    those of resampled cases, each with its clean image.
    """
    clean, summary = scores["clean", ""], {}
    for (kind, strength), both in scores.items():
        for score, values in both.items():
            name = f"{score}_{kind}_{strength}".rstrip("_")
            summary[name] = {k: v for k, v in metrics.bootstrap(values).items()
                             if k in ("mean", "stderr", "n")}
            if kind == "clean":
                continue
            rng, again = np.random.default_rng(0), []
            for _ in range(200):
                cases = rng.integers(len(clean[score]), size=len(clean[score]))
                mine = rng.integers(len(values), size=len(values)) if kind == "foreign" else cases
                again.append(metrics.auroc(values[mine], clean[score][cases]))
            summary[f"auroc_{name}"] = {"mean": metrics.auroc(values, clean[score]),
                                        "stderr": float(np.std(again)), "n": len(values)}
    return summary


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices, evenly spread over 0 .. count - 1."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def draw_ood(path, model, shown: dict) -> None:
    """Bai and Bai's Figs. 3, 8 and 9: image, prediction and uncertainty of one case, by strength.

    shown {(kind, strength): images (1, C, H, W)}, the first "clean", the last "foreign" and up to
    three images. Every map of uncertainty is divided by its own maximum.
    """
    images = torch.cat(list(shown.values()))
    probs = model.sample(images, OOD_SAMPLES, torch.Generator(images.device).manual_seed(0))
    probs = probs.float().softmax(2)
    labels, maps = train.labels_of(probs.mean(0), 1), metrics.uncertainty_map(probs)
    cells = [[paint_image(image), paint_label(label, image), paint_map(m, 1)]
             for image, label, m in zip(images, labels, maps)]
    of, foreign = dict(zip(shown, cells)), list(shown)[-1]
    rows, notes = {"as it is": of["clean", ""]}, {}
    for step, strengths in enumerate(zip(*CORRUPTIONS.values()), 1):
        keys = list(zip(CORRUPTIONS, strengths))
        rows[f"strength {step}"] = sum((of[key] for key in keys), [])
        notes |= {(f"strength {step}", 3 * i): f"{kind} {s}" for i, (kind, s) in enumerate(keys)}
    rows[f"foreign:\n{foreign[1]}"] = sum(cells[len(shown) - 1 :], [])
    save_grid(path, rows, ["image", "prediction", "uncertainty"] * len(CORRUPTIONS), notes)


def draw_ood_curve(path, summary: dict) -> None:
    """AUROC against strength, a panel a corruption, and that of foreign images in the title."""
    figure, axes = new_plot(1, len(CORRUPTIONS), size=(8, 2.8))
    for ax, (kind, strengths) in zip(axes[0], CORRUPTIONS.items()):
        for score, color in (("variance", COLORS[5]), ("gamma", COLORS[0])):
            points = [summary[f"auroc_{score}_{kind}_{s}"] for s in strengths]
            ax.errorbar(range(len(points)), [p["mean"] for p in points],
                        [p["stderr"] for p in points], label=score, color=color, marker="o",
                        markersize=3, capsize=2)
        ax.axhline(0.5, color=COLORS[7], linestyle="--", linewidth=1)
        ax.set(ylim=(-0.02, 1.02), xticks=range(len(strengths)), xticklabels=strengths,
               xlabel=UNITS[kind])
    axes[0, 0].set_ylabel("AUROC against clean")
    axes[0, 0].legend(fontsize=7, loc="lower right")
    foreign = [f"{values['mean']:.2f} by {score}" for score in ("variance", "gamma")
               for name, values in summary.items() if name.startswith(f"auroc_{score}_foreign_")]
    figure.suptitle(f"can the samples tell? (foreign images: {', '.join(foreign)})", fontsize=9)
    save_figure(figure, path)


# -------------------------------------------------------------------------- one image of yours


def predict_image(folder, file, *, samples=16, out=None, device=None, seed=0) -> Path:
    """Samples for a picture, a NIfTI file or a patient's folder of BraTS: what they are written to.

    A picture (8 or 16 bits, scaled to [0, 1]) or a NIfTI (of a model of `folder` or `brats` every
    channel brought to mean 0 and deviation 1, as there; else as it is) gives <name>_samples.png:
    image, prediction, every sample's outlines, foreground probability, uncertainty, samples; of a
    volume, the slice with most foreground. Then
        <name>.npz                for a picture: samples uint8 (n, H, W), prediction uint8 (H, W),
                                  probabilities float32 (K, H, W), the samples' mean, and
                                  uncertainty float32 (H, W)
        <name>_samples.nii.gz     and so on, the same four for a NIfTI: with its shape and affine,
                                  n or K as the fourth axis
    Raises UserError or data.DataError where the file and the model do not fit.
    """
    folder, file = Path(folder), Path(file)
    device = device or pick_device()
    model = train.load(folder / "best.pt", device)
    channels, dims = model.config.in_channels, model.config.dims
    taught = read_config(folder)["settings"]["data"]
    image, inside, source = read_image(file, channels, dims, taught)
    if (len(image), image.ndim - 1) != (channels, dims):
        raise UserError(f"{file}: {len(image)} channels of {image.ndim - 1}D; the model of "
                        f"{folder} takes {channels} of {dims}D")
    box = data.bounding_box(inside)
    size, image = image.shape[1:], torch.from_numpy(image[(slice(None), *box)]).float()
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(seed)
        batch, inside = image[None].to(device), torch.from_numpy(inside[box]).to(device)
        probs = model.sample(batch, samples, generator).float().softmax(2)  # (n, 1, K, *S)
        probs *= inside  # elsewhere, where training saw nothing, is background
        probs[:, :, 0] += ~inside
        drawn, mean = probs[:, 0].argmax(1).byte().cpu(), probs.mean(0)[0].cpu()
        prediction = (model.predict(batch)[0].argmax(0).byte() * inside).cpu()
        uncertainty = metrics.uncertainty_map(probs)[0].cpu()
    arrays = dict(samples=drawn, probabilities=mean, prediction=prediction, uncertainty=uncertainty)
    arrays = {name: array.numpy() for name, array in arrays.items()}

    name = file.resolve().name if file.is_dir() else Path(file.name.removesuffix(".gz")).stem
    out = Path(out or folder)
    out.mkdir(parents=True, exist_ok=True)
    if source is None:
        written = out / f"{name}.npz"

        def write(temporary):
            with open(temporary, "wb") as stream:  # given a name, savez would add .npz to it
                np.savez_compressed(stream, **arrays)

        write_atomically(written, write)
    else:
        written = out / f"{name}_samples.nii.gz"
        for kind, array in arrays.items():
            whole = np.zeros(array.shape[: array.ndim - dims] + size, array.dtype)
            whole[:1] = kind == "probabilities"  # beyond the box all is background
            whole[(..., *box)] = array
            data.write_nifti(out / f"{name}_{kind}.nii.gz", whole, source)

    if dims == 3:
        at = int((drawn > 0).sum((0, 2, 3)).argmax())
        image, prediction, mean, uncertainty, drawn = (
            x.select(-3, at) for x in (image, prediction, mean, uncertainty, drawn))
    rows = {"": [paint_image(image), paint_label(prediction, image), paint_outlines(drawn, image),
                 paint_map(1 - mean[0], 1), paint_map(uncertainty, 1)]}
    for i in range(0, len(drawn), 8):
        rows[f"samples\n{i + 1} to {min(i + 8, len(drawn))}"] = [paint_label(sample, image)
                                                               for sample in drawn[i : i + 8]]
    save_grid(out / f"{name}_samples.png", rows,
              ["image", "prediction", "outlines", "foreground", "uncertainty"], cell=1.3)
    return written


def paint_outlines(labels, image) -> torch.Tensor:
    """Where any of the label maps (n, H, W) changes class, over the image: RGB (H, W, 3), the
    brighter the more of them do."""
    edge = torch.zeros(labels.shape, dtype=torch.bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:, :, :-1] |= labels[:, :, :-1] != labels[:, :, 1:]
    share = edge.float().mean(0).unsqueeze(2)
    line = torch.tensor([0.90, 0.62, 0.0])  # the first class's colour
    return torch.lerp(paint_image(image), line.expand(*edge.shape[1:], 3),
                      (share > 0) * (0.3 + 0.7 * share))


def pictures(path: Path) -> list[Path]:
    """`path` itself, if it is a file or a patient's folder of BraTS, or the images in the folder;
    UserError if there is none, or two of one name."""
    if not path.is_dir() or all(any(path.glob(f"*_{kind}.nii*")) for kind in data.BRATS):
        return [path]
    kinds = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".nii", ".nii.gz")
    found = sorted(file for file in path.iterdir() if file.name.lower().endswith(kinds))
    if not found:
        raise UserError(f"--image {path}: no image in this folder ({', '.join(kinds)})")
    names = [Path(file.name.removesuffix(".gz")).stem for file in found]
    for name, file in zip(names, found):
        if names.count(name) > 1:
            raise UserError(f"--image {path}: {file.name} and another file share the name {name}, "
                            "and so would their results; rename one")
    return found


def read_image(file: Path, channels: int, dims: int, taught: str):
    """(array (C, *S); where (*S) a model of the data set `taught` has something to say, not in the
    air of BraTS; the nibabel image it came from, or None)."""
    if file.is_dir():
        image, inside, source = data.read_brats(file)
    elif data.is_nifti(file):
        if not file.exists():
            raise UserError(f"{file}: no such file")
        image, source = data.read_nifti(file, dims)
        inside = (image != 0).any(0)
        if taught != "brats" or not inside.any():
            inside = np.ones(image.shape[1:], bool)
    else:
        image = read_picture(file, channels)
        return image, np.ones(image.shape[1:], bool), None
    if taught in ("brats", "folder"):
        image = data.standardised(image, inside)
    return image, inside, source


def read_picture(file: Path, channels: int) -> np.ndarray:
    """(C, H, W) float32 in [0, 1], C = 3 if the model takes 3 channels, else 1; UserError if it is
    not a picture."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            if channels == 3:
                picture = picture.convert("RGB")
            elif picture.mode not in ("L", "F") and not picture.mode.startswith("I"):
                picture = picture.convert("L")
            array = np.asarray(picture)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{file}: not a picture that Pillow reads ({error})") from error
    scale = {"uint8": 255.0, "uint16": 65535.0, "int32": 65535.0}.get(str(array.dtype), 1.0)
    array = array.astype(np.float32) / scale
    return np.ascontiguousarray(array.transpose(2, 0, 1)) if channels == 3 else array[None]


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
        device, _, world = train.start_processes(args.device)
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
