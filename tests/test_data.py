"""data.py: made distributions against their formulas, files against hand-made ones, augmentation
against permutations and hand-worked pixels, batches against replays of themselves."""

import itertools
import math
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import AUGMENTATION, DATASETS, Augmentation, DataError, Split

MADE = {"toy1d": {}, "shapes": {"n": 40}, "modes": {"n": 20}, "cells": {"n": 20},
        "organs": {"n": 24}, "lesions3d": {"n": 8, "size": 32}}


@pytest.fixture(scope="module")
def made():
    return {name: data.load(name, "all", **options) for name, options in MADE.items()}


def refused(*fragments, call):
    """The call ends in a DataError of one line that holds every fragment."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert str(fragment) in message, f"{fragment!r} is not in: {message}"


def plain_split(n=1, readers=1, shape=(8, 8), weights=None, channels=1):
    """Images that are constant i in case i, labels that are constant a for reader a."""
    case = torch.arange(n, dtype=torch.float32).view(n, 1, *[1] * len(shape))
    reader = torch.arange(readers, dtype=torch.uint8).view(1, readers, *[1] * len(shape))
    names = [str(i) for i in range(n)]
    return Split(case.expand(n, channels, *shape).clone(),
                 reader.expand(n, readers, *shape).clone(), weights, names, max(readers, 2), names)


def ramp(batch, *shape):
    """Images whose channels are their own pixel coordinates, and labels that number the pixels."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(s) for s in shape], indexing="ij"))
    labels = torch.arange(math.prod(shape)).view(shape)
    return grid.float().repeat(batch, *[1] * (len(shape) + 1)), labels.repeat(
        batch, *[1] * len(shape))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# ------------------------------------------------------------------------------------- made sets


@pytest.mark.parametrize("name", MADE)
def test_made_sets_keep_the_contract(name, made):
    whole, again = made[name], data.load(name, "all", **MADE[name])
    n, readers = whole.labels.shape[:2]
    assert whole.images.dtype == torch.float32 and whole.labels.dtype == torch.uint8
    assert len(whole) == n == len(whole.images) == len(whole.groups) == len(set(whole.names))
    assert whole.images.shape[2:] == whole.labels.shape[2:]
    assert whole.images.isfinite().all() and int(whole.labels.max()) == whole.num_classes - 1
    assert torch.equal(whole.images, again.images) and torch.equal(whole.labels, again.labels)
    if whole.weights is not None:
        assert whole.weights.shape == (n, readers) and whole.weights.dtype == torch.float32
        torch.testing.assert_close(whole.weights.sum(1), torch.ones(n), rtol=0, atol=1e-6)
        assert (whole.weights > 0).all()
    for a, b in itertools.combinations(range(readers), 2):  # no two label maps of a case agree
        assert (whole.labels[:, a] != whole.labels[:, b]).flatten(1).any(1).all(), (a, b)


@pytest.mark.parametrize("name", sorted(set(MADE) - {"toy1d"}))
def test_made_sets_are_split_by_group(name):
    train, val, test = data.load(name, ("train", "val", "test"), **MADE[name])
    groups = [set(part.groups) for part in (train, val, test)]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    number = sum(map(len, groups))
    assert len(groups[2]) == math.ceil(0.2 * number)
    assert len(groups[1]) == math.ceil(0.25 * (number - len(groups[2])))
    whole = data.load(name, "all", **MADE[name])
    assert len(train) + len(val) + len(test) == len(whole)
    assert torch.equal(val.images[0], whole.images[whole.names.index(val.names[0])])
    other = data.load(name, "val", **MADE[name], seed=1)
    assert other.names == val.names and not torch.equal(other.images, val.images)


def test_toy1d_is_the_papers():
    whole = data.load("toy1d", "train")
    assert whole.labels[0].tolist() == [[1] * 7 + [0] * 14, [1] * 14 + [0] * 7]
    assert whole.images.unique().numel() == 1 and whole.weights is None
    assert torch.equal(data.load("toy1d", "test").images, whole.images)


def test_shapes_odds_are_products_of_formulas():
    whole = data.load("shapes", "all", n=400, size=32)
    odds = whole.weights.double().view(-1, 2, 3, 2)
    kind, style, drawn = odds.sum((2, 3)), odds.sum((1, 3)), odds.sum((1, 2))
    torch.testing.assert_close(odds, torch.einsum("nc,ns,nd->ncsd", kind, style, drawn),
                               rtol=0, atol=1e-6)
    q = (style[:, 1] + 2 * style[:, 2]) / 2  # the mean of a binomial of two draws is 2 q
    torch.testing.assert_close(style, torch.stack([(1 - q)**2, 2 * q * (1 - q), q**2], 1),
                               rtol=0, atol=1e-6)
    for probability in (kind[:, 1], q, drawn[:, 1]):
        assert 0.1 <= probability.min() < 0.12 and 0.88 < probability.max() <= 0.9 + 1e-6


def test_shapes_odds_can_be_seen_in_the_image():
    """Each of the three odds follows a plain measurement of the image or the object's outline."""
    whole = data.load("shapes", "all", n=150)
    odds = whole.weights.view(-1, 2, 3, 2)
    labels, images = whole.labels.view(-1, 2, 3, 2, 64, 64), whole.images[:, 0]

    def correlation(a, b):
        return float(torch.corrcoef(torch.stack([a, b]).float())[0, 1])

    def mean(maps, mask):  # over the mask of each case
        return (maps * mask).sum((1, 2)) / mask.sum((1, 2))

    core = labels[:, 0, 0, 1] == 3
    rim = (labels[:, 0, 2, 1] == 3) & (labels[:, 0, 1, 1] == 0)
    assert correlation(mean(images, core) - mean(images, rim), odds.sum((1, 2))[:, 1]) > 0.8

    # area^2 / (16 pi^2 det covariance) is 1 for any ellipse and 9 / pi^2 for any rectangle.
    outline = (labels[:, 0, 1, 0] == 1).double()
    grid = torch.meshgrid(*[torch.arange(64.0).double()] * 2, indexing="ij")
    y, x = (axis - mean(axis, outline)[:, None, None] for axis in grid)
    determinant = mean(y * y, outline) * mean(x * x, outline) - mean(y * x, outline)**2
    ellipticity = outline.sum((1, 2))**2 / (16 * math.pi**2 * determinant)
    assert correlation(ellipticity, odds.sum((2, 3))[:, 0]) > 0.9

    inside = labels[:, 0, 0, 0] == 1
    ring = (labels[:, 0, 2, 0] == 1) & ~inside  # tight to loose: two-toned where the halo is narrow
    spread = mean((images - mean(images, ring)[:, None, None])**2, ring)
    peak = mean(images, inside) - 0.2
    q = (odds.sum((1, 3)) * torch.tensor([0, 0.5, 1])).sum(1)
    assert correlation(spread.sqrt() / peak, q) < -0.8


def test_shapes_styles_move_both_borders_by_three_pixels(made):
    whole = made["shapes"]
    labels = whole.labels.view(-1, 2, 3, 2, 64, 64)[:, 0, :, 1]  # class 1, all styles, drawn
    for value in (1, 3):
        radius = ((labels == value).flatten(2).sum(2) / math.pi).sqrt()  # of the disc of this area
        assert (radius.diff(dim=1) > 2).all() and (radius.diff(dim=1) < 4.2).all()
    assert ((labels[:, 0] > 0) <= (labels[:, 1] > 0)).all()
    assert ((labels[:, 1] > 0) <= (labels[:, 2] > 0)).all()


def test_modes_are_the_papers_flips(made):
    whole = made["modes"]
    flips = {3: 8, 6: 7, 5: 6, 4: 5, 2: 4}  # sidewalk, person, car, vegetation, road: 17ths
    assert float(whole.weights[0, 0]) == pytest.approx(9 * 10 * 11 * 12 * 13 / 17**5, abs=1e-7)
    assert float(whole.weights[0, 31]) == pytest.approx(8 * 7 * 6 * 5 * 4 / 17**5, abs=1e-7)
    base = whole.labels[:, 0]
    assert int(base.max()) == 6  # label map 0 has no twin class
    for j, (value, odds) in enumerate(flips.items()):
        assert ((base == value).flatten(1).sum(1) >= 20).all()
        flipped = [mode for mode in range(32) if mode >> j & 1]
        assert float(whole.weights[0, flipped].sum()) == pytest.approx(odds / 17, abs=1e-6)
        for mode in range(32):
            want = 7 + j if mode in flipped else value
            assert (whole.labels[:, mode][base == value] == want).all()


def test_cells_colour_instances(made):
    whole = made["cells"]
    for labels in whole.labels.unbind(1):
        assert torch.equal(labels == 0, whole.instances == 0)
        for i in range(3):
            for cell in whole.instances[i].unique():
                assert labels[i][whole.instances[i] == cell].unique().numel() == 1
    assert 0.1 < (whole.instances == 0).float().mean() < 0.4
    dark, light = (whole.images[:, 0][mask].mean() for mask in (whole.instances == 0,
                                                                whole.instances > 0))
    assert light - dark > 0.2


def test_cells_are_coloured_anew_in_every_batch(made):
    one = made["cells"].subset([0])
    stream = data.batches(one, 1, seed=0)
    counts, seen = torch.zeros(16), set()
    cells = one.instances[0].unique()[1:]
    for _ in range(150):
        _, label = next(stream)
        assert torch.equal(label[0] == 0, one.instances[0] == 0)
        colours = torch.stack([label[0][one.instances[0] == cell].unique() for cell in cells])
        assert colours.shape == (len(cells), 1)
        counts += colours.flatten().bincount(minlength=16)
        seen.add(tuple(colours.flatten().tolist()))
    assert len(seen) == 150 and counts[0] == 0
    expected = counts.sum() / 15
    assert ((counts[1:] - expected)**2 / expected).sum() < 36.1  # chi-square, 14 dof, p = 0.001


def test_organs_outlines_are_nested_and_patients_stay_together(made):
    whole = made["organs"]
    loose, middle, tight = (whole.labels > 0).unbind(1)
    assert (tight <= middle).all() and (middle <= loose).all()
    assert whole.groups[:5] == ["patient-0000"] * 4 + ["patient-0001"]
    for value in range(1, 6):
        assert (whole.labels == value).flatten(2).any(2).all()
    assert whole.weights[0].tolist() == [0.25, 0.5, 0.25]


def test_lesions3d_odds_and_nesting(made):
    whole = made["lesions3d"]
    odds = whole.weights.view(-1, 3, 2)
    product = odds.sum(2)[:, :, None] * odds.sum(1)[:, None]
    torch.testing.assert_close(odds, product, rtol=0, atol=1e-6)
    labels = whole.labels.view(-1, 3, 2, 32, 32, 32)
    assert (labels[:, :, 0] <= labels[:, :, 1]).all()
    assert (labels[:, 0] <= labels[:, 1]).all() and (labels[:, 1] <= labels[:, 2]).all()


# ----------------------------------------------------------------------------- names and options


def test_unknown_names_and_values_are_refused():
    refused("'shape'", "toy1d", "lidc", call=lambda: data.load("shape"))
    refused("'dev'", "train, val, test, all", call=lambda: data.load("toy1d", "dev"))
    refused("'N'", "n, size, seed", call=lambda: data.load("shapes", N=10))
    refused("size=8", ">= 32", call=lambda: data.load("shapes", size=8))
    refused("n='many'", "whole number", call=lambda: data.load("shapes", n="many"))
    refused("'n'", "(none)", call=lambda: data.load("toy1d", n=3))
    refused("made", "x.npz", call=lambda: data.load("shapes", path="x.npz"))


def test_the_tables_agree():
    assert set(AUGMENTATION) == set(DATASETS)
    assert all(source.doc and "\n" not in source.doc for source in DATASETS.values())
    for name, source in DATASETS.items():  # defaults are allowed values
        assert all(default >= least for default, least in source.options.values()), name


def test_split_moves_and_selects(made):
    whole = made["cells"]
    part = whole.subset([3, 1])
    assert part.names == [whole.names[3], whole.names[1]] and part.groups == part.names
    for field in ("images", "labels", "instances"):
        assert torch.equal(getattr(part, field), getattr(whole, field)[[3, 1]])
    assert part.weights is None and part.num_classes == 16
    moved = whole.to("meta")
    assert {moved.images.device.type, moved.labels.device.type, moved.instances.device.type} == {
        "meta"}


# ---------------------------------------------------------------------------------------- center


@pytest.mark.parametrize("size", [5, 6, 7, 10, 25, (4, 12), (9, 3)])
def test_center_crops_and_pads(size):
    """Against numpy's crop and "reflect" padding; 7 x 6, so that parities meet both ways."""
    images, labels = torch.rand(2, 3, 7, 6), torch.randint(0, 4, (2, 2, 7, 6), dtype=torch.uint8)
    instances = torch.randint(0, 9, (2, 7, 6), dtype=torch.int32)
    split = Split(images, labels, None, ["a", "b"], 4, ["a", "b"], instances)
    got = data.center(split, size)
    crops, pads = [], []
    for have, want in zip((7, 6), (size, size) if isinstance(size, int) else size):
        low = int((have - want) / 2)  # the odd pixel is cut, or added, at the end
        crops.append(slice(max(low, 0), max(low, 0) + min(have, want)))
        pads.append((max(-low, 0), max(want - have + low, 0)))

    def expected(tensor, **how):
        array = tensor.numpy()[..., crops[0], crops[1]]
        return np.pad(array, [(0, 0)] * (array.ndim - 2) + pads, **how)

    np.testing.assert_array_equal(got.images, expected(images, mode="reflect"))
    np.testing.assert_array_equal(got.labels, expected(labels, constant_values=255))
    np.testing.assert_array_equal(got.instances, expected(instances, constant_values=-1))
    assert got.names == split.names


def test_center_in_3d_and_1d_and_wrong_sizes():
    split = plain_split(shape=(4, 5, 6))
    split.images[0, 0, 2, 2, 3] = 7
    got = data.center(split, (3, 3, 8))
    assert got.images.shape == (1, 1, 3, 3, 8) and got.images[0, 0, 2, 1, 4] == 7
    assert (got.labels[..., 0] == 255).all() and (got.labels[..., 1:7] != 255).all()
    assert data.center(data.load("toy1d"), 11).labels[0, 0].tolist() == [1] * 2 + [0] * 9
    refused("(3, 3)", "4 x 5 x 6", call=lambda: data.center(split, (3, 3)))
    refused("size 0", call=lambda: data.center(split, 0))


# ---------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("shape", [(9,), (8, 8), (7, 10), (4, 5, 6)])
def test_identity_is_bit_for_bit(shape):
    images, labels = torch.randn(3, 2, *shape), torch.randint(0, 9, (3, *shape), dtype=torch.uint8)
    got = data.augment(images, labels, Augmentation(), generator())
    assert torch.equal(got[0], images) and torch.equal(got[1], labels)
    assert got[1].dtype == torch.uint8


def assert_all_drawn(results, allowed):
    """Every result is exactly one of `allowed`, and every one of these comes up."""
    seen = set()
    for image, label in results:
        hits = [key for key, pair in allowed.items() if same(pair, (image, label))]
        assert len(hits) == 1
        seen.add(hits[0])
    assert seen == set(allowed)


@pytest.mark.parametrize("shape", [(9,), (6, 9), (5, 5), (3, 4, 5)])
def test_flips_are_permutations(shape):
    image, label = torch.randn(2, *shape), torch.randint(0, 200, shape)
    axes = tuple(range(-len(shape), 0))
    subsets = [c for r in range(len(axes) + 1) for c in itertools.combinations(axes, r)]
    allowed = {c: (image.flip(c), label.flip(c)) for c in subsets}
    batch = data.augment(image.expand(64, 2, *shape), label.expand(64, *shape),
                         Augmentation(flip=axes), generator())
    assert_all_drawn(zip(*batch), allowed)
    only_last = {c: allowed[c] for c in ((), (-1,))}
    batch = data.augment(image.expand(20, 2, *shape), label.expand(20, *shape),
                         Augmentation(flip=(-1,)), generator())
    assert_all_drawn(zip(*batch), only_last)


@pytest.mark.parametrize("shape, quarters", [((6, 6), range(4)), ((5, 5), range(4)),
                                             ((5, 8), (0, 2)), ((3, 4, 4), range(4))])
def test_quarter_turns_are_permutations(shape, quarters):
    image, label = torch.randn(2, *shape), torch.randint(0, 200, shape)
    allowed = {k: (image.rot90(k, (-2, -1)), label.rot90(k, (-2, -1))) for k in quarters}
    batch = data.augment(image.expand(40, 2, *shape), label.expand(40, *shape),
                         Augmentation(quarter_turns=True), generator())
    assert_all_drawn(zip(*batch), allowed)


def test_crops_are_permutations_and_pads_are_centred():
    image, label = torch.randn(1, 5, 6), torch.randint(0, 200, (5, 6))
    allowed = {(i, j): (image[:, i:i + 3, j:j + 5], label[i:i + 3, j:j + 5])
               for i in range(3) for j in range(2)}
    batch = data.augment(image.expand(60, 1, 5, 6), label.expand(60, 5, 6), Augmentation(),
                         generator(), size=(3, 5))
    assert_all_drawn(zip(*batch), allowed)
    split = Split(image[None], label[None, None].to(torch.uint8), None, ["0"], 200, ["0"])
    for size in (8, 21):
        padded = data.center(split, size)
        got = data.augment(split.images, split.labels[:, 0], Augmentation(), generator(), size=size)
        assert torch.equal(got[0], padded.images) and torch.equal(got[1], padded.labels[:, 0])


def test_turned_crops_of_a_square_stay_inside():
    images, labels = ramp(50, 9, 9)
    everything = Augmentation(flip=(-2, -1), quarter_turns=True)
    images, labels = data.augment(images, labels, everything, generator(), size=(4, 7))
    assert torch.equal(images[:, 0] * 9 + images[:, 1], labels.float()) and labels.max() < 255


def test_a_known_rotation_by_hand():
    """cos 0.8, sin 0.6 about pixel (1, 1): output (1, 2) shows the source at (0.4, 1.8)."""
    image = torch.tensor([[10.0, 20, 30], [40, 50, 60], [70, 80, 90]])[None, None]
    label = torch.arange(9).view(1, 3, 3)
    warp = data._Warp(torch.tensor([[[0.8, -0.6], [0.6, 0.8]]]), torch.zeros(1, 2), None)
    got, moved = data._apply_warp(image, label, warp, (3, 3), True)
    by_hand = 0.6 * (0.2 * 20 + 0.8 * 30) + 0.4 * (0.2 * 50 + 0.8 * 60)  # = 40
    assert float(got[0, 0, 1, 2]) == pytest.approx(by_hand, abs=1e-4)
    assert float(got[0, 0, 1, 1]) == pytest.approx(50, abs=1e-4)
    assert moved[0, 1, 2] == 2 and moved[0, 1, 1] == 4
    # Output (0, 0) shows (0.8, -0.4): row 0.8, and column -0.4 mirrored to 0.4.
    by_hand = 0.2 * (0.6 * 10 + 0.4 * 20) + 0.8 * (0.6 * 40 + 0.4 * 50)
    assert float(got[0, 0, 0, 0]) == pytest.approx(by_hand, abs=1e-4) and moved[0, 0, 0] == 3
    # A half-size map: output (0, 0) shows (-1, -1), outside: mirrored to (1, 1), and ignored.
    warp = data._Warp(2 * torch.eye(2)[None], torch.zeros(1, 2), None)
    got, moved = data._apply_warp(image, label, warp, (3, 3), True)
    assert float(got[0, 0, 0, 0]) == pytest.approx(50, abs=1e-4) and moved[0, 0, 0] == 255


FULL = Augmentation(flip=(-2, -1), quarter_turns=True, rotation=30, shear=0.1, scale=0.2,
                    translation=3, elastic=2, elastic_spacing=8)


@pytest.mark.parametrize("shape, size", [((32, 32), None), ((24, 33), (20, 40)),
                                         ((12, 14, 16), None), ((12, 14, 16), (8, 20, 16))])
def test_image_and_label_move_together(shape, size):
    """A ramp interpolates to its own coordinate: the label must be that of the nearest pixel."""
    images, labels = ramp(6, *shape)
    labels = labels % 251
    images, moved = data.augment(images, labels, FULL, generator(), size)
    assert images.shape[2:] == moved.shape[1:] == (size or shape)
    where = images.round().long()
    number = 0
    for axis, length in enumerate(shape):
        number = number * length + where[:, axis]
    clear = ((images - images.round()).abs() < 0.49).all(1) & (moved != 255)
    assert 0.3 < clear.float().mean() < 1
    assert torch.equal(moved[clear], (number % 251)[clear])
    assert (moved == 255).any() and (images >= 0).all()


def maps_of(augmentation, shape=(33, 33), batch=200):
    """The linear maps (batch, d, d) and the shifts of the centre (batch, d) that were drawn."""
    images, labels = ramp(batch, *shape)
    images, _ = data.augment(images, labels, augmentation, generator())
    middle = [s // 2 for s in shape]
    centre = images[(..., *middle)]
    columns = [images[(..., *[m + (i == axis) for i, m in enumerate(middle)])] - centre
               for axis in range(len(shape))]
    return torch.stack(columns, -1), centre - torch.tensor(middle)


@pytest.mark.parametrize("shape", [(33, 33), (13, 13, 13)])
def test_every_option_does_what_it_says(shape):
    dims = len(shape)
    eye = torch.eye(dims)
    matrix, shift = maps_of(Augmentation(rotation=20), shape)
    torch.testing.assert_close(matrix @ matrix.mT, eye.expand_as(matrix), rtol=0, atol=1e-4)
    assert (torch.linalg.det(matrix) > 0).all() and shift.abs().max() < 1e-4
    if dims == 2:
        angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]).rad2deg()
        assert angle.min() < -18 and angle.max() > 18 and angle.abs().max() <= 20.01
    matrix, _ = maps_of(Augmentation(scale=0.25), shape)
    factor = matrix[:, 0, 0]
    torch.testing.assert_close(matrix, factor[:, None, None] * eye, rtol=0, atol=1e-4)
    assert 0.8 - 1e-4 <= factor.min() < 0.82 and 1.22 < factor.max() <= 1.25 + 1e-4
    matrix, _ = maps_of(Augmentation(shear=0.2), shape)
    assert (matrix - eye).abs().max() <= 0.2 + 1e-4 and (matrix[:, 0, 1]).std() > 0.08
    torch.testing.assert_close(matrix.diagonal(dim1=1, dim2=2), torch.ones(200, dims), rtol=0,
                               atol=1e-4)
    matrix, shift = maps_of(Augmentation(translation=3), shape)
    torch.testing.assert_close(matrix, eye.expand_as(matrix), rtol=0, atol=1e-4)
    assert 2.8 < shift.max() <= 3.001 and -3.001 <= shift.min() < -2.8
    assert shift.std(0).min() > 1.5  # uniform: 3 / sqrt(3)


def test_elastic_is_smooth_and_as_strong_as_asked():
    def shifts(**options):
        images, labels = ramp(60, 65, 65)
        moved, _ = data.augment(images, labels, Augmentation(**options), generator())
        return (moved - images)[:, :, 16:-16, 16:-16]

    weak, strong = shifts(elastic=1, elastic_spacing=16), shifts(elastic=2, elastic_spacing=16)
    torch.testing.assert_close(strong, 2 * weak, rtol=0, atol=1e-3)
    # A 1D cubic B-spline of unit noise has mean square 151/315.
    assert float(strong.std()) == pytest.approx(2 * 151 / 315, rel=0.1)
    fine = shifts(elastic=1, elastic_spacing=8)
    assert weak.diff(dim=-1).abs().max() < 0.25
    assert fine.diff(dim=-1).std() > 1.5 * weak.diff(dim=-1).std()


def test_augment_refuses_turning_a_line():
    line = torch.zeros(1, 1, 9), torch.zeros(1, 9, dtype=torch.long)
    for bad in (Augmentation(rotation=5), Augmentation(quarter_turns=True)):
        refused("1D", call=lambda: data.augment(*line, bad, generator()))


# --------------------------------------------------------------------------------------- batches


def test_epochs_are_permutations_chained_end_to_end():
    stream = data.batches(plain_split(5), 3, seed=4)
    cases = torch.cat([next(stream)[0][:, 0, 0, 0] for _ in range(10)]).view(6, 5)
    assert (cases.sort(1).values == torch.arange(5)).all()
    assert len({tuple(epoch.tolist()) for epoch in cases}) > 2
    # More rows than cases: whole epochs inside one batch.
    image, label = next(data.batches(plain_split(3), 7, seed=0))
    assert image.shape == (7, 1, 8, 8) and label.dtype == torch.long
    assert sorted(image[:6, 0, 0, 0].tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", MADE)
def test_a_batch_is_a_function_of_seed_and_step(name, made):
    options = dict(augmentation=AUGMENTATION[name])
    first = list(itertools.islice(data.batches(made[name], 4, 7, **options), 6))
    resumed = list(itertools.islice(data.batches(made[name], 4, 7, start=3, **options), 3))
    assert all(map(same, first[3:], resumed))
    if name != "toy1d":
        assert not same(first[0], next(data.batches(made[name], 4, 8, **options)))


@pytest.mark.parametrize("name", ["shapes", "organs", "cells", "lesions3d"])
def test_ranks_share_one_batch(name, made):
    options = dict(start=2, augmentation=AUGMENTATION[name], size=24)
    whole = next(data.batches(made[name], 6, 3, **options))
    parts = [next(data.batches(made[name], 6, 3, rank=r, world=3, **options)) for r in range(3)]
    assert all(len(part[0]) == 2 for part in parts)
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


def reader_counts(split, draws, **options):
    stream = data.batches(split, 100, seed=0, **options)
    labels = torch.cat([next(stream)[1][:, 0, 0] for _ in range(draws // 100)])
    return labels.bincount(minlength=split.labels.shape[1]).double()


def test_readers_are_drawn_by_weight():
    weights = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.4]])
    counts = reader_counts(plain_split(1, 5, (2, 2), weights), 6000)
    assert counts[2] == 0
    kept, expected = counts[[0, 1, 3, 4]], 6000 * weights[0, [0, 1, 3, 4]]
    assert ((kept - expected)**2 / expected).sum() < 16.3  # chi-square, 3 dof, p = 0.001
    uniform = reader_counts(plain_split(1, 4, (2, 2)), 6000)
    assert ((uniform - 1500)**2 / 1500).sum() < 16.3


def test_readers_and_warps_depend_on_the_seed():
    split = plain_split(1, 4)  # a single case: nothing else can differ
    a, b = (next(data.batches(split, 50, seed))[1] for seed in (0, 1))
    assert not torch.equal(a, b)
    image, label = ramp(1, 9, 9)
    split = Split(image, label[None].to(torch.uint8), None, ["0"], 81, ["0"])
    a, b = (next(data.batches(split, 4, seed, augmentation=FULL))[0] for seed in (0, 1))
    assert not torch.equal(a, b)


def test_annotators_restrict_the_draw():
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    split = plain_split(1, 4, (2, 2), weights)
    counts = reader_counts(split, 4000, annotators=[1, 3])
    assert counts[0] == counts[2] == 0
    expected = torch.tensor([4000 / 3, 8000 / 3])
    assert ((counts[[1, 3]] - expected)**2 / expected).sum() < 10.9  # 1 dof, p = 0.001
    assert reader_counts(split, 100, annotators=(2,))[2] == 100


def test_batches_of_3d_crops_and_unaugmented_rows(made):
    image, label = next(data.batches(made["lesions3d"], 2, 0, size=(16, 20, 24)))
    assert image.shape == (2, 1, 16, 20, 24) and label.shape == (2, 16, 20, 24)
    whole = made["shapes"]
    image, label = next(data.batches(whole, 5, 0))
    for row, drawn in zip(image, label):
        case = next(i for i in range(len(whole)) if torch.equal(whole.images[i], row))
        assert any(torch.equal(drawn, known.long()) for known in whole.labels[case])


def test_batches_refuse_what_cannot_be(made):
    split = plain_split(3, 2)
    refused("8", "3 processes", call=lambda: data.batches(split, 8, 0, world=3))
    refused("size 0", call=lambda: data.batches(split, 0, 0))
    refused("seed -1", call=lambda: data.batches(split, 2, -1))
    refused("[2]", "0 to 1", call=lambda: data.batches(split, 2, 0, annotators=[2]))
    refused("[]", call=lambda: data.batches(split, 2, 0, annotators=[]))
    refused("no readers", call=lambda: data.batches(made["cells"], 2, 0, annotators=[0]))
    split.weights = torch.tensor([[1.0, 0], [0.5, 0.5], [0.5, 0.5]])
    refused("'0'", "[1]", call=lambda: data.batches(split, 2, 0, annotators=[1]))


def test_ignored_instances_stay_ignored(made):
    """Padding of an instance map comes out as 255, not as membrane."""
    padded = data.center(made["cells"].subset([0, 1]), 70)
    _, label = next(data.batches(padded, 2, 0))
    assert (label[:, :3] == 255).all() and (label[:, 3:67, 3:67] < 16).all()


# ---------------------------------------------------------------------------------- lidc: pickle


def records(n=12, readers=4, size=6, seed=0):
    rng = np.random.RandomState(seed)
    return {f"case-{i}": {"image": rng.rand(size, size),
                          "masks": [(rng.rand(size, size) > 0.5).astype(np.uint8)
                                    for _ in range(readers)],
                          "series_uid": f"uid-{i // 2}"} for i in range(n)}


def write(path, table, protocol=4):
    path.write_bytes(pickle.dumps(table, protocol=protocol))
    return path


def test_the_split_rule_by_hand():
    # RandomState(0).permutation(10) is 2 8 4 9 1 6 7 3 0 5, of 8 it is 6 2 1 7 3 0 5 4.
    # Test: the first ceil(0.2 * 10) = 2, so g2 g8. The others are g4 g9 g1 g6 g7 g3 g0 g5; their
    # numbers 6 and 2, the first ceil(0.2 * 8) = 2 of the second shuffle, are g0 and g1.
    groups = [f"g{i}" for i in (9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 2)]
    parts = data.split_groups(groups, val=0.2)
    names = {part: sorted({groups[i] for i in rows}) for part, rows in parts.items()}
    assert names == {"test": ["g2", "g8"], "val": ["g0", "g1"],
                     "train": ["g3", "g4", "g5", "g6", "g7", "g9"]}
    assert parts["test"] == [3, 9, 10] and parts["train"] == sorted(parts["train"])


@pytest.mark.parametrize("n", [3, 5, 20, 35, 101])
def test_the_split_rule_is_that_of_two_train_test_splits(n):
    def train_test_split(values, share):  # scikit-learn's, for random_state=0, in order of drawing
        order = np.random.RandomState(0).permutation(len(values))
        number = math.ceil(share * len(values))
        return [values[i] for i in order[number:]], [values[i] for i in order[:number]]

    groups = [f"1.2.{i % n}" for i in range(3 * n)]
    rest, test = train_test_split(sorted(set(groups)), 0.2)
    train, val = train_test_split(rest, 0.2)
    parts = data.split_groups(groups, val=0.2)
    for part, names in (("train", train), ("val", val), ("test", test)):
        assert parts[part] == [i for i, group in enumerate(groups) if group in names]


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_of_every_protocol_and_both_numpy_spellings(tmp_path, protocol):
    table = records()
    path = write(tmp_path / "a.pickle", table, protocol)
    whole = data.load("lidc", "all", path=path)
    assert whole.images.shape == (12, 1, 6, 6) and whole.labels.shape == (12, 4, 6, 6)
    assert whole.weights is None and whole.num_classes == 2 and whole.names == list(table)
    for i, record in enumerate(table.values()):
        np.testing.assert_array_equal(whole.images[i, 0], record["image"].astype(np.float32))
        np.testing.assert_array_equal(whole.labels[i], np.stack(record["masks"]))
    if protocol < 4:  # module names stand there as plain lines
        raw = path.read_bytes()
        new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
        assert new in raw or old in raw
        swapped = raw.replace(new, old) if new in raw else raw.replace(old, new)
        path.write_bytes(swapped)
        assert torch.equal(data.load("lidc", "all", path=path).labels, whole.labels)
    train, val, test = data.load("lidc", ("train", "val", "test"), path=path)
    # 6 groups: permutation(6) is 5 2 1 3 0 4, test 5 2; then 1 3 0 4 by permutation(4) = 2 3 1 0.
    assert set(test.groups) == {"uid-5", "uid-2"} and set(val.groups) == {"uid-0"}
    assert set(train.groups) == {"uid-1", "uid-3", "uid-4"} and len(train) == 6


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function, named", [(os.mkdir, "mkdir"), (eval, "eval"),
                                             (np.load, "load"), (np.memmap, "memmap")])
def test_hostile_pickles_are_refused_before_they_run(tmp_path, function, named):
    target = tmp_path / "made-by-the-pickle"
    argument = f"__import__('os').mkdir({str(target)!r})" if function is eval else str(target)
    table = records(3)
    table["case-1"]["image"] = Hostile(function, argument)
    path = write(tmp_path / "a.pickle", table)
    refused(path, named, "not run", call=lambda: data.load("lidc", path=path))
    assert not target.exists()


def test_globals_inside_numpys_own_modules_are_refused_too(tmp_path):
    path = tmp_path / "a.pickle"
    path.write_bytes(b"cnumpy._core.multiarray\nfromfile\n(S'x'\ntR.")
    refused("numpy._core.multiarray.fromfile", call=lambda: data.load("lidc", path=path))
    path.write_bytes(b"c_codecs\ndecode\n(S'x'\nS'zlib'\ntR.")
    refused("_codecs.decode", call=lambda: data.load("lidc", path=path))


def spoiled(change):
    table = records()
    change(table)
    return table


BAD_PICKLES = {
    "a list": (lambda: [1, 2], ["list", "dict"]),
    "no cases": (lambda: {}, ["no cases"]),
    "not a record": (lambda: spoiled(lambda t: t.update({"case-1": 5})), ["case-1", "image"]),
    "no masks key": (lambda: spoiled(lambda t: t["case-1"].pop("masks")), ["case-1", "masks"]),
    "no uid": (lambda: spoiled(lambda t: t["case-1"].pop("series_uid")), ["case-1", "series_uid"]),
    "no annotators": (lambda: spoiled(lambda t: t["case-1"].update(masks=[])),
                      ["case-1", "no mask"]),
    "masks no list": (lambda: spoiled(lambda t: t["case-1"].update(masks="abc")),
                      ["case-1", "masks a str"]),
    "ragged list": (lambda: spoiled(lambda t: t["case-1"].update(image=[[1.0], [1.0, 2.0]])),
                    ["case-1", "image is a list"]),
    "list as mask": (lambda: spoiled(lambda t: t["case-1"].update(masks=[[[1], [1, 0]]])),
                     ["case-1", "mask 0", "list"]),
    "too large": (lambda: spoiled(lambda t: t["case-1"]["image"].__setitem__((0, 0), 1e300)),
                  ["case-1", "image", "not finite"]),
    "text as mask": (lambda: spoiled(lambda t: t["case-1"].update(masks=["ab"])),
                     ["case-1", "mask 0"]),
    "mask size": (lambda: spoiled(lambda t: t["case-1"]["masks"].insert(
        1, np.zeros((6, 7), np.uint8))), ["case-1", "mask 1", "6 x 7", "6 x 6"]),
    "image size": (lambda: spoiled(lambda t: t["case-1"].update(image=np.zeros((5, 6)))),
                   ["case-1", "5 x 6", "same"]),
    "colour image": (lambda: spoiled(lambda t: t["case-0"].update(image=np.zeros((6, 6, 3, 1)))),
                     ["case-0", "image"]),
    "integers": (lambda: spoiled(lambda t: t["case-1"].update(image=np.zeros((6, 6), int))),
                 ["case-1", "image", "int"]),
    "nan": (lambda: spoiled(lambda t: t["case-1"]["image"].__setitem__((0, 0), np.nan)),
            ["case-1", "image", "not finite"]),
    "class 2": (lambda: spoiled(lambda t: t["case-1"]["masks"][3].__setitem__((0, 0), 2)),
                ["case-1", "mask 3", "value 2", "0 to 1"]),
    "class -1": (lambda: spoiled(lambda t: t["case-1"]["masks"].__setitem__(
        2, -np.ones((6, 6)))), ["case-1", "mask 2", "-1"]),
    "0 and 255": (lambda: {k: {**r, "masks": [m * np.uint8(255) for m in r["masks"]]}
                           for k, r in records().items()}, ["255", "ignore"]),
}


@pytest.mark.parametrize("fault", BAD_PICKLES)
def test_bad_pickles_are_refused_in_one_line(tmp_path, fault):
    table, fragments = BAD_PICKLES[fault]
    path = write(tmp_path / "a.pickle", table())
    refused(path, *fragments, call=lambda: data.load("lidc", "all", path=path))


def test_truncated_and_empty_files(tmp_path):
    path = write(tmp_path / "a.pickle", records())
    raw = path.read_bytes()
    for stump in (raw[:-20], raw[:100], b"", b"hello"):
        path.write_bytes(stump)
        refused(path, "pickle", call=lambda: data.load("lidc", path=path))
    path = write(path, records(4))  # two groups cannot make three splits
    refused("'train'", "2 groups", call=lambda: data.load("lidc", path=path))
    assert len(data.load("lidc", "all", path=path)) == 4


def test_missing_readers_weigh_nothing(tmp_path):
    table = records()
    table["case-1"]["masks"] = table["case-1"]["masks"][:1]
    whole = data.load("lidc", "all", path=write(tmp_path / "a.pkl", table))
    assert whole.weights[1].tolist() == [1, 0, 0, 0]
    assert whole.weights[0].tolist() == [0.25] * 4
    assert (whole.labels[1, 1:] == 255).all() and (whole.labels[0] < 2).all()
    for _, label in itertools.islice(data.batches(whole.subset([1]), 8, 0), 20):
        assert (label < 2).all()


# ------------------------------------------------------------------------- lidc: tree and places


def write_tree(root, foreground=255, readers=4):
    rng = np.random.RandomState(0)
    for part, patients in (("train", 3), ("val", 1), ("test", 2)):
        for p in range(patients):
            for z in range(2):
                name = f"z-{z}.5_c{p}"
                for kind in ("images", "gt"):
                    (root / part / kind / f"{part}-{p}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.randint(0, 256, (9, 9)).astype(np.uint8)).save(
                    root / part / "images" / f"{part}-{p}" / f"{name}.png")
                for r in range(readers):
                    Image.fromarray((rng.rand(9, 9) > 0.5).astype(np.uint8) * foreground).save(
                        root / part / "gt" / f"{part}-{p}" / f"{name}_l{r}.png")
    return root


@pytest.mark.parametrize("foreground", [1, 255])
def test_png_tree_keeps_its_split_and_reads_only_what_is_asked(tmp_path, foreground):
    root = write_tree(tmp_path, foreground)
    train, test = data.load("lidc", ("train", "test"), path=root)
    assert len(train) == 6 and set(test.groups) == {"test-0", "test-1"}
    assert train.names[0] == "train/train-0/z-0.5_c0" and train.labels.shape == (6, 4, 9, 9)
    image = np.asarray(Image.open(root / "train/images/train-0/z-0.5_c0.png"))
    np.testing.assert_allclose(train.images[0, 0], image / 255, atol=1e-7)
    mask = np.asarray(Image.open(root / "train/gt/train-0/z-0.5_c0_l2.png"))
    np.testing.assert_array_equal(train.labels[0, 2], mask > 0)
    assert len(data.load("lidc", "all", path=root)) == 12

    (root / "train/gt/train-0/z-0.5_c0_l1.png").unlink()  # that reader, not the last, is missing
    broken = root / "val/images/val-0/z-0.5_c0.png"
    broken.write_bytes(b"no picture")
    train = data.load("lidc", "train", path=root)
    np.testing.assert_allclose(train.weights[0], [1 / 3, 0, 1 / 3, 1 / 3])
    refused(broken, "PNG", call=lambda: data.load("lidc", "val", path=root))
    for file in (root / "test/images").glob("*/*.png"):
        file.unlink()
    refused(root, "test/images", call=lambda: data.load("lidc", "test", path=root))


def test_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("datasets", "Probabilistic-Unet-Pytorch", "hpunet-data", ".npz",
            call=lambda: data.load("lidc"))
    refused("nowhere.npz", "images", call=lambda: data.load("npz", path="nowhere.npz"))
    folder = tmp_path / "datasets"
    folder.mkdir()
    write(folder / "lidc.pickle", records(8))
    assert len(data.load("lidc", "all")) == 8
    (folder / "lidc").mkdir()
    refused("nothing", call=lambda: data.load("lidc", "all"))
    write(folder / "lidc" / "data_lidc.pickle", records(10))
    (folder / "lidc" / "notes.txt").write_text("unrelated")
    assert len(data.load("lidc", "all")) == 10
    assert len(data.load("lidc", "all", path="datasets/lidc")) == 10
    write(folder / "lidc" / "b.pickle", records(6))
    refused("several", "b.pickle", "data_lidc.pickle", call=lambda: data.load("lidc", "all"))
    refused("notes.txt", call=lambda: data.load("lidc", path="datasets/lidc/notes.txt"))


# ------------------------------------------------------------------------------------------- npz


def arrays(n=6, readers=2, shape=(5, 4)):
    rng = np.random.RandomState(0)
    return {"images": rng.rand(n, *shape).astype(np.float32),
            "labels": rng.randint(0, 3, (n, readers, *shape))}


def load_npz(tmp_path, split="all", name="npz", options=(), **given):
    path = tmp_path / "own.npz"
    np.savez(path, **given)
    return data.load(name, split, path=path, **dict(options))


def test_npz_layouts(tmp_path):
    given = arrays()
    whole = load_npz(tmp_path, **given)
    assert whole.images.shape == (6, 1, 5, 4) and whole.num_classes == 3 and whole.weights is None
    np.testing.assert_array_equal(whole.labels, given["labels"])
    colour = (np.random.RandomState(1).rand(6, 3, 5, 4) * 255).astype(np.uint8)
    whole = load_npz(tmp_path, **given | {"images": colour})
    assert whole.images.shape == (6, 3, 5, 4)
    np.testing.assert_allclose(whole.images, colour / 255, atol=1e-7)
    whole = load_npz(tmp_path, **arrays(shape=(3, 5, 4)))
    assert whole.images.shape == (6, 1, 3, 5, 4) and whole.labels.shape == (6, 2, 3, 5, 4)


def test_npz_optional_keys(tmp_path):
    given = arrays() | {"groups": np.array(["p", "p", "q", "q", "r", "s"]), "num_classes": 5,
                        "names": np.array(list("abcdef")), "weights": np.tile([1.0, 3.0], (6, 1))}
    whole = load_npz(tmp_path, **given)
    assert whole.num_classes == 5 and whole.names == list("abcdef")
    assert whole.weights[2].tolist() == [0.25, 0.75]
    parts = load_npz(tmp_path, ("train", "val", "test"), **given)
    assert [len(set(part.groups)) for part in parts] == [2, 1, 1]
    assert load_npz(tmp_path, options={"num_classes": 4}, **given).num_classes == 4
    gone = arrays()
    gone["labels"][0, 1] = 255
    assert load_npz(tmp_path, **gone).weights[0].tolist() == [1, 0]
    weighted = gone | {"weights": np.tile([1.0, 3.0], (6, 1))}  # weight on a map that is not there
    assert load_npz(tmp_path, **weighted).weights[:2].tolist() == [[1, 0], [0.25, 0.75]]
    binary = arrays()
    binary["labels"] %= 2
    assert load_npz(tmp_path, name="lidc", **binary).num_classes == 2


BAD_NPZ = {
    "another key": (lambda a: a.update(masks=a.pop("labels")), ["masks", "labels are needed"]),
    "extra key": (lambda a: a.update(extra=np.zeros(3)), ["extra", "weights"]),
    "no reader axis": (lambda a: a.update(labels=a["labels"][:, 0]), ["6 x 5 x 4", "[:, None]"]),
    "sizes": (lambda a: a.update(images=a["images"][:, :-1]), ["6 x 4 x 4", "6 x 2 x 5 x 4"]),
    "numbers": (lambda a: a.update(images=a["images"][:-1]), ["5 x 5 x 4"]),
    "objects": (lambda a: a.update(images=a["images"].astype(object)), ["plain arrays"]),
    "nan": (lambda a: a["images"].__setitem__((2, 0, 0), np.inf), ["'2'", "not finite"]),
    "weights shape": (lambda a: a.update(weights=np.ones((6, 3))), ["weights", "6 x 3", "6 x 2"]),
    "weights kind": (lambda a: a.update(weights=np.full((6, 2), "a")), ["weights", "<U1"]),
    "negative weights": (lambda a: a.update(weights=np.full((6, 2), -1.0)), ["weights"]),
    "no weight": (lambda a: a.update(weights=np.eye(6, 2)), ["'2'", "weight 0"]),
    "groups": (lambda a: a.update(groups=np.zeros(4)), ["groups", "4", "6"]),
    "classes": (lambda a: a.update(num_classes=2), ["mask", "value 2", "0 to 1"]),
    "too many classes": (lambda a: a.update(num_classes=256), ["256", "2 to 255"]),
    "fractions": (lambda a: a.update(labels=a["labels"] + 0.5), ["0.5"]),
    "text": (lambda a: a.update(labels=a["labels"].astype(str)), ["<U"]),
}


@pytest.mark.parametrize("fault", BAD_NPZ)
def test_bad_npz_are_refused_in_one_line(tmp_path, fault):
    change, fragments = BAD_NPZ[fault]
    given = arrays()
    change(given)
    refused("own.npz", *fragments, call=lambda: load_npz(tmp_path, **given))


def test_damaged_npz(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays())
    raw = path.read_bytes()
    for stump in (raw[:200], b"", b"PK\x03\x04"):
        path.write_bytes(stump)
        refused(path, call=lambda: data.load("npz", path=path))
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    refused(path, call=lambda: data.load("npz", path=path))
