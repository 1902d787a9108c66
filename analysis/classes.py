"""Every class by itself: Dice and 95% Hausdorff distance, of images or of whole volumes that were
segmented slice by slice (VAE U-Net's Tables 2 and 3)."""

import csv
import io
import re
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import metrics
from analysis.scores import each_annotator, seeded_by_name
from common import IGNORE
from models import labels_of, sample_batches
from sources.base import Split
from sources.files import DataError, write_text

SAMPLES = 8  # of a case that are judged by themselves
# Names of slices: by `folder` with slices=axial, the same once exported to files, and by `synapse`.
SLICE = re.compile(r"(.+)(?:[/_]z\d{4,}|_slice\d{3,})")


@torch.no_grad()
def volume_rows(model, split, labels, n) -> dict:
    """`class_rows` of volumes, (V, 1 + n, K - 1) arrays, and their "volumes" and "groups", (V,)
    arrays of names. A slice is of the volume that its name begins with, see `SLICE`.

    split: slices (N, C, H, W), those of a volume in its order; labels (N, A, H', W'), the
    annotations at the size at which they are judged, to which the predictions are resized. Raises
    DataError where a name is not that of a slice.
    """
    rows, volumes = [], []
    for name in split.names:
        match = SLICE.fullmatch(name)
        if not match:
            raise DataError("--per-volume needs slices of volumes, named VOLUME/z0000 (as by "
                            f"slices=axial) or VOLUME_z0000, and there is a case {name[:99]!r}; "
                            "rename the cases, or leave --per-volume out")
        volumes.append(match[1])
    groups = dict(zip(volumes, split.groups))
    for name in groups:
        slices = [i for i, other in enumerate(volumes) if other == name]
        part, maps = split.subset(slices), []
        for batch, chunks in sample_batches(model, part, n):
            prediction = labels_of(model.predict(batch.images), 1)
            maps.append(torch.cat([prediction[None], *(labels_of(x, 2) for x in chunks)]))
        label = labels[slices].to(maps[0].device).transpose(0, 1)  # (A, D, H', W')
        maps = F.interpolate(torch.cat(maps, 1), label.shape[2:], mode="nearest-exact")
        weights = None if part.weights is None else part.weights.mean(0, keepdim=True)
        volume = Split(part.images[:1], label[None], weights, [name], split.num_classes, [name])
        rows.append(class_rows(volume, maps[:1], maps[1:, None], n))
    found = {key: np.concatenate([row[key].cpu().numpy() for row in rows]) for key in rows[0]}
    return found | dict(volumes=np.array(list(groups)), groups=np.array(list(groups.values())))


def class_rows(batch, prediction, samples, most: int = SAMPLES) -> dict:
    """class_dice and class_hd95 (pixels) of every foreground class, (B, 1 + n, K - 1).

    First of the label map `prediction` (B, *S), then of `most` samples (n, B, *S), each by itself:
    the mean over the annotators (of `each_annotator`) who marked the class, by their weights. NaN
    where none did; for the distance also where the prediction lacks the class. (The code of VAE
    U-Net's paper, of one annotator, gives a class that is missing in either a Dice of 1 and a
    distance of 0.)
    """
    maps, sums = torch.cat([prediction[None], samples[:most]]), {}
    on_host = maps.cpu()  # a GPU would wait for every surface, and is slow at distances of points
    for label, weight in each_annotator(batch, seeded_by_name(batch)):
        distance = torch.stack([metrics.hausdorff95(m, label.cpu(), batch.num_classes)
                                for m in on_host], 1).to(label.device)  # (B, 1 + n, K - 1)
        marked = torch.stack([(label == k).flatten(1).any(1)
                              for k in range(1, batch.num_classes)], 1)[:, None]
        dices = []
        for k in range(1, batch.num_classes):
            only_k = torch.where(label == IGNORE, IGNORE, label == k).byte()[:, None]
            dices.append(metrics.Pairs((maps == k).byte(), only_k).sample_dice().T)
        dice = torch.stack(dices, 2)  # (B, 1 + n, K - 1)
        for name, values in (("class_dice", dice), ("class_hd95", distance)):
            given = (weight.view(-1, 1, 1) * (marked & ~values.isnan())).double()
            total, of = sums.get(name, (0, 0))
            sums[name] = total + given * values.double().nan_to_num(), of + given
    return {name: total / of for name, (total, of) in sums.items()}


def write_classes(path, rows: dict) -> None:
    """A CSV file: a line for each kind of prediction and class, and for the classes' mean.

    The mode predict is the deterministic prediction, sample_1 the first sample. A sample's Dice of
    a class is its mean over the cases that have the class; the lines of the mode samples hold mean
    and standard deviation of that over the samples. missed: cases of the class in which nothing of
    it was predicted, so that they have no distance. Of volumes, `write_volumes` writes another file
    beside it, whose name ends in _case.csv.
    """
    dice, distance = rows["class_dice"], rows["class_hd95"]  # (N, 1 + n, K - 1)
    with warnings.catch_warnings():  # of a class no case has, all is NaN: empty in the table
        warnings.simplefilter("ignore", RuntimeWarning)
        means = [np.nanmean(values, 0) for values in (dice, distance)]  # (1 + n, K - 1)
        means = [np.c_[mean, np.nanmean(mean, 1)] for mean in means]  # (1 + n, K)
    cases = (~np.isnan(dice[:, 0])).sum(0)
    missed = (np.isnan(distance) & ~np.isnan(dice)).sum(0)  # (1 + n, K - 1)
    lines = ["mode,class,dice,dice_deviation,hd95,hd95_deviation,cases,missed"]
    modes = {"predict": slice(0, 1), "samples": slice(1, None)}
    modes |= {f"sample_{i}": slice(i, i + 1) for i in range(1, dice.shape[1])}
    for mode, which in modes.items():
        for k in range(len(cases) + 1):
            last = k == len(cases)
            cells = [mode, "mean" if last else str(k + 1)]
            for mean in means:
                column = mean[which, k]
                column = column[~np.isnan(column)]  # samples that lack the class have no distance
                cells += [f"{column.mean():.6g}" if len(column) else ""]
                cells += [f"{column.std():.6g}" if len(column) and mode == "samples" else ""]
            cells += ["", ""] if last else [str(cases[k]), f"{missed[which, k].mean():.6g}"]
            lines.append(",".join("" if cell == "nan" else cell for cell in cells))
    write_text(path, "\n".join(lines) + "\n")
    if "volumes" in rows:
        write_volumes(Path(path).with_name(f"{Path(path).stem}_case.csv"), rows)


def write_volumes(path, rows: dict) -> None:
    """A CSV file: a line for each volume, from the `volume_rows`, with its name and group, Dice and
    Hausdorff distance of every class of the deterministic prediction, and their means over the
    samples in which they are defined. A field is empty where nothing is defined."""
    header, columns = ["name", "group"], [rows["volumes"], rows["groups"]]
    for name in ("dice", "hd95"):
        values = rows[f"class_{name}"]  # (V, 1 + n, K - 1)
        with warnings.catch_warnings():  # of samples that all lack a class
            warnings.simplefilter("ignore", RuntimeWarning)
            means = np.nanmean(values[:, 1:], 1)
        for ending, table in (("", values[:, 0]), ("_samples", means)):  # (V, K - 1) each
            for k, column in enumerate(table.T, 1):
                header.append(f"{name}_class_{k}{ending}")
                columns.append(["" if np.isnan(value) else f"{value:.6g}" for value in column])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *zip(*columns)])
    write_text(path, text.getvalue())
