"""All measures of a batch of cases, from samples that are drawn and gone through once, and how
batches and processes are put together."""

import itertools
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import metrics
from analysis.uncertainty import pixel_measures, score_measures, set_measures
from common import IGNORE
from models import labels_of
from sources.base import Split


@dataclass
class Drawn:
    """A batch, what the model predicts for it, and what is kept of its samples."""

    batch: Split
    prediction: Tensor  # (B, *S) uint8, the label map of `predict`
    hard: Tensor  # (n, B, *S) uint8, the samples' label maps
    moments: metrics.Moments  # of the samples' probabilities
    ncc: dict  # {"ncc_<m>": (B,)} of the first m samples


def draw(model, batch, chunks, samples) -> Drawn:
    """Go once through a batch's samples, chunks of logits (m, B, K, *S), and keep their label maps
    and moments. Only one sample's probabilities are in memory at a time."""
    moments, hard, ncc = metrics.Moments(), [], {}
    for logits in chunks:
        for sample in logits:
            hard.append(labels_of(sample, 1))
            moments.add(sample.softmax(1))
            if moments.count in samples:
                ncc[f"ncc_{moments.count}"] = metrics.ncc(moments, batch.labels, batch.weights)
    prediction = labels_of(model.predict(batch.images), 1)
    return Drawn(batch, prediction, torch.stack(hard), moments, ncc)


def measure(model, drawn, samples, likelihood_samples) -> dict:
    """The measures of a batch of cases, {name: (B,)}, and what `uncertainty.calibration` needs of
    them, {"reliability": (B, ...)}."""
    batch, (classes, empty) = drawn.batch, scoring(drawn.batch)
    mean = labels_of(drawn.moments.mean, 1)
    labels = only_scored(batch, batch.labels)
    maps = torch.cat([drawn.hard, drawn.prediction[None], mean[None]])
    pairs = metrics.Pairs(only_scored(batch, maps), labels, classes, batch.weights, empty)
    out, n = pairs.sample_scores(samples) | drawn.ncc, len(drawn.hard)
    out["ged_predict"] = pairs.ged(slice(n, n + 1))
    dices = pairs.sample_dice()  # (n + 2, B)
    out["dice"], out["dice_mean"] = dices[n], dices[n + 1]
    out["dice_present"] = pairs.dice_present(n)
    if classes > 2:  # as in SSN's Table 2, whose whole tumour is any of three classes
        prediction, marked = (torch.where(m == IGNORE, m, (m > 0).byte())
                              for m in (only_scored(batch, drawn.prediction), labels))
        out["dice_foreground"] = metrics.dice(prediction, marked, 2, batch.weights)
    most = max(samples)
    out["disagreement"] = 1 - pairs.dice[:, :, n + 1, :most].mean((0, 2))
    dices = dices[:most]
    out["dice_better"] = (dices > out["dice"]).double().mean(0)
    for percent in (5, 25, 50, 75, 95):
        out[f"dice_q{percent:02}"] = dices.quantile(percent / 100, dim=0)
    out |= set_measures(pairs, most, samples)
    probs = drawn.moments.mean
    if batch.scored:
        scored = probs[:, list(batch.scored)]
        probs = torch.cat([1 - scored.sum(1, keepdim=True), scored], 1)
    out |= pixel_measures(probs, labels, pairs.weights)
    out |= score_measures(drawn.moments, batch.labels)
    return out | likelihoods(model, batch, likelihood_samples)


def sample_ged(batch, hard) -> Tensor:
    """GED of a batch of cases from the samples' label maps (n, B, *S), (B,)."""
    classes, empty = scoring(batch)
    labels = only_scored(batch, batch.labels)
    return metrics.ged(only_scored(batch, hard), labels, classes, batch.weights, empty)


def scoring(split) -> tuple[int, float]:
    """The number of classes in the maps of `only_scored`, and the IoU of a class that is absent in
    both maps."""
    classes = 1 + len(split.scored) if split.scored else split.num_classes
    # where the papers average over a few of many classes, absent ones are left out
    return classes, float("nan") if split.scored or split.instances is not None else 1.0


def only_scored(split, maps):
    """Label maps whose classes are those that the split's paper averages over, counted from 1; all
    others are 0, and 255 stays."""
    if not split.scored:
        return maps
    table = torch.zeros(256, dtype=torch.uint8, device=maps.device)
    table[list(split.scored)] = torch.arange(1, 1 + len(split.scored), device=maps.device).byte()
    table[IGNORE] = IGNORE
    return table[maps.long()]


def seeded_by_name(batch) -> torch.Generator:
    """A generator that depends on the name of the batch's first case only."""
    seed = zlib.crc32(batch.names[0].encode(errors="replace"))
    return torch.Generator(batch.labels.device).manual_seed(seed)


def each_annotator(batch, generator):
    """Yield every annotator's label maps (B, *S) with their weights (B,); of more than 8 annotators
    or label maps a case, two that are drawn by their weights."""
    weights = batch.probabilities  # (B, A)
    annotators = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
    if weights.shape[1] > 8:
        annotators = torch.multinomial(weights, 2, replacement=True, generator=generator)  # (B, 2)
        weights = torch.full_like(weights[:, :2], 0.5)
    rows = torch.arange(len(batch), device=weights.device)
    for annotator, weight in zip(annotators.T, weights.T):
        yield batch.labels[rows, annotator], weight


def likelihoods(model, batch, n) -> dict:
    """The measures that need the annotators' maps one by one: log_likelihood with n samples and, of
    models with latents, iou_rec.

    Both are expectations over a case's label maps, see `each_annotator`.
    """
    generator = seeded_by_name(batch)
    out = {"log_likelihood": torch.zeros_like(batch.probabilities[:, 0])}
    classes, empty = scoring(batch)
    for label, weight in each_annotator(batch, generator):
        nats = model.log_likelihood(batch.images, label.long(), n, generator=generator)
        out["log_likelihood"] += weight * nats
        if hasattr(model, "reconstruct"):
            again = labels_of(model.reconstruct(batch.images, label.long()), 1)
            iou = metrics.Pairs(only_scored(batch, again)[None], only_scored(batch, label)[:, None],
                                classes, empty=empty).iou[:, 0, 1]
            out["iou_rec"] = out.get("iou_rec", 0) + weight * iou
    return out


# ---- the batches of a split

def rank_and_world() -> tuple[int, int]:
    """This process's (rank, number of processes) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(rows: list[dict]) -> dict:
    """Join the batches' {name: (B, ...) tensor or a list} to one {name: (N, ...) float64 array or a
    list}. Under torchrun it holds the batches of all processes, in the split's order."""
    rows = [{name: v.double().cpu().numpy() if torch.is_tensor(v) else v for name, v in row.items()}
            for row in rows]
    if dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, rows)
        rows = [row for turn in itertools.zip_longest(*shares) for row in turn if row]
    found = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        found[name] = sum(values, []) if isinstance(first, list) else np.concatenate(values)
    return found
