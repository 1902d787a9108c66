"""Measures of distributions over segmentations, of single segmentations, and of instance maps.

Samples are hard label maps `samples (n, B, *S)`, references are `labels (B, A, *S)` of A
annotators, with their optional probabilities `weights (B, A)`. Label maps are integer tensors on
any device, of the classes 0..K-1 (for masks of 0 and 255, divide by 255 first). A result is one
value per case, (B,), unless said otherwise. The matched IoU of n samples is
`Pairs(samples, labels, K).sample_scores([n])["hungarian_iou_<n>"]`.

  * Class 0 is background; measures average over the foreground classes 1..K-1. To score only some
    of them, as Eq. 7 of the Probabilistic U-Net does, map the others to 0 in samples and labels.
  * 255 means ignore: a pixel that either map of a pair ignores is out of that pair. (If annotators
    ignore different pixels, GED may therefore be below 0.) An annotator who is 255 everywhere is
    missing and has no influence, like any annotator of weight 0.
  * `empty` is the IoU of a class that is absent in both maps: 1 for LIDC; NaN leaves the class out
    of that pair's mean (Cityscapes, SNEMI3D). Where no class is left, the IoU is 1.
  * NaN means: this case has no value, for example because it has no annotator. `bootstrap`,
    `paired_test` and `auroc` leave it out.

All pairs of maps are compared in one matrix product per class, in chunks of BUDGET elements. The
counts are exact: a chunk's sum of zeros and ones is not rounded in float32 or TF32, and the sums
are added as integers.
"""

import functools
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
    maps = torch.cat([samples.byte().movedim(0, 1), labels.byte()], 1).flatten(2)
    for given in (samples, labels):  # values that `byte` has changed
        if given.dtype not in (torch.uint8, torch.bool) and given.numel() and (
                given.min() < 0 or given.max() > IGNORE):
            raise ValueError(f"label maps hold {given.min()} to {given.max()}: classes are numbers "
                             f"from 0 up, and {IGNORE} is for pixels to be ignored")
    return maps


def _overlaps(maps, num_classes):
    """inter, size (K-1, B, N, N) of all pairs of maps (B, N, P), for each foreground class k.

    inter[i, j]: pixels that are k in both maps. size[i, j]: pixels that are k in i and valid in j.
    """
    highest = maps.amax((0, 1))  # (P,); where it is 0, a pixel counts for no class
    # Pixels that no map ignores, nearly all of them, need only one of the two products below.
    never_ignored = maps.mT[:, (highest > 0) & (highest < IGNORE)]  # (B, P', N)
    ignored = maps.mT[:, highest == IGNORE]  # (B, P'', N), by at least one map
    for top in (highest, ignored):
        if (top >= num_classes).logical_and(top < IGNORE).any():
            raise ValueError(f"label maps hold class {num_classes} or higher ones: with "
                             f"num_classes={num_classes}, classes are 0 to {num_classes - 1}")
    step = max(1, BUDGET // (maps.shape[0] * maps.shape[1]))
    inters, sizes = [], []
    for k in range(1, num_classes):
        inter = maps.new_zeros(len(maps), maps.shape[1], maps.shape[1], dtype=torch.long)
        # Autocast would round the products, which are counts, to 8 or 11 bits.
        with torch.autocast(maps.device.type, enabled=False):
            for pixels in never_ignored.split(step, 1):
                is_k = pixels.float().eq_(k)
                inter += (is_k.mT @ is_k).long()
            size = inter.diagonal(dim1=1, dim2=2)[:, :, None].expand_as(inter)  # valid in every j
            for pixels in ignored.split(step, 1):
                is_k, valid = pixels.float().eq_(k), pixels.float().ne_(IGNORE)
                inter = inter + (is_k.mT @ is_k).long()
                size = size + (is_k.mT @ valid).long()
        inters.append(inter)
        sizes.append(size)
    return torch.stack(inters), torch.stack(sizes)


def _iou(inter, size, empty):
    """Mean foreground IoU (B, N, N) of all pairs of maps, from what `_overlaps` returns."""
    union = size + size.mT - inter  # of i and j, over the pixels that are valid in both
    iou = (inter / union).nan_to_num(nan=empty)  # 0 / 0: absent in both
    return iou.nanmean(0).nan_to_num(nan=1.0)  # all left out: the maps agree


def _annotator_weights(labels, weights):
    """(B, A) probabilities of the annotators: 0 for missing ones, NaN in cases without any."""
    present = (labels.flatten(2).amin(2) < IGNORE).float()
    weights = present if weights is None else weights.to(present) * present
    return weights / weights.sum(1, keepdim=True)


def pairwise_iou(a, b, num_classes=2, empty=1.0):
    """Mean foreground IoU of every map of a (n, *S) with every map of b (m, *S), as (n, m).

    Raises ValueError, as all measures of label maps do, for shapes that do not fit, maps that are
    not integers, and classes from `num_classes` on.
    """
    overlaps = _overlaps(_joint(a[:, None], b[None]), num_classes)
    return _iou(*overlaps, empty)[0, :len(a), len(a):]


# ---- distributions over label maps --------------------------------------------------------------

class Pairs:
    """All pairs of a case's maps, counted once, and the measures that follow from the counts.

    maps (n, B, *S) are samples or predictions; labels, weights and `empty` are as everywhere. With
    N = n + A maps in this order, `inter` and `size` (K-1, B, N, N) are those of `_overlaps`, `iou`
    (B, N, N) is the mean over classes, `dice` (K-1, B, N, N) is 1 where both maps are empty, and
    `weights` (B, A) add up to 1. Pixels that no annotator labelled count in no pair of maps.
    """

    def __init__(self, maps, labels, num_classes=2, weights=None, empty=1.0):
        self.n, self.weights = len(maps), _annotator_weights(labels, weights)
        joint = _joint(maps, labels)  # (B, N, P)
        missing = (self.weights == 0)[:, :, None]
        lowest = joint[:, self.n :].masked_fill(missing, IGNORE).amin(1, keepdim=True)
        # where nobody labelled the pixel: 255 (IGNORE) is all ones, so that `or` sets it
        joint[:, : self.n] |= (lowest == IGNORE).byte() * IGNORE
        self.inter, self.size = _overlaps(joint, num_classes)
        self.iou = _iou(self.inter, self.size, empty)
        self.dice = (2 * self.inter / (self.size + self.size.mT)).nan_to_num(nan=1.0)

    def ged(self, maps=slice(None)):
        """`ged` of some of the maps, (B,)."""
        share = self.iou.new_zeros(self.n)
        share[maps] = 1
        u = torch.cat([(share / share.sum()).expand(len(self.iou), -1), -self.weights], 1)
        with torch.autocast(u.device.type, enabled=False):  # bfloat16 would be wrong by 1e-3
            return torch.einsum("bi,bij,bj->b", u, self.iou, u)

    def sample_scores(self, counts):
        """{"ged_<n>", "diversity_<n>", "hungarian_iou_<n>"} of the first n maps, for n in counts.

        diversity is E[1 - IoU(s, s')] over all n^2 pairs of samples (Monteiro et al. 2020, Sec. 4).
        hungarian_iou (matched IoU) is the mean IoU of the best 1:1 matching of samples and
        annotators (Kohl et al. 2019, App. B.1). In the paper both sets are repeated to their least
        common multiple. The optimal transport of the samples, 1/n each, to the annotators' weights
        gives the same.
        """
        scores, weights = {}, self.weights.double().cpu().numpy()
        iou = self.iou[:, self.n :, : max(counts)].double().cpu().numpy()  # (B, A, n)
        for n in counts:
            matched = torch.from_numpy(transport(iou[:, :, :n], weights))
            scores |= {f"ged_{n}": self.ged(slice(n)),
                       f"diversity_{n}": 1 - self.iou[:, :n, :n].mean((1, 2)),
                       f"hungarian_iou_{n}": matched.to(self.iou)}
        return scores

    def sample_dice(self):
        """`dice` of every map by itself, (n, B)."""
        dice = self.dice[:, :, : self.n, self.n :].mean(0)  # (B, n, A)
        return (self.weights[:, None] * dice).sum(2).T

    def dice_present(self, i):
        """Dice of map i, mean over the annotators and the classes that are not empty in the
        reference, (B,): SSN's DSC_nod."""
        share = self.weights * (self.size[:, :, self.n :, i] > 0)  # (K-1, B, A)
        return (share * self.dice[:, :, i, self.n :]).sum((0, 2)) / share.sum((0, 2))


def ged(samples, labels, num_classes=2, weights=None, empty=1.0):
    """Squared generalised energy distance, d = 1 - IoU (Kohl et al. 2018, Eq. 6; weighted: Eq. 7).

        D^2 = 2 E[d(s, y)] - E[d(s, s')] - E[d(y, y')]

    Twice the distance of samples s from annotations y, less the distances among samples and among
    annotations: a model has to be right, and to vary as the annotators do. Pairs of a map with
    itself count, at distance 0 (the V-statistic). Even if samples and equally weighted annotations
    are independent draws of one distribution, D^2 is therefore d (1/n + 1/A) on average, with d the
    mean distance of two draws; if the weighted annotations are the whole distribution (as in
    `shapes`), it is E[d(y, y')] / n. So compare only equal n and A. As D^2 rewards diversity even
    of poor samples (Kohl et al. 2019, App. B.1), look at the matched IoU, too.

    With u = (1/n .. 1/n, -w_1 .. -w_A), whose sum is 0, D^2 = u^T IoU u, which is how it is
    computed. Pixels that no annotator labelled are left out of the pairs of samples, too.
    """
    return Pairs(samples, labels, num_classes, weights, empty).ged()


def mode_frequencies(samples, modes, num_classes=2):
    """For each of modes (B, M, *S), the share of samples nearest to it, (B, M); ties are split.

    Nearest means highest mean foreground IoU (Kohl et al. 2018, App. C). Missing modes get 0.
    """
    iou = _iou(*_overlaps(_joint(samples, modes), num_classes), empty=1.0)
    missing = modes.flatten(2).amin(2) == IGNORE
    iou = iou[:, :len(samples), len(samples):].masked_fill(missing[:, None], -math.inf)  # (B, n, M)
    nearest = (iou > iou.amax(2, keepdim=True) - 1e-6).float()  # rounding must not break ties
    return (nearest / nearest.sum(2, keepdim=True)).mean(1)


# ---- maps of uncertainty: of probs (n, B, K, *S), probabilities and not logits, or of Moments ----

class Moments:
    """Means over samples that are added one at a time, so that no more than one is in memory.

    mean and mean_log (B, K, *S) are those of the probabilities p and of log(p + 1e-8), mean_entropy
    (B, *S) is that of the samples' entropies in nats. Welford's algorithm (1962): where all samples
    are equal, the means are exactly the sample's own and the variance is exactly 0.
    """

    def __init__(self, probs=()):
        self.count = 0
        for sample in probs:
            self.add(sample)

    def add(self, probs):
        """One more sample's probabilities (B, K, *S), kept in float32 at least: 1e-8 needs it."""
        probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
        log = (probs + 1e-8).log_()
        entropy = -(probs * log).sum(1)
        self.count += 1
        if self.count == 1:
            self.mean, self.mean_log, self.mean_entropy = probs.clone(), log, entropy
            self.squares = torch.zeros_like(probs)  # of deviations from the mean
            return
        deviation, share = probs - self.mean, 1 / self.count
        self.mean.lerp_(probs, share)
        self.mean_log.lerp_(log, share)
        self.mean_entropy.lerp_(entropy, share)
        self.squares.addcmul_(deviation, probs - self.mean)

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
    """PHiSeg's S_NCC: do the samples vary where they disagree with the annotators? In -1..1.

        E_y[NCC(E_s[CE(mean, s)], E_s[CE(y, s)])]          (Baumgartner et al. 2019, Eq. 5)

    Here s are a sample's probabilities, mean is E_s[s], and y is an annotator's one-hot map. NCC is
    Pearson's correlation over the pixels that the annotator does not ignore; 0 where one of the
    maps is constant.
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
    labels = labels.flatten(2)  # (B, A, P)
    valid = (labels != IGNORE).to(moments.mean)  # as 0 and 1: products with bool are slow
    classes = labels.masked_fill(labels == IGNORE, 0).long()  # any class will do there
    return -moments.mean_log.flatten(2).gather(1, classes), valid


def _standardised(x, valid):
    """x (B, A, P) with mean 0 and norm 1 over valid pixels; 0 elsewhere, and if x is constant."""
    x = x * valid
    mean = x.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    rest = (x - mean).mul_(valid)
    norm = rest.norm(dim=-1, keepdim=True)
    constant = norm <= 1e-6 * x.norm(dim=-1, keepdim=True)  # what is left is rounding
    return rest / norm.masked_fill(constant, math.inf)


def uncertainty_map(probs):
    """VAE U-Net's map: variance over the samples, divided by its maximum; (B, *S) in 0..1.

    The variances of the K probabilities are added. Without any, the map is 0.
    """
    variance = Moments.of(probs).variance
    peak = variance.flatten(1).amax(1).clamp(min=1e-10)  # less is rounding
    return variance / peak.view(-1, *[1] * (variance.dim() - 1))


def entropy_map(probs):
    """Entropy of the samples' mean, -sum_k E[s_k] log E[s_k], (B, *S) nats: SSN's Fig. 4e.

    This is the total predictive uncertainty. It is the sum of `Moments.mean_entropy`, the
    uncertainty within a sample, and `mutual_information_map`, the disagreement of the samples.
    """
    return torch.special.entr(Moments.of(probs).mean).sum(1)


def mutual_information_map(probs):
    """Entropy of the mean less mean entropy, (B, *S) nats: how much the samples disagree.

    For an ensemble and for dropout, whose samples differ by their weights, this is the epistemic
    part, and the mean entropy the aleatoric one (Depeweg et al. 2018). For all other models it is
    NOT epistemic: their samples differ because annotators do.
    """
    moments = Moments.of(probs)
    disagreement = entropy_map(moments) - moments.mean_entropy
    return disagreement.masked_fill(disagreement < 1e-6, 0)  # less is rounding


# ---- one prediction and its references ----------------------------------------------------------

def dice(pred, labels, num_classes=2, weights=None):
    """Dice 2 |a b| / (|a| + |b|) of pred (B, *S), mean over classes and annotators.

    As in SSN's DSC, a prediction scores 0 where only the annotation is empty, and 1 where both are.
    """
    return Pairs(pred[None], labels, num_classes, weights).sample_dice()[0]


def hausdorff95(pred, label, num_classes=2, spacing=None):
    """95th percentile of the surface distances of pred and label (B, *S), (B, K-1).

    Distances are in pixels or, given `spacing`, the size of a pixel along each of the axes S, in
    its unit.
    The distances of both directions are pooled. A surface is the pixels with a face neighbour
    outside their class or the image; ignored pixels are of no class. The result is 0 if a class is
    absent from both maps, and NaN if it is absent from one.
    """
    _joint(pred[None], label[:, None])  # checks their shapes and types
    spacing = [1.0] * (pred.dim() - 1) if spacing is None else spacing
    spacing = torch.as_tensor(spacing, dtype=torch.float32, device=pred.device)
    valid = (pred != IGNORE) & (label != IGNORE)
    result = torch.zeros(len(pred), num_classes - 1, device=pred.device)
    for b, k in np.ndindex(*result.shape):
        p, q = (_surface((x[b] == k + 1) & valid[b]) * spacing for x in (pred, label))
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


# ---- statistics over cases ----------------------------------------------------------------------

def bootstrap(values, groups=None, resamples=1000, seed=0):
    """{"mean", "stderr", "n"} of one value per case; without any, mean and stderr are NaN.

    The standard error is the standard deviation of the means of `resamples` draws of cases with
    replacement or, given the patient (or scene) of each case as `groups` (N,), of patients with all
    their cases: the images of one patient are alike, so they do not count as independent. A draw
    has one patient fewer than there are, which makes the error of a mean unbiased for few of them
    (Rao and Wu 1988).
    """
    values, groups = _given(values, groups)
    if not len(values):
        return {"mean": math.nan, "stderr": math.nan, "n": 0}
    number = _numbers(groups)
    sums, counts = np.bincount(number, values), np.bincount(number)
    draws = _draws(len(sums), resamples, seed)
    return {"mean": float(values.mean()), "stderr": float(np.std(draws @ sums / (draws @ counts))),
            "n": len(values)}


def resampled(groups, times=200, seed=0):
    """Draw groups with replacement, one fewer than there are (see `bootstrap`), `times` times: how
    often each case is in the draw, (times, N). groups (N,): the group of each case."""
    number = _numbers(groups)
    return _draws(int(number.max()) + 1, times, seed)[:, number].astype(int)


@functools.lru_cache(maxsize=1)
def _draws(groups, times, seed):
    """How often each of so many groups is drawn, (times, groups) float64, as products are fast."""
    count = max(1, groups - 1)
    drawn = np.random.default_rng(seed).multinomial(count, [1 / groups] * groups, size=times)
    return drawn.astype(float)


def paired_test(a, b, groups=None, resamples=10000, seed=0):
    """Two-sided p-value of the paired permutation test: is the mean of a - b only due to chance?

    If so, each case's difference could as well have the other sign; given the patient (or scene) of
    each case as `groups` (N,), those of one patient change their signs together. Up to 16 patients
    or cases, all 2^N patterns of signs are tried; for more, `resamples` random ones and the
    observed one.
    """
    diff, groups = _given(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), groups)
    diff = np.bincount(_numbers(groups), diff)
    observed = abs(diff.sum()) - 1e-12 * abs(diff).sum()  # equal up to rounding is equal
    if len(diff) <= 16:
        # (2^N, N): the bits of the numbers 0 .. 2^N - 1, 1 where a sign is flipped
        flips = np.arange(2**len(diff))[:, None] >> np.arange(len(diff)) & 1
        return float(np.mean(abs(diff.sum() - 2 * flips @ diff) >= observed))
    rng = np.random.default_rng(seed)
    flips = (rng.integers(2, size=len(diff)) for _ in range(resamples))
    extreme = sum(abs(diff.sum() - 2 * flip @ diff) >= observed for flip in flips)
    return float((1 + extreme) / (1 + resamples))


def auroc(positive, negative):
    """Area under the ROC curve: P(score of a positive > score of a negative), ties counted half."""
    positive, negative = _given(positive)[0], _given(negative)[0]
    if not len(positive) or not len(negative):
        return math.nan
    negative = np.sort(negative)
    below = np.searchsorted(negative, positive, "left")  # negatives with a lower score
    up_to = np.searchsorted(negative, positive, "right")  # with a lower or an equal one
    return float((below + up_to).sum() / (2 * len(positive) * len(negative)))


def _given(values, groups=None):
    """The values (N,) that are not NaN, in float64, and their groups; each its own without any."""
    values = np.asarray(values, dtype=float)
    there = np.flatnonzero(~np.isnan(values))
    return values[there], there if groups is None else _numbers(groups)[there]


def _numbers(groups):
    """The groups of the cases (N,) as numbers, in the order in which they first appear."""
    if isinstance(groups, (torch.Tensor, np.ndarray)):  # no two elements of a tensor are equal keys
        groups = groups.tolist()
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    return np.array([number[group] for group in groups], dtype=int)


# ---- matching samples with annotators ------------------------------------------------------------

def transport(value, weights):
    """max sum(T * value), (B,), over T >= 0 (B, A, n), float64 arrays; NaN where weights are NaN.

    T[a, i] is the mass that sample i sends to annotator a: each sample sends 1/n, and annotator a
    receives weights[:, a]. First, every sample goes to its best annotator. Then samples, or parts
    of them, move along successive shortest paths: from an annotator with too much to one with too
    little, through others if that is best.
    """
    B, A, n = value.shape
    weights = np.where(np.isnan(weights).any(1, keepdims=True), np.nan, weights)
    share = np.nan_to_num(weights / weights.sum(1, keepdims=True), nan=1 / A)  # (B, A)
    # in samples: sent (B, A, n), and room (B, A), which is negative where there are too many
    sent = (value.argmax(1)[:, None] == np.arange(A)[:, None]).astype(float)
    room = n * share - sent.sum(2)
    eps = 1e-9  # of a sample; what rounding leaves
    while len(b := np.flatnonzero((room < -eps).any(1) & (room > eps).any(1))):
        case = np.arange(len(b))
        held = np.where(sent[b] > eps, value[b], np.inf)
        moves = held[:, :, None] - value[b, None]  # (b, from, to, n): what a sample loses by it
        mover = moves.argmin(3)
        step = np.take_along_axis(moves, mover[..., None], 3)[..., 0]  # (b, from, to)
        loss, previous = _shortest_paths(room[b] < -eps, step)
        at = end = np.where(room[b] > eps, loss, np.inf).argmin(1)
        amount, path = room[b, end], []  # the path is followed back from its end
        before = previous[case, at]
        while (before >= 0).any():
            moving, sample = before >= 0, mover[case, before, at]  # False at the path's start
            amount = np.where(moving, np.minimum(amount, sent[b, before, sample]), amount)
            path.append((moving, before, at, sample))
            at = np.where(moving, before, at)
            before = previous[case, at]
        amount = np.minimum(amount, -room[b, at])
        for moving, before, after, sample in path:
            sent[b, before, sample] -= amount * moving
            sent[b, after, sample] += amount * moving
        room[b, end] -= amount
        room[b, at] += amount
    return (sent * value).sum((1, 2)) / n + 0 * weights.sum(1)


def _shortest_paths(sources, step):
    """Bellman-Ford from the sources (B, A) bool, where going from j to k costs step[:, j, k]: the
    least loss (B, A) of reaching each annotator, and the one before it on that path, or -1."""
    loss, previous = np.where(sources, 0, np.inf), np.full(sources.shape, -1)
    while True:
        through = loss[:, :, None] + step
        better = through.min(1) < loss - 1e-12  # the margin keeps rounding from cycling
        if not better.any():
            return loss, previous
        previous = np.where(better, through.argmin(1), previous)
        loss = np.where(better, through.min(1), loss)
