"""Is the uncertainty right? Calibration, failure detection, and sets of samples against annotators.

Calibration of the mean of the samples' probabilities, p, against the annotators' mean, q, for every
foreground class at every pixel that an annotator labelled:
    ece            |mean p - mean q| in 20 equally wide bins of p, averaged by pixels (Naeini et al.
                   2015). Over all pixels it is small wherever background is easy.
    ..._foreground where p or q is above 0.05; ..._band: where p or q lies between 0.05 and 0.95.
                   With few annotators, both are too high, because q also selects the pixels.
    brier          mean over pixels of sum_k E_y (p_k - y_k)^2, all classes (Brier 1950): 0 to 2
CURVAS and torchmetrics' multiclass ECE bin the confidence of the likeliest class, background
included, in 50 bins (CURVAS; 5 at first) and 15: do not compare with these. Samples too few for a
smooth p raise ece, so compare it for the same number of samples. Halve brier for the Brier score of
two classes.

Failure detection: does an image's score tell how wrong the mean prediction is (1 - dice_mean)?
    aurc           area under the mean risk of the k images of lowest score, as a function of k;
                   e_aurc: minus the aurc of the ideal order (Geifman et al. 2019)
    augrc          the same with the risk divided by all images, not by those kept (Traub et al.
                   2024): 0 to 0.5
The scores are variance, entropy and mutual_information, each the highest mean of its map over a
window of 10 pixels (in per_case.csv: ..._patch), as in ValUES (Kahl et al. 2024), so that the score
does not grow with the object; and disagreement, 1 - Dice of samples and mean prediction, like the
pairwise Dice of Zenk et al. (2025). aurc and augrc contain the mean risk. e_aurc does not, but it
grows with the spread of the risks, and is 0 where all images are equally wrong: read it beside
dice_mean. Compare models on the same images only.

Sets, some for the first n samples. dice_max and dice_match grow with n: compare them for one n. So
do others that do not name n: volume_crps, of all n samples, is too high by E|V - V'| / 2n.
    dice_max       mean over annotators of the best sample's Dice: D_max (maximum Dice matching) of
                   CIMD (Rahman et al. 2023) and P2SAM; Dice_max_reverse in D-Persona's code
    dice_match     every annotator has a sample of its own: D-Persona's Dice_match (Wu et al. 2024)
    dice_soft      Dice of p and q above 0.1, 0.3, 0.5, 0.7 and 0.9, mean: D-Persona's Dice_soft
    volume_crps    CRPS of the foreground's volume in pixels, from all samples, mean over annotators
                   (CURVAS's CRPS is another: of the annotators' volumes against the sum of p)
Where a set weights its label maps, the means over annotators are weighted too.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

import metrics
from analysis.pictures import COLORS, LINES, new_plot, save_figure
from common import IGNORE

BINS = 20
REGIONS = ("", "_foreground", "_band")
SURE = 0.05  # a class is ruled out below this probability, and certain above 1 - SURE
WINDOW = 10  # pixels a side; ValUES's
SCORES = ("variance_patch", "entropy_patch", "mutual_information_patch", "disagreement")


# ---- measures of each case ----------------------------------------------------------------------

def annotators_mean(labels, num_classes, weights):
    """q (B, K, *S): the share, by weights (B, A) that add up to 1, of those annotators who do not
    ignore the pixel; and where there is one (B, *S) bool, elsewhere q is 0. labels (B, A, *S)."""
    weights = weights.view(*weights.shape, *[1] * (labels.dim() - 2))
    mean = torch.stack([(weights * (labels == k)).sum(1) for k in range(num_classes)], 1)
    total = (weights * (labels != IGNORE)).sum(1, keepdim=True)
    return mean / total.clamp(min=1e-12), total[:, 0] > 0


def set_measures(pairs, n, counts):
    """dice_max and dice_match for each of `counts`, volume_crps of the first n maps of
    metrics.Pairs: {name: (B,)}."""
    weights = pairs.weights
    dice = pairs.dice[:, :, pairs.n :, :n].mean(0)  # (B, A, n)
    out = {}
    for m in counts:
        out[f"dice_max_{m}"] = (weights * dice[:, :, :m].amax(2)).sum(1)
    value = F.pad(weights[:, :, None].nan_to_num() * dice, (0, 0, 0, 1)).double().cpu().numpy()
    known = (weights > 0).double().cpu().numpy()
    for m in counts:
        # Every annotator receives one sample (a mass of 1/m); an added one receives all others, at
        # value 0. With fewer samples than annotators, there is no such matching.
        rest = 1 - known.sum(1, keepdims=True) / m
        takes = np.where((rest < -1e-9) | (rest > 1 - 1e-9), math.nan, np.c_[known / m, rest])
        matched = metrics.transport(value[:, :, :m], takes.clip(0))
        out[f"dice_match_{m}"] = torch.from_numpy(m * matched).to(weights)
    size = pairs.size.sum(0).double()  # (B, N, N), of all foreground classes
    drawn = size[:, :n, pairs.n :].sort(1).values  # (B, n, A), where the annotator labelled
    truth = size.diagonal(dim1=1, dim2=2)[:, pairs.n :]  # (B, A)
    rank = (2 * torch.arange(n, device=drawn.device) + 1 - n)[:, None] / n**2
    crps = abs(drawn - truth[:, None]).mean(1) - (rank * drawn).sum(1)  # less E|V - V'| / 2
    return out | {"volume_crps": (weights * crps).sum(1)}


def pixel_measures(probs, labels, weights):
    """What compares p, probs (B, K, *S), with the annotators' mean: {name: (B,)}, and
    "reliability" (B, regions, BINS, 3): sums of p, of q, and pixels, by p."""
    q, valid = annotators_mean(labels, probs.shape[1], weights)
    p, q, valid = probs.flatten(2), q.flatten(2), valid.flatten(1)  # (B, K, P), (B, P)
    pixels = valid.sum(1).where(valid.any(1), math.nan)
    out = {"brier": ((1 + (p * (p - 2 * q)).sum(1)) * valid).sum(1) / pixels}
    p, q = (x[:, 1:] * valid[:, None] for x in (p, q))
    dices = []
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        a, b = p > threshold, q > threshold + 1e-6  # three of ten is not above 0.3
        dices.append((2 * (a & b).sum(2) / (a.sum(2) + b.sum(2))).nan_to_num(nan=1.0).mean(1))
    out["dice_soft"] = torch.stack(dices).mean(0) + 0 * pixels

    unsure = [(x > SURE) & (x < 1 - SURE) for x in (p, q)]
    region = ((p > SURE) | (q > SURE)).long() + (unsure[0] | unsure[1])
    row = region * BINS + (p * BINS).long().clamp(max=BINS - 1)
    row = torch.where(valid[:, None], row, 3 * BINS)  # a row for what does not count
    sums = sums_by(row.flatten(1), [p.flatten(1), q.flatten(1)], 3 * BINS)
    sums = sums.view(len(p), 3, BINS, 3)
    return out | {"reliability": sums.flip(1).cumsum(1).flip(1)}  # one region holds the next


def sums_by(row, values, rows):
    """Sums of values [(B, P)] and, last, of ones, by row (B, P), as (B, rows, values + 1) float64;
    what is of the row `rows` is left out."""
    flat = (row + (rows + 1) * torch.arange(len(row), device=row.device)[:, None]).flatten()
    sums = [flat.bincount(value.flatten().double(), len(row) * (rows + 1))
            for value in (*values, torch.ones_like(row))]
    return torch.stack(sums, 1).view(len(row), rows + 1, -1)[:, :rows]


def score_measures(moments, labels):
    """What needs no annotator, over pixels that one labelled: entropy, expected_entropy and
    mutual_information, means in nats a pixel, and the scores of the most uncertain window, (B,)."""
    valid = (labels != IGNORE).any(1)
    maps = {"variance": moments.variance, "entropy": metrics.entropy_map(moments),
            "expected_entropy": moments.mean_entropy,
            "mutual_information": metrics.mutual_information_map(moments)}
    maps = {name: values * valid for name, values in maps.items()}
    pixels = valid.flatten(1).sum(1)
    out = {name: maps[name].flatten(1).sum(1) / pixels for name in maps if name != "variance"}
    return out | {name: worst_window(maps[name.removesuffix("_patch")]) for name in SCORES[:3]}


def worst_window(maps, side=WINDOW):
    """The highest mean of maps (B, *S) over a window, or over the whole of a shorter axis, (B,)."""
    for axis in range(1, maps.dim()):
        maps = maps.unfold(axis, min(side, maps.shape[axis]), 1).mean(-1)
    return maps.flatten(1).amax(1)


# ---- measures of a whole split ------------------------------------------------------------------

def calibration(reliability, groups) -> dict:
    """ece of each region, from the "reliability" of all cases (N, regions, BINS, 3), with standard
    errors by resampling their groups (N,)."""
    cases, out = len(reliability), {}
    again = np.tensordot(metrics.resampled(groups), reliability, 1)  # (200, regions, BINS, 3)
    sums = np.concatenate([reliability.sum(0)[None], again])
    for i, region in enumerate(REGIONS):
        first, *others = map(calibration_error, sums[:, i])
        if not math.isnan(first):
            out["ece" + region] = {"mean": first, "stderr": np.nanstd(others), "n": cases}
    return out


def calibration_error(sums) -> float:
    """ECE in BINS equally wide bins, from sums (BINS, 3) of p, of q, and pixels; or NaN."""
    gap, total = abs(sums[:, 0] - sums[:, 1]).sum(), sums[:, 2].sum()
    return gap / total if total else math.nan


def risk_coverage(scores, risks):
    """The summed risk of the 1 .. n images of lowest score, divided by their number and by that of
    all images: two curves (n,), averaged over all orders of images of equal score."""
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    mean = np.bincount(group, risks) / size
    kept = np.cumsum(np.repeat(mean, size))
    return kept / np.arange(1, len(kept) + 1), kept / len(kept)


def areas(scores, risks) -> tuple[float, float, float]:
    """AURC, its excess over that of the ideal order, and AUGRC, by trapezoids as in Traub et al.'s
    code where no scores tie: at coverage 0, the risk is that of the first image, and 0 for AUGRC.
    """
    risk, general = risk_coverage(scores, risks)
    ideal, _ = risk_coverage(risks, risks)
    aurc, least, augrc = ((curve.sum() + (start - curve[-1]) / 2) / len(risks) for start, curve in
                          ((risk[0], risk), (ideal[0], ideal), (0, general)))
    return aurc, aurc - least, augrc


def failure_detection(values, groups) -> dict:
    """aurc_<score>, e_aurc_<score> and augrc_<score> of the cases' values {name: (N,)}, with
    standard errors by resampling their groups (N,)."""
    there = ~np.isnan(values["dice_mean"])
    groups = [group for group, kept in zip(groups, there) if kept]
    risks, out = 1 - values["dice_mean"][there], {}
    if not len(risks):
        return {}
    for score in SCORES:
        scores = values[score][there]
        again = [areas(np.repeat(scores, times), np.repeat(risks, times))
                 for times in metrics.resampled(groups)]
        ending = score.removesuffix("_patch")
        for name, mean, error in zip(("aurc", "e_aurc", "augrc"), areas(scores, risks),
                                     np.std(again, 0)):
            out[f"{name}_{ending}"] = {"mean": mean, "stderr": error, "n": len(risks)}
    return out


# ---- pictures -----------------------------------------------------------------------------------

def plot_reliability(path, reliability) -> None:
    """Draw the annotators' mean against p in BINS equally wide bins, and how many pixels they hold.
    """
    sums = reliability.sum(0)  # (regions, BINS, 3)
    figure, (curve, counts) = new_plot(1, 2, size=(6.4, 3.2))
    curve.plot([0, 1], [0, 1], color=COLORS[7])
    colors = COLORS[5], COLORS[6], COLORS[2]
    for (p, q, pixels), region, color in zip(sums.transpose(0, 2, 1), REGIONS, colors):
        some = pixels > 0
        label = region.strip("_") or "all pixels"
        error = abs(p - q).sum() / max(pixels.sum(), 1)
        curve.plot(p[some] / pixels[some], q[some] / pixels[some], "o-", color=color, markersize=3,
                   label=f"{label}: ECE {error:.3f}")
        counts.step((np.arange(BINS) + 0.5) / BINS, pixels, where="mid", color=color, label=label)
    curve.set(xlabel="mean of the samples' probabilities", ylabel="mean of the annotators")
    counts.set(yscale="log", xlabel="mean of the samples' probabilities", ylabel="pixels")
    curve.legend(fontsize=7)
    save_figure(figure, path)


def plot_risk_coverage(path, values) -> None:
    """Draw 1 - Dice of the images that are kept, by every score and in the ideal order."""
    there = ~np.isnan(values["dice_mean"])
    risks = 1 - values["dice_mean"][there]
    figure, ax = new_plot(size=(5, 3.4))
    share = np.arange(1, len(risks) + 1) / max(len(risks), 1)
    for name, color in zip((*SCORES, "ideal"), LINES):
        scores = risks if name == "ideal" else values[name][there]
        label = name.removesuffix("_patch").replace("_", " ")
        ax.plot(share, risk_coverage(scores, risks)[0], label=label, color=color,
                linestyle="--" if name == "ideal" else "-", marker="." if len(share) < 30 else "")
    ax.set(xlabel="share of the images that is kept", ylabel="their mean 1 - Dice")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=7)
    save_figure(figure, path)
