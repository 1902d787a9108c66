"""Measures of distributions over segmentations, of single segmentations, and of instance maps.

Samples are hard label maps `samples (n, B, *S)`, references are `labels (B, A, *S)` of A
annotators, with their optional probabilities `weights (B, A)`. Label maps are integer tensors on
any device. A result is one value per case, (B,), unless said otherwise.

  * Class 0 is background; measures average over the foreground classes 1..K-1. To score only some
    of them, as Eq. 7 of the Probabilistic U-Net does, map the others to 0 in samples and labels.
  * 255 means ignore: a pixel that either map of a pair ignores is out of that pair. An annotator
    who is 255 everywhere is missing and has no influence, like any annotator of weight 0.
  * `empty` is the IoU of a class that is absent in both maps: 1 for LIDC; NaN leaves the class out
    of that pair's mean (Cityscapes, SNEMI3D). Where no class is left, the IoU is 1.
  * NaN means: this case has no value, for example because it has no annotator. `bootstrap`,
    `paired_test` and `auroc` leave it out.

All pairs of maps are compared in one matrix product per class, in chunks of BUDGET elements. The
counts are exact: products of zeros and ones are, in float32 and TF32, and are added as integers.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from common import IGNORE

BUDGET = 2**20  # elements of a temporary (4 MB); keeps a chunk's counts below float32's 2^24, too


# ---- all pairs of label maps --------------------------------------------------------------------

def _joint(samples, labels):
    """samples (n, B, *S) and labels (B, A, *S) as one set of maps, (B, n + A, P) uint8."""
    if samples.shape[1:2] != labels.shape[:1] or samples.shape[2:] != labels.shape[2:]:
        raise ValueError(f"samples (n, B, *S) and labels (B, A, *S) must share B and *S, "
                         f"got {tuple(samples.shape)} and {tuple(labels.shape)}")
    if samples.is_floating_point() or labels.is_floating_point():
        raise ValueError(f"label maps must be integers, got {samples.dtype} and {labels.dtype}: "
                         f"take the most probable class first")
    return torch.cat([samples.byte().movedim(0, 1), labels.byte()], 1).flatten(2)


def _overlaps(maps, num_classes):
    """Yield (inter, size), both (B, N, N), for each foreground class k of maps (B, N, P).

    inter[i, j]: pixels that are k in both maps. size[i, j]: pixels that are k in i and valid in j.
    """
    highest = maps.amax((0, 1))  # (P,); where it is 0, a pixel counts for no class
    clear = maps.mT[:, (highest > 0) & (highest < IGNORE)]  # (B, P', N)
    mixed = maps.mT[:, highest == IGNORE]  # (B, P'', N), ignored by some map
    step = max(1, BUDGET // (maps.shape[0] * maps.shape[1]))
    for k in range(1, num_classes):
        inter = 0
        # Autocast would round the products, which are counts, to 8 or 11 bits.
        with torch.autocast(maps.device.type, enabled=False):
            for pixels in clear.split(step, 1):
                is_k = pixels.float().eq_(k)
                inter = inter + (is_k.mT @ is_k).long()
            size = inter.diagonal(dim1=1, dim2=2)[:, :, None]  # valid in every j
            for pixels in mixed.split(step, 1):
                is_k, valid = pixels.float().eq_(k), pixels.float().ne_(IGNORE)
                inter = inter + (is_k.mT @ is_k).long()
                size = size + (is_k.mT @ valid).long()
        yield inter, size


def _iou(maps, num_classes, empty):
    """Mean foreground IoU (B, N, N) of all pairs of maps (B, N, P)."""
    per_class = [(inter / (size + size.mT - inter)).nan_to_num(nan=empty)  # 0 / 0: absent in both
                 for inter, size in _overlaps(maps, num_classes)]
    return torch.stack(per_class).nanmean(0).nan_to_num(nan=1.0)  # all left out: the maps agree


def _annotator_weights(labels, weights):
    """(B, A) probabilities of the annotators: 0 for missing ones, NaN in cases without any."""
    present = (labels.flatten(2).amin(2) < IGNORE).float()
    weights = present if weights is None else weights.to(present) * present
    return weights / weights.sum(1, keepdim=True)


def _iou_of_all(samples, labels, num_classes, weights, empty):
    """IoU (B, n + A, n + A) of samples and labels; pixels no annotator labelled count nowhere."""
    maps = _joint(samples, labels)  # (B, n + A, P)
    missing = (weights == 0)[:, :, None]
    unlabelled = maps[:, len(samples) :].masked_fill(missing, IGNORE).amin(1) == IGNORE  # (B, P)
    maps[:, : len(samples)].masked_fill_(unlabelled[:, None], IGNORE)
    return _iou(maps, num_classes, empty)


def pairwise_iou(a, b, num_classes=2, empty=1.0):
    """Mean foreground IoU of every map of a (n, *S) with every map of b (m, *S), as (n, m).

    Raises ValueError, as all measures of label maps do, for shapes that do not fit and maps that
    are not integers.
    """
    return _iou(_joint(a[:, None], b[None]), num_classes, empty)[0, :len(a), len(a):]


# ---- distributions over label maps --------------------------------------------------------------

def sample_scores(samples, labels, num_classes=2, weights=None, empty=1.0, counts=None):
    """{"ged_<n>", "diversity_<n>", "hungarian_iou_<n>"} of the first n samples, for each n of
    `counts` (default: all of them).

    diversity is E[1 - IoU(s, s')] over all n^2 pairs of samples (Monteiro et al. 2020, Sec. 4).
    hungarian_iou is the mean IoU of the best 1:1 matching of samples and annotators (Kohl et al.
    2019, App. B.1). In the paper both sets are repeated to their least common multiple. Transport
    of masses 1/n of the samples to the annotators' weights has the same optimum.
    """
    weights, scores = _annotator_weights(labels, weights), {}
    iou_of_all = _iou_of_all(samples, labels, num_classes, weights, empty)
    for n in counts or (len(samples),):
        kept = [*range(n), *range(len(samples), iou_of_all.shape[1])]
        iou = iou_of_all[:, kept][:, :, kept]  # (B, n + A, n + A)
        cases = zip(iou[:, :n, n:].double().cpu().numpy(), weights.double().cpu().numpy())
        matched = torch.tensor([_transport(*case) for case in cases])
        scores |= {f"ged_{n}": _ged(iou, weights),
                   f"diversity_{n}": 1 - iou[:, :n, :n].mean((1, 2)),
                   f"hungarian_iou_{n}": matched.to(iou)}
    return scores


def ged(samples, labels, num_classes=2, weights=None, empty=1.0):
    """Squared generalised energy distance, d = 1 - IoU (Kohl et al. 2018, Eq. 6; weighted: Eq. 7).

        D^2 = 2 E[d(s, y)] - E[d(s, s')] - E[d(y, y')] = u^T IoU u,  u = (1/n .. 1/n, -w_1 .. -w_A)

    This is the V-statistic: the pairs of a map with itself are counted. Pixels that no annotator
    labelled are left out of the pairs of samples, too.
    """
    weights = _annotator_weights(labels, weights)
    return _ged(_iou_of_all(samples, labels, num_classes, weights, empty), weights)


def _ged(iou, weights):
    n = iou.shape[1] - weights.shape[1]
    u = torch.cat([iou.new_full((len(iou), n), 1 / n), -weights.to(iou)], 1)
    with torch.autocast(iou.device.type, enabled=False):  # bfloat16 would be wrong by 1e-3
        return torch.einsum("bi,bij,bj->b", u, iou, u)


def _transport(value, weights):
    """max sum(T * value) over T >= 0 (n, A) with rows adding up to 1/n and columns to weights.

    Successive shortest paths: sample after sample goes to the annotator with room where the loss is
    least, and may push earlier samples on to other annotators on the way. From annotator j to k
    moves the sample at j that loses least by it.
    """
    if np.isnan(weights).any():  # no annotator
        return math.nan
    n, A = value.shape
    eps = 1e-9  # of a sample; what rounding leaves
    room = n * weights / weights.sum()  # of every annotator, in samples
    sent = np.zeros((n, A))
    loss_by_move = value[:, :, None] - value[:, None, :]  # (n, A, A): sample i from j to k
    for i in range(n):
        left = 1.0
        while left > eps:
            moves = np.where(sent[:, :, None] > eps, loss_by_move, np.inf)
            mover, step = moves.argmin(0), moves.min(0)  # (A, A)
            loss, previous = _shortest_paths(-value[i], step)
            way = [np.where(room > eps, loss, np.inf).argmin()]  # annotators, from the last back
            while previous[way[-1]] >= 0:
                way.append(previous[way[-1]])
            moved = [(mover[j, k], j, k) for k, j in zip(way, way[1:])]  # sample, from j, to k
            amount = min(left, room[way[0]], *(sent[s, j] for s, j, _ in moved))
            for s, j, k in moved:
                sent[s, j] -= amount
                sent[s, k] += amount
            sent[i, way[-1]] += amount
            room[way[0]] -= amount
            left -= amount
    return (sent * value).sum() / n


def _shortest_paths(start, step):
    """Bellman-Ford: the least loss (A,) of reaching each annotator, where entering at j costs
    start[j] and going from j to k step[j, k]; and the annotator before it on that way, or -1."""
    loss, previous = start, np.full(len(start), -1)
    while True:
        through = loss[:, None] + step
        better = through.min(0) < loss - 1e-12  # the margin keeps rounding from cycling
        if not better.any():
            return loss, previous
        previous = np.where(better, through.argmin(0), previous)
        loss = np.where(better, through.min(0), loss)


def mode_frequencies(samples, modes, num_classes=2):
    """Share of samples whose nearest mode is each of modes (B, M, *S), as (B, M); ties are split.

    Nearest is of highest mean foreground IoU (Kohl et al. 2018, App. C). Missing modes get none.
    """
    iou = _iou(_joint(samples, modes), num_classes, empty=1.0)
    missing = modes.flatten(2).amin(2) == IGNORE
    iou = iou[:, :len(samples), len(samples):].masked_fill(missing[:, None], -math.inf)  # (B, n, M)
    nearest = (iou > iou.amax(2, keepdim=True) - 1e-6).float()  # rounding must not break ties
    return (nearest / nearest.sum(2, keepdim=True)).mean(1)


# ---- maps of uncertainty: of probs (n, B, K, *S), probabilities and not logits, or of Moments ----

class Moments:
    """Mean, mean logarithm and variance over samples that are added one at a time, so that no more
    than one has to be in memory."""

    def __init__(self, probs=()):
        self.count = 0
        for sample in probs:
            self.add(sample)

    def add(self, probs):
        """One more sample's probabilities (B, K, *S), kept in float32 at least: 1e-8 needs it."""
        probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
        if self.count == 0:
            self.mean, self.mean_log, self.squares = (torch.zeros_like(probs) for _ in range(3))
        self.count += 1
        change = probs - self.mean
        self.mean += change / self.count
        self.squares += change * (probs - self.mean)  # Welford: exactly 0 where all are equal
        self.mean_log += ((probs + 1e-8).log_() - self.mean_log) / self.count

    @classmethod
    def of(cls, probs):
        """`probs` (n, B, K, *S), or Moments, as Moments."""
        return probs if isinstance(probs, cls) else cls(probs)

    @property
    def variance(self):
        """Variance over the samples, added over the classes, (B, *S)."""
        return self.squares.sum(1) / self.count


def gamma_map(probs):
    """PHiSeg's map of variability E_s[CE(mean, s)], as (B, *S) nats (Baumgartner et al. 2019).

    As CE(y, s) = -sum_k y_k log(s_k + 1e-8) is linear in y, the samples enter only by their mean
    and their mean log.
    """
    moments = Moments.of(probs)
    return -(moments.mean * moments.mean_log).sum(1)


def ncc(probs, labels, weights=None):
    """PHiSeg's S_NCC: does the model vary where annotators contradict its samples? In -1..1.

        E_y[NCC(E_s[CE(mean, s)], E_s[CE(y, s)])]          (Baumgartner et al. 2019, Eq. 5)

    NCC is Pearson's correlation over the pixels that the annotator y does not ignore; 0 where one
    of the maps is constant.
    """
    moments = Moments.of(probs)
    error, valid = _annotator_errors(moments, labels)
    gamma = gamma_map(moments).flatten(1)[:, None].expand_as(error)
    correlation = (_standardised(gamma, valid) * _standardised(error, valid)).sum(-1)  # (B, A)
    return (_annotator_weights(labels, weights) * correlation).sum(1)


def error_map(probs, labels, weights=None):
    """PHiSeg's average error E_y,s[CE(y, s)] over annotators y and samples s, as (B, *S) nats.

    What `gamma_map` should look like (Baumgartner et al. 2019, Fig. 3). The mean is over the
    annotators that do not ignore the pixel; 0 where all do.
    """
    error, valid = _annotator_errors(Moments.of(probs), labels)
    weights = _annotator_weights(labels, weights)[:, :, None] * valid
    mean = (weights * error).sum(1) / weights.sum(1).clamp(min=1e-12)
    return mean.view(len(labels), *labels.shape[2:])


def _annotator_errors(moments, labels):
    """CE of each annotator's one-hot map with the samples, (B, A, P), and where it is valid."""
    labels = labels.flatten(2).long()  # (B, A, P)
    valid = labels != IGNORE
    return -moments.mean_log.flatten(2).gather(1, labels * valid), valid


def _standardised(x, valid):
    """x (B, A, P) with mean 0 and norm 1 over valid pixels; 0 elsewhere, and if x is constant."""
    x = x.masked_fill(~valid, 0)
    mean = x.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    rest = (x - mean).masked_fill(~valid, 0)
    norm = rest.norm(dim=-1, keepdim=True)
    constant = norm <= 1e-6 * x.norm(dim=-1, keepdim=True)  # what is left is rounding
    return (rest / norm).masked_fill(constant, 0)


def uncertainty_map(probs):
    """VAE U-Net's map: variance over the samples, divided by its maximum; (B, *S) in 0..1.

    The variances of the K probabilities are added. Without any, the map is 0.
    """
    variance = Moments.of(probs).variance
    peak = variance.flatten(1).amax(1).clamp(min=1e-10)  # less is rounding
    return variance / peak.view(-1, *[1] * (variance.dim() - 1))


def entropy_map(probs):
    """Entropy of the samples' mean, -sum_k E[s_k] log E[s_k], (B, *S) nats: SSN's Fig. 4e."""
    return torch.special.entr(Moments.of(probs).mean).sum(1)


# ---- one prediction and its references ----------------------------------------------------------

def dice(pred, labels, num_classes=2, weights=None):
    """Dice 2 |a b| / (|a| + |b|) of pred (B, *S), mean over classes and annotators.

    SSN's DSC: any prediction where the annotation is empty is worth 0; both empty, 1.
    """
    return sample_dice(pred[None], labels, num_classes, weights)[0]


def sample_dice(samples, labels, num_classes=2, weights=None):
    """`dice` of every one of samples (n, B, *S) by itself, (n, B)."""
    dices = _dice(samples, labels, num_classes)[0].mean(0)  # (B, n, A)
    return (_annotator_weights(labels, weights)[:, None] * dices).sum(2).T


def dice_present(pred, labels, num_classes=2, weights=None):
    """Dice, mean over the annotators and classes not empty in the reference: SSN's DSC_nod."""
    dices, present = (x[:, :, 0] for x in _dice(pred[None], labels, num_classes))  # (K-1, B, A)
    share = _annotator_weights(labels, weights) * present
    return (share * dices).sum((0, 2)) / share.sum((0, 2))


def _dice(samples, labels, num_classes):
    """Dice, 1 where both are empty, and presence in the reference, each (K-1, B, n, A)."""
    n, dices, present = len(samples), [], []
    for inter, size in _overlaps(_joint(samples, labels), num_classes):
        size = size.expand_as(inter)
        inter, of_sample, of_label = inter[:, :n, n:], size[:, :n, n:], size[:, n:, :n].mT
        dices.append((2 * inter / (of_sample + of_label)).nan_to_num(nan=1.0))
        present.append(of_label > 0)
    return torch.stack(dices), torch.stack(present)


def hausdorff95(pred, label, num_classes=2):
    """95th percentile of the surface distances of pred and label (B, *S), in pixels: (B, K-1).

    The distances of both directions are pooled. A surface is the pixels with a face neighbour
    outside their class or the image; ignored pixels are of no class. Both empty: 0. One empty: NaN.
    """
    valid = (pred != IGNORE) & (label != IGNORE)
    result = torch.zeros(len(pred), num_classes - 1, device=pred.device)
    for b, k in np.ndindex(*result.shape):
        p, q = (_surface((x[b] == k + 1) & valid[b]) for x in (pred, label))
        if len(p) and len(q):
            distances = torch.cat([_nearest(p, q), _nearest(q, p)])
            result[b, k] = distances.cpu().double().quantile(0.95)  # float32 would round the rank
        elif len(p) or len(q):
            result[b, k] = math.nan
    return result


def _surface(mask):
    """Indices (points, D) of the pixels of mask (*S) that have a face neighbour outside it."""
    inner = mask
    for axis in range(mask.dim()):
        padded = F.pad(mask.movedim(axis, -1), (1, 1))  # outside the image, nothing is in the mask
        inner = inner & (padded[..., :-2] & padded[..., 2:]).movedim(-1, axis)
    return (mask & ~inner).nonzero().float()


def _nearest(points, others):
    """Distance of each of points (p, D) to the nearest of others (q, D)."""
    # By default cdist squares in a matrix product, which loses half of the digits.
    return torch.cat([torch.cdist(p, others, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
                      for p in points.split(max(1, BUDGET // len(others)))])


# ---- instances: maps of ids; 0 is background or ignored, every other number (also 255) one object

def rand_error(pred, target):
    """Adapted Rand error of id maps pred, target (B, *S), restricted to target's foreground.

    As in SNEMI3D, 1 - F-score of precision and recall over pairs of pixels (a pixel with itself
    included): is a pair within one object? A pixel of pred 0 is an object of its own (SNEMI3D's
    script divides the number of these by the image size, so they vanish). Without foreground in
    target: NaN.
    """
    errors = []
    for p, t in zip(pred.flatten(1).long(), target.flatten(1).long(), strict=True):
        table = _contingency(p, t)[0][:, 1:]
        alone = table[0].sum()
        both = table[1:].square().sum() + alone
        within_pred = table[1:].sum(1).square().sum() + alone
        within_target = table.sum(0).square().sum()
        # precision = both / within_pred, recall = both / within_target, F = 2 P R / (P + R)
        errors.append(1 - 2 * both / (within_pred + within_target))
    return torch.stack(errors)


def average_precision(pred, target, confidence):
    """Average precision of id maps pred, target (B, *S): {"ap", "ap50"}, each (B,).

    The Cityscapes scheme (Kohl et al. 2019, App. B.3): a predicted object is right if its IoU with
    a target is above a threshold; ranked by confidence, precision and recall make a curve, and AP
    is the area below. "ap50": threshold 0.5; "ap": mean over 0.50, 0.55 .. 0.95. An object's
    confidence is the mean of the map `confidence` (B, *S) over it. Cityscapes has one curve for all
    images; here each image has its own. Without objects in target: NaN.
    """
    thresholds = torch.arange(50, 100, 5, device=pred.device) / 100
    curves = []
    for b in range(len(pred)):
        table, row = _contingency(pred[b].flatten().long(), target[b].flatten().long())
        inter = table[1:, 1:]
        if inter.shape[1] == 0:
            curves.append(torch.full_like(thresholds, math.nan))
            continue
        iou = inter / (table.sum(1)[1:, None] + table.sum(0)[1:] - inter)
        # Above 0.5, an object overlaps no second one: the matches are 1:1 by themselves.
        right = iou.amax(1)[:, None] > thresholds  # (objects, thresholds)
        score = torch.zeros(len(table), device=pred.device)
        score = score.index_add(0, row, confidence[b].flatten().float()) / table.sum(1)
        score, order = score[1:].sort(descending=True)
        last_of_ties = score.diff(append=score.new_full((1,), -math.inf)) != 0
        hits = right[order].cumsum(0)[last_of_ties]
        start = torch.zeros(1, len(thresholds), device=pred.device)  # recall 0, precision 1
        precision = torch.cat([start + 1, hits / (last_of_ties.nonzero() + 1)])
        recall = torch.cat([start, hits / inter.shape[1]])
        curves.append(torch.trapezoid(precision, recall, dim=0))
    curves = torch.stack(curves)
    return {"ap": curves.mean(1), "ap50": curves[:, 0]}


def connected_components(mask):
    """Ids (B, *S) int64, not consecutive, of the parts of mask (B, *S) bool whose pixels connect by
    their sides; 0 where the mask is false."""
    size = mask[0].numel()
    ids = torch.arange(1, size + 1, device=mask.device).view(1, *mask.shape[1:]) * mask
    while True:
        high = ids.clone()
        for axis, side in enumerate(mask.shape[1:], 1):
            for here, there in ((0, 1), (1, 0)):  # each pixel takes a neighbour's larger id
                target = high.narrow(axis, here, side - 1)
                torch.maximum(target, ids.narrow(axis, there, side - 1), out=target)
        high *= mask
        # then the id that the pixel it names has by now, so that ids travel ever further
        known = torch.cat([high.new_zeros(len(high), 1), high.flatten(1)], 1)
        high = known.gather(1, high.flatten(1)).view_as(ids)
        if torch.equal(high, ids):
            return ids
        ids = high


def _contingency(pred, target):
    """Pixels shared by each object of pred and of target (P,), id 0 first; and each pixel's row."""
    (rows, row), (columns, column) = (
        torch.cat([ids, ids.new_zeros(1)]).unique(return_inverse=True) for ids in (pred, target))
    shape = len(rows), len(columns)
    cell = row[:-1] * shape[1] + column[:-1]  # less the 0 that was added to be in the table
    return cell.bincount(minlength=shape[0] * shape[1]).view(shape), row[:-1]


# ---- statistics over cases ----------------------------------------------------------------------

def bootstrap(values, resamples=1000, seed=0):
    """{"mean", "stderr", "n"} of one value per case; without any, mean and stderr are NaN.

    The standard error is that of the means of `resamples` draws of all n cases with replacement;
    cases count as independent.
    """
    values = _given(values)
    if not (n := len(values)):
        return {"mean": math.nan, "stderr": math.nan, "n": 0}
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    return {"mean": float(values.mean()), "stderr": float(np.std(means)), "n": n}


def paired_test(a, b, resamples=10000, seed=0):
    """Two-sided p-value of the paired permutation test: is the mean of a - b over cases chance?

    If it were, the sign of each case's difference would be a coin. Up to 16 cases, all 2^N patterns
    of signs are tried; beyond, `resamples` random ones and the observed one.
    """
    diff = _given(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))
    observed = abs(diff.sum()) - 1e-12 * abs(diff).sum()  # equal up to rounding is equal
    if len(diff) <= 16:
        flips = np.arange(2**len(diff))[:, None] >> np.arange(len(diff)) & 1
        return float(np.mean(abs(diff.sum() - 2 * flips @ diff) >= observed))
    rng = np.random.default_rng(seed)
    flips = (rng.integers(2, size=len(diff)) for _ in range(resamples))
    extreme = sum(abs(diff.sum() - 2 * flip @ diff) >= observed for flip in flips)
    return float((1 + extreme) / (1 + resamples))


def auroc(positive, negative):
    """Area under the ROC curve: P(score of a positive > score of a negative), ties counted half."""
    positive, negative = _given(positive), _given(negative)
    if not len(positive) or not len(negative):
        return math.nan
    negative = np.sort(negative)
    below, up_to = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + up_to).sum() / (2 * len(positive) * len(negative)))


def _given(values):
    """The values that are not NaN, as one axis of float64."""
    values = np.asarray(values, dtype=float)
    return values[~np.isnan(values)]
