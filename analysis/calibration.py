"""Do label maps appear as often as their known probability says?"""

import numpy as np
import torch

import metrics
from analysis.pictures import COLORS, new_plot, save_figure
from analysis.uncertainty import BINS, annotators_mean, sums_by


def mode_rows(batch, samples) -> dict:
    """What the following functions need of every case, {name: (B, ...)}; samples (n, B, *S).

    mode_frequency and mode_probability (B, M) are the share of samples nearest to each mode (Kohl
    et al. 2018, App. C) and its known probability. pixel_bins (B, BINS, 3) sorts the pixels'
    foreground classes by their known probability, 0 and 1 left out: the sum of the probabilities,
    that of the share of samples, and how many there are.
    """
    known, _ = annotators_mean(batch.labels, batch.num_classes, batch.probabilities)
    known = known[:, 1:].flatten(1)
    share = torch.stack([(samples == k).float().mean(0) for k in range(1, batch.num_classes)], 1)
    uncertain = (known > 1e-4) & (known < 1 - 1e-4)
    row = torch.where(uncertain, (known * BINS).long(), BINS)
    return {"mode_frequency": metrics.mode_frequencies(samples, batch.labels, batch.num_classes),
            "mode_probability": batch.probabilities,
            "pixel_bins": sums_by(row, [known, share.flatten(1)], BINS)}


def total_variation(rows: dict) -> np.ndarray:
    """Total variation between the modes drawn for a case and their probabilities, (N,)."""
    return abs(rows["mode_frequency"] - rows["mode_probability"]).sum(1) / 2


def pooled(rows: dict, n: int, groups) -> dict:
    """The entries mode_pooled_tv_<n> and mode_gap_<n> of metrics.json, with standard errors by
    resampling the cases' groups (N,)."""
    excess, draws = rows["mode_frequency"] - rows["mode_probability"], metrics.resampled(groups)
    cases = len(excess)
    again = abs(draws @ excess / draws.sum(1, keepdims=True))  # (200, M)
    mean = abs(excess.mean(0))
    return {f"mode_pooled_tv_{n}": {"mean": mean.sum() / 2, "n": cases,
                                    "stderr": np.std(again.sum(1) / 2)},
            f"mode_gap_{n}": {"mean": mean.max(), "stderr": np.std(again.max(1)), "n": cases}}


def pixel_curve(rows: dict) -> np.ndarray:
    """In every bin, the mean known probability of a pixel's class and the mean share of samples,
    (BINS, 2); NaN where a bin is empty."""
    bins = rows["pixel_bins"].sum(0)
    with np.errstate(invalid="ignore"):
        return bins[:, :2] / bins[:, 2:]


def plot_modes(path, rows: dict) -> None:
    """Draw frequencies against known probabilities, of modes over all cases and of pixels' classes.
    """
    known, frequency = rows["mode_probability"].mean(0), rows["mode_frequency"].mean(0)
    figure, (modewise, pixelwise) = new_plot(1, 2, size=(6, 3))
    both = np.concatenate([known, frequency])
    floor = both[both > 0].min() / 2  # where modes that were never drawn are put
    modewise.plot([floor, 2 * both.max()], [floor, 2 * both.max()], color=COLORS[7])
    modewise.plot(known, frequency.clip(floor), "o", color=COLORS[5], markersize=3)
    modewise.set(xscale="log", yscale="log", xlabel="probability of a mode", ylabel="frequency")
    pixelwise.plot([0, 1], [0, 1], color=COLORS[7])
    pixelwise.plot(*pixel_curve(rows).T, "s", color=COLORS[6], markersize=4)
    pixelwise.set(xlabel="probability of a pixel's class", ylabel="frequency")
    for ax in (modewise, pixelwise):
        ax.set_aspect("equal")
    figure.suptitle(f"total variation, pooled over cases: {abs(known - frequency).sum() / 2:.3f}",
                    fontsize=9)
    save_figure(figure, path)
