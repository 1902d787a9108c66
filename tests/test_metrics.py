"""Every measure against an independent float64 loop or a worked example, to 1e-6.

The loops know nothing of matrix products: they compare one pair of maps, or of pixels, at a time.
"""
import itertools
import math
import time

import numpy as np
import pytest
import torch

import metrics
from analysis.instances import average_precision, connected_components, rand_error

NAN = math.nan


def close(got, want, tol=1e-6):
    np.testing.assert_allclose(np.asarray(got, dtype=np.float64), want, rtol=0, atol=tol)


def sample_scores(samples, labels, num_classes=2, weights=None, empty=1.0, counts=None):
    pairs = metrics.Pairs(samples, labels, num_classes, weights, empty)
    return pairs.sample_scores(counts or (len(samples),))


def dice_present(pred, labels, num_classes=2, weights=None):
    return metrics.Pairs(pred[None], labels, num_classes, weights).dice_present(0)


def random_maps(seed, *shape, num_classes=2, ignored=0.0):
    rng = np.random.default_rng(seed)
    maps = rng.integers(num_classes, size=shape)
    maps[rng.random(shape) < ignored] = 255
    return torch.from_numpy(maps)


def random_probs(seed, *shape):
    logits = np.random.default_rng(seed).normal(0, 3, shape)
    return torch.from_numpy(logits).softmax(2)


def iou_loop(a, b, num_classes, empty):
    """IoU of two numpy maps, one class after the other."""
    valid = (a != 255) & (b != 255)
    ious = []
    for k in range(1, num_classes):
        x, y = (a == k) & valid, (b == k) & valid
        union = (x | y).sum()
        ious.append((x & y).sum() / union if union else empty)
    ious = [iou for iou in ious if not math.isnan(iou)]
    return np.mean(ious) if ious else 1.0


def ged_loop(samples, labels, weights, num_classes, empty):
    """Eq. 7 for one case: samples (n, *S), labels (A, *S), weights (A,) adding up to 1."""
    def d(a, b):
        return 1 - iou_loop(a, b, num_classes, empty)
    n = len(samples)
    cross = sum(w * d(s, y) for s in samples for y, w in zip(labels, weights)) / n
    within = sum(d(s, t) for s in samples for t in samples) / n**2
    marked = list(zip(labels, weights))
    return 2 * cross - within - sum(v * w * d(y, z) for y, v in marked for z, w in marked)


# ---- pairs of label maps ------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(13,), (6, 7), (3, 4, 5)])
@pytest.mark.parametrize("num_classes, empty", [(2, 1.0), (4, 1.0), (4, NAN), (9, NAN)])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_pairwise_iou_is_that_of_a_loop(shape, num_classes, empty, ignored):
    a = random_maps(1, 5, *shape, num_classes=num_classes, ignored=ignored)
    b = random_maps(2, 4, *shape, num_classes=num_classes, ignored=ignored)
    a[0], a[1], a[2], b[0], b[1], b[2] = 0, 1, 255, 0, 1, 255  # empty, full and ignored maps
    want = [[iou_loop(x, y, num_classes, empty) for y in b.numpy()] for x in a.numpy()]
    close(metrics.pairwise_iou(a, b, num_classes, empty), want)
    close(metrics.pairwise_iou(a.byte(), b, num_classes, empty), want)


def test_pairwise_iou_worked():
    a = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 0]])
    b = torch.tensor([[1, 1, 0, 2], [0, 1, 1, 0], [0, 0, 0, 0]])
    close(metrics.pairwise_iou(a, b, 3), [[(1 / 3 + 1) / 2, 1 / 2, 0], [0, 1 / 2, 1]])
    close(metrics.pairwise_iou(a, b, 3, empty=NAN), [[(1 / 3 + 1) / 2, 1 / 2, 0], [0, 0, 1]])
    a[0, 0] = 255
    close(metrics.pairwise_iou(a, b, 3)[0], [(1 / 2 + 1) / 2, 1 / 2, 0])


def test_chunks_and_batches_change_nothing(monkeypatch):
    samples = random_maps(3, 6, 3, 9, 8, num_classes=3, ignored=0.1)
    labels = random_maps(4, 3, 4, 9, 8, num_classes=3, ignored=0.1)
    probs = random_probs(5, 6, 3, 3, 9, 8)

    def all_scores(b):
        s, y, p = samples[:, b], labels[b], probs[:, b]
        scores = sample_scores(s, y, 3)
        return [*scores.values(), metrics.ged(s, y, 3),
                metrics.mode_frequencies(s, y, 3),
                metrics.ncc(p, y), metrics.gamma_map(p), metrics.uncertainty_map(p),
                metrics.dice(s[0], y, 3), dice_present(s[0], y, 3),
                metrics.hausdorff95(s[0], y[:, 0], 3), rand_error(s[0], y[:, 0])]
    whole = all_scores(slice(None))
    one_by_one = zip(*(all_scores(slice(b, b + 1)) for b in range(3)))
    monkeypatch.setattr(metrics, "BUDGET", 50)
    chunked = all_scores(slice(None))
    for all_at_once, parts, small in zip(whole, one_by_one, chunked):
        close(torch.cat(parts), all_at_once)
        close(small, all_at_once)


def test_counts_are_exact_in_large_volumes_and_under_autocast():
    maps = torch.ones(1, 2, 2**24 + 3, dtype=torch.uint8)  # a float32 sum would stop at 2^24
    maps[0, 1, :2] = 0
    inter, size = (counts[0] for counts in metrics._overlaps(maps, 2))
    assert inter.tolist() == [[[2**24 + 3, 2**24 + 1], [2**24 + 1, 2**24 + 1]]]
    assert size[0, 0, 0] == 2**24 + 3 and size[0, 1, 0] == 2**24 + 1
    a, b = maps[:, :1, :1000], maps[:, 1:, :1000]
    with torch.autocast("cpu", torch.bfloat16):  # 8 bits: 998 would become 1000
        close(metrics.pairwise_iou(a[0], b[0]), [[0.998]])


def test_autocast_rounds_no_score():
    samples = random_maps(60, 6, 2, 9, 8, num_classes=3)
    labels, probs = random_maps(61, 2, 3, 9, 8, num_classes=3), random_probs(62, 6, 2, 3, 9, 8)

    def scores():
        return torch.stack([*sample_scores(samples, labels, 3).values(),
                            metrics.ncc(probs, labels), metrics.dice(samples[0], labels, 3)])
    want = scores()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores(), want)


# ---- distributions over label maps --------------------------------------------------------------

@pytest.mark.parametrize("num_classes, empty", [(2, 1.0), (4, 1.0), (4, NAN)])
@pytest.mark.parametrize("n", [1, 5])
def test_ged_is_eq_6_and_7(num_classes, empty, n):
    samples = random_maps(6, n, 3, 5, 4, num_classes=num_classes)
    labels = random_maps(7, 3, 4, 5, 4, num_classes=num_classes, ignored=0.2)
    labels[:, 0] = random_maps(8, 3, 5, 4, num_classes=num_classes)  # no pixel without any label
    samples[0, 0], labels[0, 0], labels[1, 1], samples[0, 1] = 0, 0, 1, 1  # empty and full maps
    weights = torch.tensor([[.1, .2, .3, .4], [1, 0, 0, 0], [.5, .25, .25, 0]])
    for w in (None, weights):
        want = [ged_loop(samples[:, b].numpy(), labels[b].numpy(),
                         [.25] * 4 if w is None else w[b].tolist(), num_classes, empty)
                for b in range(3)]
        close(metrics.ged(samples, labels, num_classes, w, empty), want)


def test_ged_worked():
    a, b = torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 1])
    one = torch.stack([a])[:, None]  # one sample, one case
    close(metrics.ged(one, a[None, None]), [0])
    close(metrics.ged(one, b[None, None]), [2])
    close(metrics.ged(one, torch.stack([a, b])[None]), [1 - 0 - 1 / 2])
    both = torch.stack([a, b])[:, None]
    close(metrics.ged(both, torch.stack([a, b])[None]), [0])
    close(metrics.ged(0 * one, 0 * a[None, None]), [0])  # agreeing on absence is rewarded


def case(seed, annotators):
    """4 samples and some annotators of 2 cases, 3 classes."""
    return (random_maps(seed, 4, 2, 6, 5, num_classes=3),
            random_maps(seed + 1, 2, annotators, 6, 5, num_classes=3))


def scores(samples, labels, weights=None, num_classes=3):
    """All measures that take weights, (6, B)."""
    probs = torch.nn.functional.one_hot(samples, num_classes).movedim(-1, 2).double() * 0.8 + 0.1
    return torch.stack([*sample_scores(samples, labels, num_classes, weights).values(),
                        metrics.ncc(probs, labels, weights),
                        metrics.dice(samples[0], labels, num_classes, weights),
                        dice_present(samples[0], labels, num_classes, weights)]).double()


def test_annotators_without_weight_have_no_influence():
    samples, labels = case(9, annotators=3)
    want = scores(samples, labels)
    missing = torch.cat([labels, torch.full_like(labels[:, :1], 255)], 1)
    close(scores(samples, missing), want)
    close(scores(samples, missing, torch.full((2, 4), 0.25)), want)
    fourth = torch.cat([labels, case(11, annotators=1)[1]], 1)
    close(scores(samples, fourth, torch.tensor([[1., 1, 1, 0]] * 2)), want)
    changed = abs(scores(samples, fourth) - want) > 1e-3
    assert changed[[0, 2, 3, 4, 5]].any(1).all()  # all but the diversity


def test_weights_are_repeated_readers():
    samples, labels = case(13, annotators=2)
    weights = torch.tensor([[2 / 3, 1 / 3]] * 2)
    close(scores(samples, labels, weights), scores(samples, labels[:, [0, 0, 1]]))


def test_pixels_that_no_annotator_labelled_count_nowhere():
    samples, labels = case(15, annotators=3)
    labels[:, :, :2] = 255
    labels[0, 0] = 255  # one missing annotator does not hide what the others labelled
    want = scores(samples[:, :, 2:], labels[:, :, 2:])
    close(scores(samples, labels), want)
    without_weight = torch.cat([labels, case(17, annotators=1)[1]], 1)
    close(scores(samples, without_weight, torch.tensor([[1., 1, 1, 0], [1, 1, 1, 0]])), want)


def test_a_case_without_annotators_has_no_value():
    samples, labels = case(19, annotators=3)
    labels[1] = 255
    got = scores(samples, labels)
    assert got[:, 0].isfinite().all() and got[[0, 2, 3, 4, 5], 1].isnan().all()


def test_diversity_is_that_of_a_loop():
    samples = random_maps(17, 5, 2, 6, 5, num_classes=3, ignored=0.2)
    labels = torch.zeros(2, 1, 6, 5, dtype=torch.uint8)  # labelled everywhere: no pixel is left out
    want = [np.mean([[1 - iou_loop(s, t, 3, 1.0) for s in maps] for t in maps])
            for maps in samples.transpose(0, 1).numpy()]
    got = sample_scores(samples, labels, 3, counts=(1, 5))
    close(got["diversity_5"], want)
    close(got["diversity_1"], [0, 0])


@pytest.mark.parametrize("n, A", [(1, 1), (1, 3), (2, 3), (4, 2), (3, 3), (6, 2), (2, 6)])
def test_hungarian_iou_is_the_best_of_all_permutations(n, A):
    samples = random_maps(18, n, 2, 4, 4, num_classes=3, ignored=0.1)
    labels = random_maps(19, 2, A, 4, 4, num_classes=3, ignored=0.1)
    want = []
    for b in range(2):
        L = math.lcm(n, A)
        iou = np.array([[iou_loop(s, y, 3, 1.0) for y in labels[b].numpy()]
                        for s in samples[:, b].numpy()])
        repeated = np.repeat(np.repeat(iou, L // n, 0), L // A, 1)
        want.append(max(repeated[range(L), p].mean() for p in itertools.permutations(range(L))))
    close(sample_scores(samples, labels, 3)[f"hungarian_iou_{n}"], want)


@pytest.mark.parametrize("n, A", [(100, 4), (16, 12), (16, 7), (7, 16), (100, 7), (40, 40)])
def test_transport_on_a_line_is_sorting(n, A):
    """For costs (x - y)^2 the best matching pairs both sets in order."""
    rng = np.random.default_rng(n)
    x, y = rng.random(n), rng.random(A)
    L = math.lcm(n, A)
    want = -np.mean((np.sort(np.repeat(x, L // n)) - np.sort(np.repeat(y, L // A)))**2)
    start = time.perf_counter()
    close(metrics.transport(-(x - y[:, None])[None]**2, np.full((1, A), 1 / A)), [want], 1e-8)
    assert time.perf_counter() - start < 1


def test_transport_to_weights_is_the_best_of_all_permutations():
    """Annotators of 3, 2, 1 and 0 sixths, each repeated as often; three cases at once, and one that
    has no annotator."""
    rng, counts = np.random.default_rng(22), np.array([[3, 2, 1, 0], [0, 0, 6, 0], [1, 2, 1, 2]])
    value = rng.random((4, 4, 6)).round(1)  # with ties
    want = [max(value[b][np.repeat(range(4), counts[b])[list(p)], range(6)].mean()
                for p in itertools.permutations(range(6))) for b in range(3)]
    weights = np.concatenate([counts / 6, np.full((1, 4), NAN)])
    close(metrics.transport(value, weights), [*want, NAN])
    halves = metrics.transport(value[:3, :, :4], counts / 6)  # 4 samples: some go to two annotators
    twice = metrics.transport(value[:3, :, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]], counts / 6)
    close(halves, twice, 1e-9)


def test_sample_scores_are_the_single_functions():
    samples = random_maps(20, 5, 3, 6, 5, num_classes=3)
    labels = random_maps(21, 3, 4, 6, 5, num_classes=3)
    for weights, empty in ((None, 1.0), (torch.rand(3, 4), NAN)):
        got = sample_scores(samples, labels, 3, weights, empty, counts=(1, 3, 5))
        assert len(got) == 9
        for n in (1, 3, 5):
            first = samples[:n]
            close(got[f"ged_{n}"], metrics.ged(first, labels, 3, weights, empty))
            pairs = [metrics.pairwise_iou(s, s, 3, empty).mean() for s in first.unbind(1)]
            close(got[f"diversity_{n}"], 1 - torch.stack(pairs))
            alone = sample_scores(first, labels, 3, weights, empty)
            close(got[f"hungarian_iou_{n}"], alone[f"hungarian_iou_{n}"])
    assert got.keys() > sample_scores(samples, labels, 3).keys()  # of all five


def test_mode_frequencies():
    modes = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [255] * 4]])
    samples = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]])[:, None]
    # The second sample has IoU 2/3 with the first and the third mode.
    close(metrics.mode_frequencies(samples, modes), [[2.5 / 4, 1 / 4, 0.5 / 4, 0]])
    # Nothing predicted: all modes are equally far. Only the second mode has class 2.
    close(metrics.mode_frequencies(0 * samples, modes), [[1 / 3, 1 / 3, 1 / 3, 0]])
    modes[0, 1] *= 2
    close(metrics.mode_frequencies(2 * samples[2:3], modes, 3), [[0, 1, 0, 0]])


# ---- maps of uncertainty ------------------------------------------------------------------------

def gamma_loop(probs):
    """probs (n, K, P) -> (P,)"""
    mean, gamma = probs.mean(0), np.zeros(probs.shape[2])
    for s in probs:
        for k in range(len(mean)):
            gamma += -mean[k] * np.log(s[k] + 1e-8) / len(probs)
    return gamma


def ncc_loop(probs, labels, weights):
    """probs (n, K, P), labels (A, P)"""
    total = 0
    for y, w in zip(labels, weights):
        valid = np.flatnonzero(y != 255)
        error = np.array([-np.mean([np.log(s[y[i], i] + 1e-8) for s in probs]) for i in valid])
        gamma = gamma_loop(probs)[valid]
        if gamma.std() > 1e-12 and error.std() > 1e-12:
            total += w * np.corrcoef(gamma, error)[0, 1]
    return total


@pytest.mark.parametrize("n, K", [(1, 2), (6, 2), (6, 4)])
def test_gamma_map_and_ncc_are_those_of_a_loop(n, K):
    probs = random_probs(22, n, 2, K, 5, 6)
    labels = random_maps(23, 2, 3, 5, 6, num_classes=K, ignored=0.2)
    labels[0, 0], labels[0, 1] = 0, 1  # an empty and a full map
    weights = torch.tensor([[.2, .3, .5], [.6, .4, 0]], dtype=torch.float64)
    flat_probs, flat_labels = probs.flatten(3).numpy(), labels.flatten(2).numpy()
    close(metrics.gamma_map(probs).flatten(1), [gamma_loop(flat_probs[:, b]) for b in (0, 1)])
    for w in (None, weights):
        want = [ncc_loop(flat_probs[:, b], flat_labels[b], [1 / 3] * 3 if w is None else w[b])
                for b in (0, 1)]
        close(metrics.ncc(probs, labels, w), want)
        close(metrics.ncc(probs.float(), labels, w), want, 1e-5)


def error_loop(probs, labels, weights):
    """probs (n, K, P), labels (A, P) -> E_y,s[CE(y, s)], pixel after pixel, (P,)"""
    out = np.zeros(labels.shape[1])
    for i in range(labels.shape[1]):
        there = [(w, y[i]) for w, y in zip(weights, labels) if y[i] != 255]
        total = sum(w for w, _ in there)
        for w, k in there:
            out[i] -= w / total * np.mean([np.log(s[k, i] + 1e-8) for s in probs]) if total else 0
    return out


def test_error_map_is_that_of_a_loop():
    probs = random_probs(22, 4, 2, 3, 5, 6)
    labels = random_maps(23, 2, 3, 5, 6, num_classes=3, ignored=0.2)
    labels[0, :, 0, 0] = 255  # nobody knows
    weights = torch.tensor([[.2, .3, .5], [.6, .4, 0]], dtype=torch.float64)
    flat_probs, flat_labels = probs.flatten(3).numpy(), labels.flatten(2).numpy()
    for w in (None, weights):
        want = [error_loop(flat_probs[:, b], flat_labels[b], [1 / 3] * 3 if w is None else w[b])
                for b in (0, 1)]
        close(metrics.error_map(probs, labels, w).flatten(1), want)
    assert metrics.error_map(probs, labels)[0, 0, 0] == 0


def test_error_map_of_annotators_who_are_the_samples_is_the_gamma_map():
    """Fig. 3 of the PHiSeg paper: both maps match in a perfect model."""
    maps = random_maps(31, 6, 1, 4, 5, num_classes=3)
    probs = torch.nn.functional.one_hot(maps, 3).movedim(-1, 2).double()
    close(metrics.error_map(probs, maps[:, 0][None]), metrics.gamma_map(probs))
    close(metrics.ncc(probs, maps[:, 0][None]).clamp(max=0.1), [0.1])


def test_ncc_of_constant_maps_is_zero():
    labels = random_maps(24, 1, 2, 5, 6)
    for p in (0.0, 0.1, 0.3, 1.0):
        flat = torch.tensor([1 - p, p]).view(1, 1, 2, 1, 1).expand(7, 1, 2, 5, 6)
        close(metrics.ncc(flat, labels), [0], 0)
    rounded = torch.full((7, 1, 2, 5, 6), 0.5) * (1 + 1e-7 * random_maps(30, 7, 1, 2, 5, 6))
    assert rounded.unique().numel() == 2
    close(metrics.ncc(rounded, labels), [0], 0)
    close(metrics.uncertainty_map(rounded), np.zeros((1, 5, 6)), 1e-3)
    assert metrics.ncc(flat * NAN, labels).isnan()  # a broken model is not a constant one


def test_ncc_worked():
    # One sample of two values, 0.9 and 0.6: gamma is larger at 0.6, and so is the error of an
    # annotator who marks the more probable class; of one who marks the other, it is larger at 0.9.
    p = torch.tensor([0.9, 0.9, 0.6, 0.6])
    probs, label = torch.stack([1 - p, p])[None, None], torch.ones(1, 1, 4, dtype=torch.long)
    close(metrics.ncc(probs, label), [1])
    close(metrics.ncc(probs, 1 - label), [-1])
    weights = torch.tensor([[0.75, 0.25]])
    close(metrics.ncc(probs, torch.cat([label, 1 - label], 1), weights), [0.5])


def test_ncc_does_not_see_ignored_pixels():
    probs, labels = random_probs(26, 5, 1, 2, 6, 6), random_maps(27, 1, 3, 6, 6)
    labels[:, :, 4:] = 255
    close(metrics.ncc(probs, labels), metrics.ncc(probs[..., :4, :], labels[..., :4, :]))


def test_gamma_map_in_half_precision_is_finite():
    hard = torch.nn.functional.one_hot(random_maps(28, 4, 1, 5, 5), 2).movedim(-1, 2)
    want = metrics.gamma_map(hard.double())
    assert want.max() > 1
    close(metrics.gamma_map(hard.half()), want, 1e-5)


def test_moments_are_those_of_all_samples_at_once():
    probs = random_probs(63, 7, 2, 3, 6, 5)
    labels = random_maps(64, 2, 3, 6, 5, num_classes=3)
    moments = metrics.Moments()
    for sample in probs:
        moments.add(sample)
    exact = probs.double()
    close(moments.mean, exact.mean(0))
    close(moments.mean_log, (exact + 1e-8).log().mean(0))
    close(moments.variance, exact.var(0, correction=0).sum(1))
    close(metrics.entropy_map(moments), -(exact.mean(0) * exact.mean(0).log()).sum(1))
    for measure in (metrics.gamma_map, metrics.uncertainty_map):
        assert torch.equal(measure(moments), measure(probs))
    assert torch.equal(metrics.ncc(moments, labels), metrics.ncc(probs, labels))


def test_entropy_of_a_certain_pixel_is_zero():
    probs = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]])[None, None]  # (1, 1, 2, 3)
    close(metrics.entropy_map(probs), [[0, math.log(2), 0]])


def test_uncertainty_map():
    probs = random_probs(29, 6, 2, 3, 4, 5)
    var = probs.numpy().var(0).sum(1)
    close(metrics.uncertainty_map(probs), var / var.max((1, 2), keepdims=True))
    for constant in (probs[:1], probs[:1].expand(7, -1, -1, -1, -1).float()):
        close(metrics.uncertainty_map(constant), np.zeros((2, 4, 5)), 0)
    hard = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 2, 1]], [[0, 1, 1, 2]]]), 3)
    close(metrics.uncertainty_map(hard.movedim(-1, 2).float()), [[0, 0, 1, 1]])


# ---- one prediction and its references ----------------------------------------------------------

def dice_loop(pred, labels, weights, num_classes, only_present):
    """pred (*S), labels (A, *S)"""
    total = count = 0
    for y, w in zip(labels, weights):
        valid = (y != 255) & (pred != 255)
        for k in range(1, num_classes):
            a, b = (pred == k) & valid, (y == k) & valid
            if b.any() or not only_present:
                size = a.sum() + b.sum()
                total += w * (2 * (a & b).sum() / size if size else 1)
                count += w
    return total / count if count else NAN


@pytest.mark.parametrize("num_classes", [2, 4])
def test_dice_is_that_of_a_loop(num_classes):
    pred = random_maps(30, 4, 3, 4, num_classes=num_classes)
    labels = random_maps(31, 4, 3, 3, 4, num_classes=num_classes, ignored=0.2)
    pred[0], labels[0, 0], pred[1], labels[1, 1] = 0, 0, 1, 1  # empty and full maps
    labels[2] = 0
    weights = torch.tensor([.2, .3, .5]).expand(4, 3)
    for w in (None, weights):
        for measure, only_present in ((metrics.dice, False), (dice_present, True)):
            want = [dice_loop(pred[b].numpy(), labels[b].numpy(),
                              [1] * 3 if w is None else w[b].tolist(), num_classes, only_present)
                    for b in range(4)]
            close(measure(pred, labels, num_classes, w), want)
    assert dice_present(pred, labels, num_classes)[2].isnan()
    both = torch.stack([pred, pred.flip(0)])
    close(metrics.Pairs(both, labels, num_classes, weights).sample_dice(),
          torch.stack([metrics.dice(p, labels, num_classes, weights) for p in both]))


def test_dice_worked():
    pred = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    labels = torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 0]]] * 3)
    close(metrics.dice(pred, labels), [(2 / 3 + 0) / 2, (0 + 1) / 2, (1 + 0) / 2])
    close(dice_present(pred, labels), [2 / 3, 0, 1])


def hausdorff_loop(a, b):
    def surface(mask):
        points = []
        for p in np.argwhere(mask):
            for axis in range(mask.ndim):
                for step in (-1, 1):
                    q = p.copy()
                    q[axis] += step
                    if not 0 <= q[axis] < mask.shape[axis] or not mask[tuple(q)]:
                        points.append(tuple(p))
        return [np.array(p) for p in sorted(set(points))]
    a, b = surface(a), surface(b)
    if not a or not b:
        return 0.0 if len(a) == len(b) else NAN
    distances = [min(np.linalg.norm(p - q) for q in b) for p in a]
    distances += [min(np.linalg.norm(p - q) for p in a) for q in b]
    return np.percentile(distances, 95)


@pytest.mark.parametrize("shape", [(11,), (9, 12), (5, 6, 7)])
def test_hausdorff95_is_that_of_a_loop(shape):
    pred = random_maps(32, 4, *shape, num_classes=4)
    label = random_maps(33, 4, *shape, num_classes=4)
    pred[0], pred[1], label[1] = 0, 1, 1  # empty, both full
    label[2][random_maps(34, *shape, num_classes=5) == 0] = 255
    pred[3, :-2] = 1  # with an inside
    valid = (label != 255).numpy()
    want = [[hausdorff_loop((p == k) & v, (y == k) & v) for k in (1, 2, 3)]
            for p, y, v in zip(pred.numpy(), label.numpy(), valid)]
    close(metrics.hausdorff95(pred, label, 4), want)


def test_hausdorff95_in_millimetres_and_its_mistakes():
    """One pixel each, 3 rows and 4 columns apart, of 2 x 0.5 mm: sqrt(36 + 4)."""
    pred, label = torch.zeros(2, 1, 9, 9, dtype=torch.uint8)
    pred[0, 1, 1] = label[0, 4, 5] = 1
    close(metrics.hausdorff95(pred, label), [[5]])
    for spacing in ((2, 0.5), np.array([2, 0.5]), torch.tensor([2, 0.5])):
        close(metrics.hausdorff95(pred, label, spacing=spacing), [[40**0.5]])
    for other in (label[:, None], label[..., :1], label.float()):  # all annotators', a part, scores
        with pytest.raises(ValueError):
            metrics.hausdorff95(pred, other)


def test_classes_above_k_are_refused():
    maps = torch.tensor([[[[0, 1, 2, 255]]]])
    for value in (3, 254, 257, -1):
        for place in (2, 3):
            wrong = maps.clone()
            wrong[..., place] = value
            with pytest.raises(ValueError, match="label maps hold"):
                metrics.ged(maps, wrong, 3)
    close(metrics.ged(maps, maps, 3), [0])
    with pytest.raises(ValueError, match="class 2 or higher"):  # masks of 0 and 254, K forgotten
        metrics.dice(torch.full((1, 4), 254), torch.ones(1, 1, 4, dtype=torch.long))


def test_hausdorff95_worked():
    pred, label = torch.zeros(3, 9, 9, dtype=torch.long), torch.zeros(3, 9, 9, dtype=torch.long)
    pred[0, 1, 1] = label[0, 4, 5] = pred[1, 1, 1] = 1
    close(metrics.hausdorff95(pred, label), [[5], [NAN], [0]])
    # A 5 x 5 square, and the same with a hole: the hole's 4 neighbours, new surface, are 1 away
    # from the 16 pixels of the square's rim, which are 0 away from themselves in either direction.
    pred[2, 2:7, 2:7] = label[2, 2:7, 2:7] = 1
    pred[2, 4, 4] = 0
    close(metrics.hausdorff95(pred, label)[2], [np.percentile([0] * 32 + [1] * 4, 95)])


# ---- instances ----------------------------------------------------------------------------------

def rand_loop(pred, target):
    """Over all ordered pairs of foreground pixels. As in SNEMI3D's script, a pixel of pred 0 is only
    paired with itself, and counts 1 / (number of pixels)."""
    pixels = [(p, t, i) for i, (p, t) in enumerate(zip(pred.ravel(), target.ravel())) if t]
    both = within_pred = within_target = 0
    for (p, t, i), (q, u, j) in itertools.product(pixels, pixels):
        same_pred, same_target = p == q and p > 0, t == u
        if i == j and not p:
            same_pred = 1 / pred.size
        both, within_pred = both + same_pred * same_target, within_pred + same_pred
        within_target += same_target
    if not pixels:
        return NAN
    precision, recall = both / within_pred, both / within_target
    return 1 - 2 * precision * recall / (precision + recall)


def test_rand_error_is_that_of_a_loop():
    pred, target = random_maps(35, 5, 6, 7, num_classes=5), random_maps(36, 5, 6, 7, num_classes=4)
    target[0] = 0
    pred[1] = 0
    pred[2] = 3
    target[3] = 255  # an id like others
    want = [rand_loop(p, t) for p, t in zip(pred.numpy(), target.numpy())]
    assert math.isnan(want[0])
    close(rand_error(pred, target), want)
    close(rand_error(pred * 1000, target.byte()), want)


def test_rand_error_worked():
    target = torch.tensor([[1, 1, 2, 2, 0]])
    close(rand_error(torch.tensor([[7, 7, 300, 300, 300]]), target), [0])
    # merged: precision 8/16, recall 1, F = 2/3; split: precision 1, recall 4/8
    close(rand_error(torch.tensor([[7, 7, 7, 7, 0]]), target), [1 / 3])
    close(rand_error(torch.tensor([[1, 2, 3, 4, 0]]), target), [1 / 3])
    # nothing found: precision 1, recall (4/5) / 8, F = 2/11
    close(rand_error(torch.tensor([[0, 0, 0, 0, 1]]), target), [9 / 11])


def test_average_precision_worked():
    target = torch.tensor([[1] * 10 + [2] * 10 + [0] * 10])
    equal = torch.ones(target.shape)
    close(average_precision(target * 200, target, equal)["ap"], [1])
    # Object 1 found with IoU 0.8 (above 0.50 .. 0.75, not above 0.80), 2 missed, 3 false.
    pred = torch.tensor([[1] * 8 + [0] * 12 + [3] * 10])
    sure = torch.tensor([[0.9] * 20 + [0.6] * 10])
    # The right one first: points (recall, precision) (0, 1), (1/2, 1), (1/2, 1/2).
    got = average_precision(pred, target, sure)
    close(got["ap50"], [1 / 2])
    close(got["ap"], [6 / 10 * 1 / 2])
    # The false one first: (0, 1), (0, 0), (1/2, 1/2).
    close(average_precision(pred, target, 1 - sure)["ap50"], [1 / 8])
    # No order: (0, 1), (1/2, 1/2).
    close(average_precision(pred, target, equal)["ap50"], [(1 + 1 / 2) / 2 / 2])
    close(average_precision(0 * pred, target, equal)["ap"], [0])
    for p in (pred, 0 * pred):
        close(average_precision(p, 0 * target, equal)["ap"], [NAN])


def average_precision_loop(pred, target, confidence, percent):
    ids, targets = ([i for i in np.unique(maps) if i] for maps in (pred, target))

    def found(i):
        return any(100 * ((pred == i) & (target == j)).sum() >
                   percent * ((pred == i) | (target == j)).sum() for j in targets)
    ids.sort(key=lambda i: -confidence[pred == i].mean())
    area, hits, recall, precision = 0, 0, 0, 1
    for rank, i in enumerate(ids, 1):
        hits += found(i)
        area += (hits / len(targets) - recall) * (hits / rank + precision) / 2
        recall, precision = hits / len(targets), hits / rank
    return area


def test_average_precision_is_that_of_a_loop():
    rng = np.random.default_rng(37)
    target = np.kron(rng.integers(6, size=(3, 4, 4)), np.ones((1, 4, 4), dtype=int))
    pred = np.where(rng.random(target.shape) < 0.2, rng.integers(7, size=target.shape), target)
    confidence = rng.random(target.shape)
    want = [[average_precision_loop(*maps, percent) for percent in range(50, 100, 5)]
            for maps in zip(pred, target, confidence)]
    got = average_precision(*map(torch.from_numpy, (pred, target, confidence)))
    close(got["ap"], np.mean(want, 1))
    close(got["ap50"], np.array(want)[:, 0])
    assert 0.05 < got["ap"].mean() < 0.95


# ---- statistics over cases ----------------------------------------------------------------------

def test_groups_may_be_lists_arrays_and_tensors():
    values, groups = np.arange(8.0) - 2, [0, 0, 0, 0, 1, 1, 1, 1]
    for given in (np.array(groups), torch.tensor(groups)):
        assert metrics.bootstrap(values, given) == metrics.bootstrap(values, groups)
        assert metrics.paired_test(values, 0 * values, given) == metrics.paired_test(
            values, 0 * values, groups)
        assert (metrics.resampled(given) == metrics.resampled(groups)).all()


def test_bootstrap():
    values = np.random.default_rng(39).normal(3, 2, 400)
    got = metrics.bootstrap(values)
    assert got["n"] == 400 and got["mean"] == pytest.approx(values.mean(), abs=1e-12)
    stderr = values.std() / 20  # s / sqrt(n), which 1000 resamples give to about 2%
    assert got["stderr"] == pytest.approx(stderr, rel=0.1)
    assert metrics.bootstrap(torch.tensor([*values, NAN])) == got  # undefined cases are left out
    assert metrics.bootstrap(values, seed=1) != got
    few = metrics.bootstrap(values, resamples=10)
    assert few["mean"] == got["mean"] and few["stderr"] != got["stderr"]
    spread = [metrics.bootstrap([0, 1, 2, 3], resamples=20_000), metrics.bootstrap([0, 1] * 20)]
    assert spread[0]["stderr"] == pytest.approx(np.std([0, 1, 2, 3], ddof=1) / 2, rel=0.02)
    assert spread[1]["stderr"] == pytest.approx(0.5 / 39**0.5, rel=0.1)
    assert metrics.bootstrap([0.25]) == dict(mean=0.25, stderr=0.0, n=1)
    none = metrics.bootstrap([NAN, NAN])
    assert none["n"] == 0 and math.isnan(none["mean"])


def test_paired_test_worked():
    # Of the 8 patterns of signs of (1, 2, 3), only +++ and --- reach a sum of 6.
    assert metrics.paired_test([2, 4, 6], [1, 2, 3]) == 2 / 8
    assert metrics.paired_test([2, 4, 6, NAN, 1], [1, 2, 3, 5, NAN]) == 2 / 8
    # (1, 2, -3) adds up to 0: every pattern reaches that. (-1, 2, 3): +++, -++ and their opposites.
    assert metrics.paired_test([1, 2, -3], [0, 0, 0]) == 1
    assert metrics.paired_test([-1, 2, 3], [0, 0, 0]) == 4 / 8
    assert metrics.paired_test([1, 1], [1, 1]) == 1
    assert metrics.paired_test([0.1] * 16, torch.zeros(16)) == 2 / 2**16
    assert metrics.paired_test([-.5, -.5, -.1, -.1], [0] * 4) == 2 / 16  # whatever the rounding


def test_paired_test_of_many_cases_is_near_the_normal_one():
    a = np.random.default_rng(40).normal(0.1, 1, 500)
    z = abs(a.sum()) / np.sqrt((a**2).sum())
    p = metrics.paired_test(a, np.zeros(500))
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
    assert p == metrics.paired_test(np.zeros(500), a)  # two-sided
    assert p != metrics.paired_test(a, np.zeros(500), seed=1)
    assert metrics.paired_test(np.ones(500), np.zeros(500), resamples=99) == 1 / 100


def test_the_cases_of_a_patient_count_as_one():
    """Each case three times, as three slices of one patient: the same p and the same error."""
    values = np.random.default_rng(41).normal(0.5, 1, 12)
    slices, patients = np.repeat(values, 3), np.repeat(np.arange(12), 3)
    want = metrics.bootstrap(values)
    got = metrics.bootstrap(slices, patients)
    assert got["n"] == 36 and got["mean"] == pytest.approx(want["mean"], abs=1e-12)
    assert got["stderr"] == pytest.approx(want["stderr"], rel=1e-9)
    assert metrics.bootstrap(slices)["stderr"] < 0.7 * got["stderr"]
    p = metrics.paired_test(values, np.zeros(12))
    assert metrics.paired_test(slices, np.zeros(36), patients) == p
    assert metrics.paired_test(slices, np.zeros(36)) < p
    # (1, 2 | 3 | NaN): of the signs of the sums 3 and 3, two of four patterns reach 6
    assert metrics.paired_test([1, 2, 3, NAN], [0] * 4, ["a", "a", "b", "c"]) == 2 / 4
    assert metrics.bootstrap([1, 2, NAN], ["a", "a", "b"]) == dict(mean=1.5, stderr=0.0, n=2)


def test_resampled_draws_whole_groups():
    draws = metrics.resampled(["b", "a", "b", "c"], times=500)
    assert draws.shape == (500, 4) and (draws[:, 0] == draws[:, 2]).all()
    assert (draws[:, [0, 1, 3]].sum(1) == 2).all() and abs(draws.mean(0) - 2 / 3).max() < 0.15


# ---- mistakes, and speed ------------------------------------------------------------------------

MAPS, IDS = torch.zeros(4, 2, 8, 8, dtype=torch.long), torch.zeros(2, 8, 8, dtype=torch.long)


@pytest.mark.parametrize("call, message", [
    (lambda: metrics.ged(MAPS, MAPS[:2, :, :7]), "share B and"),
    (lambda: metrics.ged(MAPS, MAPS), "share B and"),
    (lambda: metrics.ged(MAPS.float(), MAPS[:2]), "must be integers"),
    (lambda: metrics.dice(IDS, IDS), "share B and"),
    (lambda: rand_error(IDS, IDS[:1]), "shorter"),
    (lambda: metrics.paired_test([1, 2], [1, 2, 3]), "shapes"),
])
def test_mistakes_are_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_ged_is_far_faster_than_a_loop_over_pairs():
    y, x = np.mgrid[:128, :128]
    lesions = np.random.default_rng(41).normal((64, 64, 14), 4, (104, 3))  # of the size of LIDC's
    maps = np.stack([(y - cy)**2 + (x - cx)**2 < r**2 for cy, cx, r in lesions]).astype(np.uint8)
    samples, labels = torch.from_numpy(maps[:100, None]), torch.from_numpy(maps[None, 100:])
    start = time.perf_counter()
    want = ged_loop(maps[:100], maps[100:], [0.25] * 4, 2, 1.0)
    slow = time.perf_counter() - start
    fast = []
    for _ in range(10):
        start = time.perf_counter()
        got = metrics.ged(samples, labels)
        fast.append(time.perf_counter() - start)
    close(got, [want])
    assert slow / min(fast) > 50


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (7, 30), (50, 20)):
        positive, negative = rng.integers(0, 9, n) / 3, rng.integers(-2, 6, m) / 3  # many ties
        pairs = [1.0 if p > q else 0.5 if p == q else 0.0 for p in positive for q in negative]
        assert abs(metrics.auroc(positive, negative) - sum(pairs) / len(pairs)) < 1e-12
        assert abs(metrics.auroc(negative, positive) - 1 + sum(pairs) / len(pairs)) < 1e-12
    assert metrics.auroc(torch.tensor([2.0, math.nan]), [1.0, 3.0, math.nan]) == 0.5
    assert metrics.auroc([1, 1], [1, 1, 1]) == 0.5
    assert math.isnan(metrics.auroc([], [1.0]))


def flood_fill(mask):
    """mask (H, W) -> ids by a stack of pixels, 4-connected."""
    ids, count = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask)):
        if ids[start]:
            continue
        count, stack = count + 1, [start]
        while stack:
            y, x = stack.pop()
            inside = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
            if inside and mask[y, x] and not ids[y, x]:
                ids[y, x] = count
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return ids


def test_connected_components_are_those_of_a_flood_fill():
    masks = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(3)) < 0.6
    spiral = torch.zeros(20, 30, dtype=torch.bool)  # one long snake
    spiral[::2] = True
    spiral[1::4, -1] = spiral[3::4, 0] = True
    masks = torch.cat([masks, spiral[None], torch.zeros(1, 20, 30, dtype=torch.bool)])
    for ids, mask in zip(connected_components(masks), masks):
        want = torch.from_numpy(flood_fill(mask.numpy()))
        pairs = torch.stack([ids, want]).flatten(1).unique(dim=1)
        assert pairs.shape[1] == len(ids.unique()) == len(want.unique())  # a renaming
        assert torch.equal(ids == 0, ~mask)


def test_connected_components_of_a_volume():
    mask = torch.zeros(1, 3, 3, 3, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[0, 1, 0, 0] = mask[0, 2, 1, 0] = True  # the third meets at an edge
    ids = connected_components(mask)[0]
    assert ids[0, 0, 0] == ids[1, 0, 0] != ids[2, 1, 0] != 0
