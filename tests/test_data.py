"""data.py: augmentation against permutations and hand-worked pixels, batches against replays of
themselves, options and hidden regions."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch

import data
from data import DATASETS, Augmentation
from data_files import SYNTHETIC, refused
from sources.base import Split
from sources.files import DataError
from sources.warp import Warp, apply_warp, draw_warp, recolor


@pytest.fixture(scope="module")
def made():
    return {name: data.load(name, "all", **options) for name, options in SYNTHETIC.items()}


def plain_split(n=1, annotators=1, shape=(8, 8), weights=None, channels=1):
    """Images that are constant i in case i, labels that are constant a for annotator a."""
    case = torch.arange(n, dtype=torch.float32).view(n, 1, *[1] * len(shape))
    annotator = torch.arange(annotators, dtype=torch.uint8).view(1, annotators, *[1] * len(shape))
    names = [str(i) for i in range(n)]
    return Split(case.expand(n, channels, *shape).clone(),
                 annotator.expand(n, annotators, *shape).clone(), weights, names,
                 max(annotators, 2), names)


def ramp(batch, *shape):
    """Images whose channels are their own pixel coordinates, and labels that number the pixels."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(s) for s in shape], indexing="ij"))
    labels = torch.arange(math.prod(shape)).view(shape)
    return grid.float().repeat(batch, *[1] * (len(shape) + 1)), labels.repeat(
        batch, *[1] * len(shape))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def augment(images, labels, augmentation, generator, size=None):
    """A batch through one warp, as `data.batches` does it."""
    shape = images.shape[2:]
    size = (size,) * len(shape) if isinstance(size, int) else tuple(size or shape)
    warp = draw_warp(augmentation, len(images), shape, size, generator)
    return apply_warp(images, labels, warp, size, augmentation.resamples)


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


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


# ----------------------------------------------------------------------------- names and options


def test_unknown_names_and_values_are_refused():
    refused("'shape'", "toy1d", "lidc", call=lambda: data.load("shape"))
    refused("'dev'", "train, val, test, all", call=lambda: data.load("toy1d", "dev"))
    refused("'N'", "n, size, seed", call=lambda: data.load("shapes", N=10))
    refused("size=8", ">= 32", call=lambda: data.load("shapes", size=8))
    refused("n='many'", "whole number", call=lambda: data.load("shapes", n="many"))
    refused("'n'", "choose from hide", call=lambda: data.load("toy1d", n=3))
    refused("synthetic", "x.npz", call=lambda: data.load("shapes", path="x.npz"))


def test_the_table_is_complete():
    """Every default is a value that the option's own check accepts."""
    for source in DATASETS.values():
        assert source.doc and "\n" not in source.doc
        for key, parameter in inspect.signature(source.read).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                data._check_options("x", source, {key: parameter.default})


def test_options_may_not_be_named_like_loads_own_arguments(capsys):
    for key in ("name", "split"):
        refused(f"'{key}'", "n, size, seed", call=lambda: data.load("shapes", "val", **{key: 3}))
    for key in ("name", "split", "path", "out"):
        assert data.main(["show", "--data", "toy1d", "--data-args", f"{key}=1"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    refused("n=", "whole number", call=lambda: data.load("shapes", n="9" * 99))
    refused("seed=", call=lambda: data.load("shapes", seed=2**31))


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
    got = augment(images, labels, Augmentation(), generator())
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
    batch = augment(image.expand(64, 2, *shape), label.expand(64, *shape),
                         Augmentation(flip=axes), generator())
    assert_all_drawn(zip(*batch), allowed)
    only_last = {c: allowed[c] for c in ((), (-1,))}
    batch = augment(image.expand(20, 2, *shape), label.expand(20, *shape),
                         Augmentation(flip=(-1,)), generator())
    assert_all_drawn(zip(*batch), only_last)


@pytest.mark.parametrize("shape, quarters", [((6, 6), range(4)), ((5, 5), range(4)),
                                             ((5, 8), (0, 2)), ((3, 4, 4), range(4))])
def test_quarter_turns_are_permutations(shape, quarters):
    image, label = torch.randn(2, *shape), torch.randint(0, 200, shape)
    allowed = {k: (image.rot90(k, (-2, -1)), label.rot90(k, (-2, -1))) for k in quarters}
    batch = augment(image.expand(40, 2, *shape), label.expand(40, *shape),
                         Augmentation(quarter_turns=True), generator())
    assert_all_drawn(zip(*batch), allowed)


def test_crops_are_permutations_and_pads_are_centred():
    image, label = torch.randn(1, 5, 6), torch.randint(0, 200, (5, 6))
    allowed = {(i, j): (image[:, i:i + 3, j:j + 5], label[i:i + 3, j:j + 5])
               for i in range(3) for j in range(2)}
    batch = augment(image.expand(60, 1, 5, 6), label.expand(60, 5, 6), Augmentation(),
                         generator(), size=(3, 5))
    assert_all_drawn(zip(*batch), allowed)
    split = Split(image[None], label[None, None].to(torch.uint8), None, ["0"], 200, ["0"])
    for size in (8, 21):
        padded = data.center(split, size)
        got = augment(split.images, split.labels[:, 0], Augmentation(), generator(), size=size)
        assert torch.equal(got[0], padded.images) and torch.equal(got[1], padded.labels[:, 0])


def test_turned_crops_of_a_square_stay_inside():
    images, labels = ramp(50, 9, 9)
    everything = Augmentation(flip=(-2, -1), quarter_turns=True)
    images, labels = augment(images, labels, everything, generator(), size=(4, 7))
    assert torch.equal(images[:, 0] * 9 + images[:, 1], labels.float()) and labels.max() < 255


def test_a_known_rotation_by_hand():
    """cos 0.8, sin 0.6 about pixel (1, 1): output (1, 2) shows the source at (0.4, 1.8)."""
    image = torch.tensor([[10.0, 20, 30], [40, 50, 60], [70, 80, 90]])[None, None]
    label = torch.arange(9).view(1, 3, 3)
    warp = Warp(torch.tensor([[[0.8, -0.6], [0.6, 0.8]]]), torch.zeros(1, 2), None)
    got, moved = apply_warp(image, label, warp, (3, 3), True)
    by_hand = 0.6 * (0.2 * 20 + 0.8 * 30) + 0.4 * (0.2 * 50 + 0.8 * 60)  # = 40
    assert float(got[0, 0, 1, 2]) == pytest.approx(by_hand, abs=1e-4)
    assert float(got[0, 0, 1, 1]) == pytest.approx(50, abs=1e-4)
    assert moved[0, 1, 2] == 2 and moved[0, 1, 1] == 4
    # Output (0, 0) shows (0.8, -0.4): row 0.8, and column -0.4 mirrored to 0.4.
    by_hand = 0.2 * (0.6 * 10 + 0.4 * 20) + 0.8 * (0.6 * 40 + 0.4 * 50)
    assert float(got[0, 0, 0, 0]) == pytest.approx(by_hand, abs=1e-4) and moved[0, 0, 0] == 3
    # A half-size map: output (0, 0) shows (-1, -1), outside: mirrored to (1, 1), and ignored.
    warp = Warp(2 * torch.eye(2)[None], torch.zeros(1, 2), None)
    got, moved = apply_warp(image, label, warp, (3, 3), True)
    assert float(got[0, 0, 0, 0]) == pytest.approx(50, abs=1e-4) and moved[0, 0, 0] == 255


FULL = Augmentation(flip=(-2, -1), quarter_turns=True, rotation=30, shear=0.1, scale=0.2,
                    translation=3, elastic=2, elastic_spacing=8)


@pytest.mark.parametrize("shape, size", [((32, 32), None), ((24, 33), (20, 40)),
                                         ((12, 14, 16), None), ((12, 14, 16), (8, 20, 16))])
def test_image_and_label_move_together(shape, size):
    """A ramp interpolates to its own coordinate: the label must be that of the nearest pixel."""
    images, labels = ramp(6, *shape)
    labels = labels % 251
    images, moved = augment(images, labels, FULL, generator(), size)
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
    images, _ = augment(images, labels, augmentation, generator())
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
        moved, _ = augment(images, labels, Augmentation(**options), generator())
        return (moved - images)[:, :, 16:-16, 16:-16]

    weak, strong = shifts(elastic=1, elastic_spacing=16), shifts(elastic=2, elastic_spacing=16)
    torch.testing.assert_close(strong, 2 * weak, rtol=0, atol=1e-3)
    # A 1D cubic B-spline of unit noise has mean square 151/315.
    assert float(strong.std()) == pytest.approx(2 * 151 / 315, rel=0.1)
    fine = shifts(elastic=1, elastic_spacing=8)
    assert weak.diff(dim=-1).abs().max() < 0.25
    assert fine.diff(dim=-1).std() > 1.5 * weak.diff(dim=-1).std()


def test_colours_by_hand():
    """Brightness adds, contrast scales about 0.5, saturation about grey; a third of a turn of the
    hue makes red green, green blue and blue red."""
    picture = torch.rand(2, 3, 2, 2, generator=generator())
    grey = picture.mean(1, keepdim=True)
    third = 2 * math.pi / 3
    for color, expected in (([0, 1, 1, 0], picture), ([0.3, 1, 1, 0], picture + 0.3),
                            ([0, 2, 1, 0], 2 * picture - 0.5),
                            ([0, 1, 0, 0], grey.expand(2, 3, 2, 2)),
                            ([0, 1, 3, 0], 3 * picture - 2 * grey),
                            ([0, 1, 1, third], picture[:, [2, 0, 1]]),
                            ([0.1, 2, 1, -third], 2 * picture[:, [1, 2, 0]] - 0.4)):
        result = recolor(picture, torch.tensor([color, [0.0, 1, 1, 0]]))
        torch.testing.assert_close(result[0], expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(result[1], picture[1])


def test_colours_are_drawn_row_by_row_and_spare_labels_and_other_channels():
    images, labels = torch.rand(300, 5, 4, 4, generator=generator()), torch.ones(300, 4, 4).long()
    jitter = Augmentation(color=0.25)
    new, kept = augment(images, labels, jitter, generator())
    assert torch.equal(kept, labels) and torch.equal(new[:, 3:], images[:, 3:])
    color = draw_warp(jitter, 300, (4, 4), (4, 4), generator()).color
    torch.testing.assert_close(new[:, :3], recolor(images[:, :3], color))
    for values, low, high in zip(color.T, (-0.25, 0.8, 0.8, -0.25), (0.25, 1.25, 1.25, 0.25)):
        width = high - low
        assert low <= values.min() < low + 0.05 * width < high - 0.05 * width < values.max() <= high
    assert torch.corrcoef(color.T).fill_diagonal_(0).abs().max() < 4 / 300**0.5
    # what is drawn last changes nothing that is drawn before
    for a, b in zip(*(draw_warp(Augmentation(rotation=9, elastic=2, color=c), 3, (9, 9), (9, 9),
                                generator())[:3] for c in (0.0, 0.25))):
        assert torch.equal(a, b)


def test_only_street_scenes_change_their_colours():
    coloured = [name for name, source in DATASETS.items() if source.augmentation.color]
    assert coloured == ["cityscapes"]


def test_augment_refuses_turning_a_line():
    line = torch.zeros(1, 1, 9), torch.zeros(1, 9, dtype=torch.long)
    for bad in (Augmentation(rotation=5), Augmentation(quarter_turns=True)):
        refused("1D", call=lambda: augment(*line, bad, generator()))


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


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_batch_is_a_function_of_seed_and_step(name, made):
    options = dict(augmentation=data.DATASETS[name].augmentation)
    first = list(itertools.islice(data.batches(made[name], 4, 7, **options), 6))
    resumed = list(itertools.islice(data.batches(made[name], 4, 7, start=3, **options), 3))
    assert all(map(same, first[3:], resumed))
    if name != "toy1d":
        assert not same(first[0], next(data.batches(made[name], 4, 8, **options)))


@pytest.mark.parametrize("name", ["shapes", "organs", "cells", "lesions3d"])
def test_ranks_share_one_batch(name, made):
    options = dict(start=2, augmentation=data.DATASETS[name].augmentation, size=24)
    whole = next(data.batches(made[name], 6, 3, **options))
    parts = [next(data.batches(made[name], 6, 3, rank=r, world=3, **options)) for r in range(3)]
    assert all(len(part[0]) == 2 for part in parts)
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


def annotator_counts(split, draws):
    stream = data.batches(split, 100, seed=0)
    labels = torch.cat([next(stream)[1][:, 0, 0] for _ in range(draws // 100)])
    return labels.bincount(minlength=split.labels.shape[1]).double()


def test_annotators_are_drawn_by_weight():
    weights = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.4]])
    counts = annotator_counts(plain_split(1, 5, (2, 2), weights), 6000)
    assert counts[2] == 0
    kept, expected = counts[[0, 1, 3, 4]], 6000 * weights[0, [0, 1, 3, 4]]
    assert ((kept - expected)**2 / expected).sum() < 16.3  # chi-square, 3 dof, p = 0.001
    assert annotator_counts(plain_split(1, 2, (2, 2), torch.tensor([[0.0, 1e-30]])), 6000)[0] == 0
    uniform = annotator_counts(plain_split(1, 4, (2, 2)), 6000)
    assert ((uniform - 1500)**2 / 1500).sum() < 16.3


def test_annotators_and_warps_depend_on_the_seed():
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
    counts = annotator_counts(data.labelled_by(split, [1, 3]), 4000)
    assert counts[0] == counts[2] == 0
    expected = torch.tensor([4000 / 3, 8000 / 3])
    assert ((counts[[1, 3]] - expected)**2 / expected).sum() < 10.9  # 1 dof, p = 0.001
    assert annotator_counts(data.labelled_by(split, (2,)), 100)[2] == 100


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
    refused("[2]", "0 to 1", call=lambda: data.labelled_by(split, [2]))
    refused("[]", call=lambda: data.labelled_by(split, []))
    refused("instances", call=lambda: data.labelled_by(made["cells"], [0]))
    split.weights = torch.tensor([[1.0, 0], [0.5, 0.5], [0.5, 0.5]])
    assert data.labelled_by(split, [1]).weights.tolist() == [[0, 1], [0, 1]]
    assert split.weights.tolist()[1] == [0.5, 0.5]  # the split itself is unchanged


def test_ignored_instances_stay_ignored(made):
    """Padding of an instance map comes out as 255, not as membrane."""
    padded = data.center(made["cells"].subset([0, 1]), 70)
    _, label = next(data.batches(padded, 2, 0))
    assert (label[:, :3] == 255).all() and (label[:, 3:67, 3:67] < 16).all()


# ----------------------------------------------------------------------------- hidden regions


@pytest.mark.parametrize("name", ["shapes", "cells", "lesions3d"])
def test_hide_shows_only_what_is_known(name):
    options = dict(n=12, size=32)
    plain, split = data.load(name, "train", **options), data.load(name, "train", hide=25, **options)
    channels, classes = plain.images.shape[1], plain.num_classes
    assert len(split) == 4 * len(plain) and len(set(split.names)) == len(split)
    assert split.images.shape[1] == channels + classes + 1 and split.labels.shape[1] == 1
    assert split.instances is None and split.weights is None and not split.exact
    sides = set()
    for i, (image, label) in enumerate(zip(split.images, split.labels[:, 0])):
        hidden = image[-1] == 1
        assert hidden.sum() == hidden.numel() // 4
        corners = hidden.nonzero()
        sides.add((tuple(corners.min(0).values.tolist()), tuple(corners.max(0).values.tolist())))
        assert torch.equal(image[:channels], plain.images[i // 4].masked_fill(hidden, 0))
        known = image[channels:-1]
        assert torch.equal(known.sum(0) == 1, ~hidden)
        assert torch.equal(known.argmax(0)[~hidden], label.long()[~hidden])
        assert (plain.labels[i // 4] == label).flatten(1).all(1).any()  # one of the case's maps
    assert len(sides) == 2 * hidden.dim()  # every side's turn comes


def test_hide_draws_maps_by_their_probability():
    split = data.load("modes", "all", n=15, size=48)
    hidden = data.hide(split, 50, copies=100)
    same = (hidden.labels.view(15, 100, 1, -1) == split.labels.view(15, 1, 32, -1)).all(3)
    share = same.float().mean((0, 1))
    torch.testing.assert_close(share, split.weights[0], atol=0.03, rtol=0)  # 1500 draws
    with pytest.raises(DataError, match="hide=100: give per cent"):
        data.load("modes", hide=100)
