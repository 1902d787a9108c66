"""Every class by itself: Dice and 95% Hausdorff distance (VAE U-Net's Table 2)."""

import warnings

import numpy as np
import torch

import metrics
from common import IGNORE
from sources.files import write_text

SAMPLES = 8  # that are judged by themselves, at most


def class_rows(batch, prediction, samples) -> dict:
    """class_dice and class_hd95 (pixels) of every foreground class, (B, 1 + n, K - 1).

    First of the label map `prediction` (B, *S), then of samples (n, B, *S), each by itself. The
    reference is each case's likeliest annotator, the first of equals. NaN where the reference lacks
    the class; for the distance also where the prediction does.
    """
    likeliest = batch.probabilities.argmax(1)
    label = batch.labels[torch.arange(len(batch), device=likeliest.device), likeliest]  # (B, *S)
    maps = torch.cat([prediction[None], samples[:SAMPLES]])
    distance = torch.stack([metrics.hausdorff95(m, label, batch.num_classes) for m in maps], 1)
    dice = torch.full_like(distance, np.nan)
    for k in range(1, batch.num_classes):
        reference = torch.where(label == IGNORE, IGNORE, label == k).byte()
        absent = (label != k).flatten(1).all(1)
        scores = metrics.sample_dice((maps == k).byte(), reference[:, None]).T  # (B, 1 + n)
        dice[:, :, k - 1] = scores.masked_fill(absent[:, None], np.nan)
        distance[absent, :, k - 1] = np.nan
    return {"class_dice": dice.double(), "class_hd95": distance.double()}


def write_classes(path, rows: dict) -> None:
    """per_class.csv: a line for each kind of prediction and class, and for their mean.

    A sample's Dice of a class is its mean over the cases that have the class; the line of the
    samples holds mean and standard deviation of that over the samples. missed: cases of the class
    in which nothing of it was predicted, so that they have no distance.
    """
    dice, distance = rows["class_dice"], rows["class_hd95"]  # (N, 1 + n, K - 1)
    with warnings.catch_warnings():  # of a class no case has, all is NaN: empty in the table
        warnings.simplefilter("ignore", RuntimeWarning)
        means = [np.nanmean(values, 0) for values in (dice, distance)]  # (1 + n, K - 1)
        means = [np.c_[mean, np.nanmean(mean, 1)] for mean in means]  # (1 + n, K)
    cases = (~np.isnan(dice[:, 0])).sum(0)
    missed = (np.isnan(distance) & ~np.isnan(dice)).sum(0)  # (1 + n, K - 1)
    lines = ["mode,class,dice,dice_deviation,hd95,hd95_deviation,cases,missed"]
    for mode, which in (("predict", slice(0, 1)), ("samples", slice(1, None))):
        for k in range(len(cases) + 1):
            last = k == len(cases)
            cells = [mode, "mean" if last else str(k + 1)]
            for mean in means:
                column = mean[which, k]
                cells += [f"{column.mean():.6g}"]
                cells += [f"{column.std():.6g}" if mode == "samples" else ""]
            cells += ["", ""] if last else [str(cases[k]), f"{missed[which, k].mean():.6g}"]
            lines.append(",".join("" if cell == "nan" else cell for cell in cells))
    write_text(path, "\n".join(lines) + "\n")
