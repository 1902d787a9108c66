"""Calibration, failure detection and set measures against loops over pixels, and what theory says
of a model that knows the true distribution."""
import itertools
import math

import numpy as np
import pytest
import torch

import data
import evaluate
import metrics
from analysis import uncertainty
from analysis.uncertainty import (annotators_mean, areas, calibration,
                                  calibration_error, failure_detection, pixel_measures,
                                  risk_coverage, score_measures, set_measures, worst_window)
from test_evaluate import Oracle
from test_metrics import close, random_maps, random_probs

WEIGHTS = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.0, 0.8]])


def case():
    """p (2, 3, 7, 6), labels (2, 3, 7, 6) with ignored pixels, one of them by all."""
    labels = random_maps(1, 2, 3, 7, 6, num_classes=3, ignored=0.2)
    labels[:, :, 0, 0] = 255
    return random_probs(2, 1, 2, 3, 7, 6)[0], labels


def shares_loop(labels, weights, k, pixel):
    """q of one class and pixel of labels (A, *S), or None where nobody labelled it."""
    given = [(w, y[pixel]) for w, y in zip(weights.tolist(), labels.numpy()) if y[pixel] != 255]
    total = sum(w for w, _ in given)
    return sum(w for w, y in given if y == k) / total if total else None


def pairs_of_probabilities(p, labels, weights, num_classes=3):
    """(p, q) of every class at every labelled pixel: {class: [(p, q), ...]} of all cases."""
    out = {k: [] for k in range(num_classes)}
    for b, pixel in itertools.product(range(len(p)), np.ndindex(*p.shape[2:])):
        for k in range(num_classes):
            q = shares_loop(labels[b], weights[b], k, pixel)
            if q is not None:
                out[k].append((p[b, k][pixel].item(), q))
    return out


def test_annotators_mean_and_brier_are_those_of_a_loop():
    p, labels = case()
    q, valid = annotators_mean(labels, 3, WEIGHTS)
    brier = pixel_measures(p, labels, WEIGHTS)["brier"]
    for b in range(2):
        squares = []
        for pixel in np.ndindex(7, 6):
            want = [shares_loop(labels[b], WEIGHTS[b], k, pixel) for k in range(3)]
            assert valid[b][pixel] == (want[0] is not None)
            if want[0] is None:
                continue
            close(q[(b, slice(None), *pixel)], want)
            for w, y in zip(WEIGHTS[b].tolist(), labels[b].numpy()):
                if y[pixel] != 255:
                    share = w / sum(v for v, z in zip(WEIGHTS[b].tolist(), labels[b].numpy())
                                    if z[pixel] != 255)
                    squares.append(share * sum((p[b, k][pixel].item() - (y[pixel] == k))**2
                                               for k in range(3)))
        close(brier[b], sum(squares) / int(valid[b].sum()))


@pytest.mark.parametrize("region, chosen", [
    (0, lambda p, q: True), (1, lambda p, q: p > 0.05 or q > 0.05),
    (2, lambda p, q: 0.05 < p < 0.95 or 0.05 < q < 0.95)])
def test_calibration_errors_are_those_of_a_loop(region, chosen):
    p, labels = case()
    p = (p * 200).floor().clamp(max=199) / 200 + 0.0025
    sums = pixel_measures(p, labels, WEIGHTS)["reliability"].sum(0)[region].numpy()
    found = pairs_of_probabilities(p, labels, WEIGHTS)
    points = [(x, q) for k in (1, 2) for x, q in found[k] if chosen(x, q)]
    want = sum(abs(sum(x - q for x, q in points if i / 20 <= x < (i + 1) / 20)) for i in range(20))
    close(calibration_error(sums), want / len(points))


def test_calibration_worked():
    """Half of the pixels at p = 0.3, of which one in ten is marked; the others at 0.6, all so."""
    p = torch.cat([torch.full((10,), 0.3), torch.full((10,), 0.6)]).expand(1, 2, 20)
    labels = torch.tensor([[[1] + [0] * 9 + [1] * 10]])
    got = pixel_measures(p, labels, torch.ones(1, 1))
    out = calibration(got["reliability"].numpy(), ["a"])
    for name in ("ece", "ece_foreground", "ece_band"):
        close(out[name]["mean"], (0.2 + 0.4) / 2)
        assert out[name]["n"] == 1 and out[name]["stderr"] < 1e-12
    # Dice above 0.1: 20 and 11 pixels; above 0.3 and 0.5: 10 and 11 with 10 in both; else none
    close(got["dice_soft"], (22 / 31 + 2 * 20 / 21) / 5)


def test_set_measures_are_those_of_a_loop():
    samples = random_maps(3, 5, 2, 7, 6, num_classes=3)
    labels = random_maps(4, 2, 3, 7, 6, num_classes=3, ignored=0.2)
    for weights in (torch.full((2, 3), 1 / 3), WEIGHTS):
        pairs = metrics.Pairs(samples, labels, 3, weights)
        got = set_measures(pairs, 5, (2, 5))
        for b, n in itertools.product(range(2), (2, 5)):
            dice = np.array([[metrics.dice(s[None], y[None, None], 3).item() for s in samples[:, b]]
                             for y in labels[b]])[:, :n]  # (A, n)
            w = weights[b].numpy().astype(float)
            close(got[f"dice_max_{n}"][b], (w * dice.max(1)).sum())
            there = np.flatnonzero(w)
            orders = list(itertools.permutations(range(n), len(there)))
            want = max((w[there] * dice[there, order]).sum() for order in orders) if orders else 0
            close(got[f"dice_match_{n}"][b], want if orders else math.nan)
            crps = []
            for y in labels[b].numpy():
                volumes = [((s.numpy() > 0) & (y != 255)).sum() for s in samples[:, b]]
                marked = ((y > 0) & (y != 255)).sum()
                spread = np.mean([abs(v - u) for v in volumes for u in volumes])
                crps.append(np.mean([abs(v - marked) for v in volumes]) - spread / 2)
            close(got["volume_crps"][b], (w * crps).sum())


def test_a_case_without_annotators_has_no_value_and_harms_none():
    samples, (p, labels) = random_maps(5, 4, 2, 7, 6, num_classes=3), case()
    labels[1] = 255
    pairs = metrics.Pairs(samples, labels, 3)
    got = set_measures(pairs, 4, (4,)) | pixel_measures(p, labels, pairs.weights)
    reliability = got.pop("reliability")
    for name, values in got.items():
        assert values[0].isfinite() and values[1].isnan(), name
    assert reliability[1].sum() == 0 < reliability[0, 0, :, 2].sum()


def test_entropies_add_up_and_equal_samples_agree():
    probs, labels = random_probs(6, 5, 2, 3, 12, 11), random_maps(7, 2, 1, 12, 11, num_classes=3)
    labels[:, :, :4] = 255
    got = score_measures(metrics.Moments(probs), labels)
    mean = probs.mean(0)
    whole = -(mean * mean.log()).sum(1)[:, 4:]
    each = -(probs * probs.log()).sum(2).mean(0)[:, 4:]
    close(got["entropy"], whole.mean((1, 2)))
    close(got["expected_entropy"], each.mean((1, 2)))
    close(got["mutual_information"], (whole - each).mean((1, 2)))
    close(got["entropy"], got["expected_entropy"] + got["mutual_information"])
    same = score_measures(metrics.Moments(probs[:1].expand(7, -1, -1, -1, -1)), labels)
    for name in ("mutual_information", "mutual_information_patch", "variance_patch"):
        assert (same[name] == 0).all() and (got[name] > 0).all()


def test_the_worst_window_is_that_of_a_loop():
    maps = torch.from_numpy(np.random.default_rng(8).random((2, 13, 4)))
    want = maps.unfold(1, 10, 1).mean((2, 3)).amax(1)  # the second axis is shorter than 10
    close(worst_window(maps), want)
    close(worst_window(maps, 3), [max(m[i:i + 3, j:j + 3].mean() for i in range(11)
                                      for j in range(2)) for m in maps])


def test_risk_coverage_worked():
    """Risks 0, 1, 0.5 in the order of the scores: 1/1 .. 3/3 kept."""
    scores, risks = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.5])
    risk, general = risk_coverage(scores, risks)
    close(risk, [0, 0.5, 0.5])
    close(general, [0, 1 / 3, 0.5])
    aurc, excess, augrc = areas(scores, risks)
    close(aurc, (0 + 0.25 + 0.5) / 3)  # trapezoids of 0, 0, 1/2, 1/2
    close(excess, aurc - (0 + 0.125 + 0.375) / 3)  # ideal: 0, 0, 1/4, 1/2
    close(augrc, (0 + 1 / 6 + 5 / 12) / 3)
    close(areas(risks, risks)[1], 0)


def test_images_of_equal_score_come_in_a_random_order():
    scores, risks = np.array([1, 0, 1, 1, 2.0]), np.array([0.2, 0.9, 0.5, 0.1, 0.4])
    orders = [areas(scores + 1e-6 * np.array([a, 0, b, c, 0]), risks)
              for a, b, c in itertools.permutations(range(3))]
    close(areas(scores, risks), np.mean(orders, 0))
    close(areas(0 * scores, risks)[0], risks.mean())
    close(areas(0 * scores, risks)[2], risks.mean() / 2)


def test_cases_without_dice_are_left_out():
    values = {name: np.array([1.0, 2.0, 3.0, 0.0]) for name in uncertainty.SCORES}
    values["dice_mean"] = np.array([1.0, 0.0, 0.5, math.nan])
    out = failure_detection(values, range(4))
    assert out["aurc_entropy"]["n"] == 3 and len(out) == 3 * len(uncertainty.SCORES)
    close(out["aurc_entropy"]["mean"], (0 + 0.25 + 0.5) / 3)
    assert failure_detection({k: v[3:] for k, v in values.items()}, [0]) == {}


def test_true_draws_are_calibrated_and_know_where_they_fail():
    """On `shapes` the probabilities are known: a sampler that draws by them scores as it should,
    one that always gives the likeliest map is calibrated nowhere."""
    shapes = data.load("shapes", "test", n=150, size=32)
    values = evaluate.score(Oracle(shapes), shapes, samples=(400,))
    out = calibration(values["reliability"], shapes.groups)
    out |= failure_detection(values, shapes.groups)
    for region in uncertainty.REGIONS:
        assert out[f"ece{region}"]["mean"] < 0.01
    # its expected risk is the true one: the order of cases, and so the area, is all but ideal
    assert out["e_aurc_disagreement"]["mean"] < 0.005 < out["e_aurc_variance"]["mean"]
    assert out["aurc_disagreement"]["mean"] < 0.85 * (1 - values["dice_mean"]).mean()
    assert (values["volume_crps"] >= 0).all() and values["dice_max_400"].mean() > 0.98
    assert values["mutual_information"].mean() > 10 * values["expected_entropy"].mean()

    always = Oracle(shapes)
    always.sample = lambda image, n, generator=None: (
        40 * always.predict(image)).expand(n, -1, -1, -1, -1)
    wrong = evaluate.score(always, shapes, samples=(2,))
    again = calibration(wrong["reliability"], shapes.groups)
    again |= failure_detection(wrong, shapes.groups)
    assert again["ece_band"]["mean"] > 0.2
    close(again["aurc_entropy"]["mean"], (1 - wrong["dice_mean"]).mean())  # it knows nothing
    assert wrong["brier"].mean() > 1.2 * values["brier"].mean()
