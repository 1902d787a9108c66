"""sources/: synthetic distributions against their formulas, and every file layout against
hand-made files."""

import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import metrics
import sources.base
import sources.files
from data_files import (LPS, SYNTHETIC, arrays, cut, grey_records, load_npz, records, refused,
                        save_picture, stored, write, write_folder)
from sources.base import SPLITS, Split


@pytest.fixture(scope="module")
def made():
    return {name: data.load(name, "all", **options) for name, options in SYNTHETIC.items()}


# ------------------------------------------------------------------------------------- made sets


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_sets_keep_the_contract(name, made):
    whole, again = made[name], data.load(name, "all", **SYNTHETIC[name])
    n, annotators = whole.labels.shape[:2]
    assert whole.images.dtype == torch.float32 and whole.labels.dtype == torch.uint8
    assert len(whole) == n == len(whole.images) == len(whole.groups) == len(set(whole.names))
    assert whole.images.shape[2:] == whole.labels.shape[2:]
    assert whole.images.isfinite().all() and int(whole.labels.max()) == whole.num_classes - 1
    assert torch.equal(whole.images, again.images) and torch.equal(whole.labels, again.labels)
    if whole.weights is not None:
        assert whole.weights.shape == (n, annotators) and whole.weights.dtype == torch.float32
        torch.testing.assert_close(whole.weights.sum(1), torch.ones(n), rtol=0, atol=1e-6)
        assert (whole.weights > 0).all()
    for a, b in itertools.combinations(range(annotators), 2):  # no two label maps of a case agree
        assert (whole.labels[:, a] != whole.labels[:, b]).flatten(1).any(1).all(), (a, b)


@pytest.mark.parametrize("name", sorted(set(SYNTHETIC) - {"toy1d"}))
def test_synthetic_sets_are_split_by_group(name):
    train, val, test = data.load(name, ("train", "val", "test"), **SYNTHETIC[name])
    groups = [set(part.groups) for part in (train, val, test)]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    number = sum(map(len, groups))
    assert len(groups[2]) == math.ceil(0.2 * number)
    assert len(groups[1]) == math.ceil(0.25 * (number - len(groups[2])))
    whole = data.load(name, "all", **SYNTHETIC[name])
    assert len(train) + len(val) + len(test) == len(whole)
    assert torch.equal(val.images[0], whole.images[whole.names.index(val.names[0])])
    other = data.load(name, "val", **SYNTHETIC[name], seed=1)
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


# ---------------------------------------------------------------------------------- lidc: pickle


def test_the_split_rule_by_hand():
    # RandomState(0).permutation(10) is 2 8 4 9 1 6 7 3 0 5, of 8 it is 6 2 1 7 3 0 5 4.
    # Test: the first ceil(0.2 * 10) = 2, so g2 g8. The others are g4 g9 g1 g6 g7 g3 g0 g5; their
    # numbers 6 and 2, the first ceil(0.2 * 8) = 2 of the second shuffle, are g0 and g1.
    groups = [f"g{i}" for i in (9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 2)]
    parts = sources.base.split_groups(groups, val=0.2)
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
    parts = sources.base.split_groups(groups, val=0.2)
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
                      ["case-1", "mask 0", "str"]),
    "ragged list": (lambda: spoiled(lambda t: t["case-1"].update(image=[[1.0], [1.0, 2.0]])),
                    ["case-1", "image must be an array"]),
    "list as mask": (lambda: spoiled(lambda t: t["case-1"].update(masks=[[[1], [1, 0]]])),
                     ["case-1", "mask 0", "list"]),
    "too large": (lambda: spoiled(lambda t: t["case-1"]["image"].__setitem__((0, 0), 1e300)),
                  ["case-1", "image", "not finite"]),
    "text as mask": (lambda: spoiled(lambda t: t["case-1"].update(masks=["ab"])),
                     ["case-1", "mask 0"]),
    "mask size": (lambda: spoiled(lambda t: t["case-1"]["masks"].insert(
        1, np.zeros((6, 7), np.uint8))), ["case-1", "mask 1", "6 x 7", "6 x 6"]),
    "image size": (lambda: spoiled(lambda t: t["case-1"].update(image=np.zeros((5, 6)))),
                   ["case-1", "mask 0", "6 x 6", "5 x 6"]),
    "no pixels": (lambda: spoiled(lambda t: t["case-1"].update(image=np.zeros((0, 6)))),
                  ["case-1", "image", "0 x 6"]),
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


def test_missing_annotators_weigh_nothing(tmp_path):
    table = records()
    table["case-1"]["masks"] = table["case-1"]["masks"][:1]
    whole = data.load("lidc", "all", path=write(tmp_path / "a.pkl", table))
    assert whole.weights[1].tolist() == [1, 0, 0, 0]
    assert whole.weights[0].tolist() == [0.25] * 4
    assert (whole.labels[1, 1:] == 255).all() and (whole.labels[0] < 2).all()
    for _, label in itertools.islice(data.batches(whole.subset([1]), 8, 0), 20):
        assert (label < 2).all()


# ------------------------------------------------------------------------- lidc: tree and places


def write_tree(root, foreground=255, annotators=4):
    rng = np.random.RandomState(0)
    for part, patients in (("train", 3), ("val", 1), ("test", 2)):
        for p in range(patients):
            for z in range(2):
                name = f"z-{z}.5_c{p}"
                for kind in ("images", "gt"):
                    (root / part / kind / f"{part}-{p}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.randint(0, 256, (9, 9)).astype(np.uint8)).save(
                    root / part / "images" / f"{part}-{p}" / f"{name}.png")
                for r in range(annotators):
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

    (root / "train/gt/train-0/z-0.5_c0_l1.png").unlink()  # in LIDC this annotator drew nothing
    broken = root / "val/images/val-0/z-0.5_c0.png"
    broken.write_bytes(b"no picture")
    train = data.load("lidc", "train", path=root)
    assert train.weights is None and not train.labels[0, 1].any() and train.labels[0, 2].any()
    train = data.load("folder", "train", path=root, empty="stored", num_classes=2)
    np.testing.assert_allclose(train.weights[0], [1 / 3, 0, 1 / 3, 1 / 3])
    assert (train.labels[0, 1] == 255).all()
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
    "no annotator axis": (lambda a: a.update(labels=a["labels"][:, 0]), ["6 x 5 x 4", "[:, None]"]),
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


# -------------------------------------------------------------------------- one set, many layouts


def write_layout(layout, table, root):
    """`table` in a layout: (data set, its path)."""
    pictures = {key: np.round(record["image"] * 255).astype(np.uint8)
                for key, record in table.items()}
    keys, groups = list(table), [record["series_uid"] for record in table.values()]
    masks = np.stack([record["masks"] for record in table.values()])
    if layout == "pickle":
        return "lidc", write(root / "a.pickle", table)
    if layout == "npz":
        np.savez(root / "a.npz", images=np.stack(list(pictures.values())), labels=masks,
                 names=keys, groups=groups)
        return "lidc", root / "a.npz"
    if layout == "hdf5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(root / "a.hdf5", "w") as file:
            file["images"] = np.stack([record["image"] for record in table.values()])
            file["lidc_masks"], file["uids"] = masks.transpose(0, 2, 3, 1), groups
        return "lidc", root / "a.hdf5"
    image, label = TREES[layout]
    table = [["name", "group", "image", *[f"label_{a}" for a in range(masks.shape[1])]]]
    for key, group, drawn in zip(keys, groups, masks):
        fields = dict(key=key, group=group)
        files = [image.format(**fields), *[label.format(a=a, b=a + 1, **fields)
                                           for a in range(len(drawn))]]
        table.append([key, group, *files])
        for file, array in zip(files, [pictures[key], *drawn]):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            if file.endswith(".npy"):
                np.save(root / file, array)
            elif file.endswith(".nii.gz"):
                nibabel = pytest.importorskip("nibabel")
                nibabel.save(nibabel.Nifti1Image(array.T[..., None], LPS), root / file)
            else:
                scale = 255 if layout in ("kaggle", "tree1") and array is not pictures[key] else 1
                save_picture(root / file, array * np.uint8(scale))
    if "{group}" not in image:
        (root / "groups.csv").write_text("name,group\n" + "".join(
            f"{key},{group}\n" for key, group in zip(keys, groups)))
    if layout == "csv":
        (root / "cases.csv").write_text("\n".join(map(",".join, table)))
    return ("lidc" if "{group}" in image else "folder"), root


TREES = {  # image and label of a case, its fields filled in; annotators from 0 (a) or from 1 (b)
    "folders": ("images/{key}.png", "labels/annotator {a}/{key}.png"),
    "npy": ("images/{key}.npy", "labels/{a}/{key}.npy"),
    "csv": ("scans/{key}-x.png", "drawn/{a}-{key}.png"),
    "tree0": ("train/images/{group}/{key}.png", "train/gt/{group}/{key}_l{a}.png"),
    "tree1": ("train/images/{group}/{key}.png", "train/gt/{group}/{key}_l{b}.png"),
    "kaggle": ("{group}/nodule-1/images/{key}.png", "{group}/nodule-1/mask-{a}/{key}.png"),
    "qubiq": ("{key}/image.nii.gz", "{key}/task01_seg{b:02}.nii.gz"),
    "curvas": ("{key}/image.nii.gz", "{key}/annotation_{b}.nii.gz")}


@pytest.mark.parametrize("layout", ["npz", "hdf5", *TREES])
def test_every_layout_gives_the_same_tensors(tmp_path, layout):
    table = grey_records()
    want = data.load("lidc", "all", path=write(tmp_path / "a.pickle", table))
    root = tmp_path / "Küche mit [Leerzeichen]"
    root.mkdir()
    name, path = write_layout(layout, table, root)
    options = {"csv": "cases.csv"} if layout == "csv" else {}
    got = data.load(name, "all", path=path, **options)
    if layout == "hdf5":
        got.names = want.names  # it holds none
    rows = [[n.split("/")[-1] for n in got.names].index(name) for name in want.names]
    assert sorted(rows) == list(range(len(want)))
    if layout in ("qubiq", "curvas"):  # NIfTI images have mean 0 and standard deviation 1
        inside = np.ones((9, 9), bool)
        want.images = torch.stack([torch.from_numpy(sources.files.standardised(
            (image * np.float32(255)).round(), inside)) for image in want.images.numpy()])
    assert torch.equal(got.images[rows], want.images)
    assert torch.equal(got.labels[rows], want.labels) and got.num_classes == want.num_classes == 2
    assert [got.groups[i] for i in rows] == want.groups and got.weights is None


def test_more_than_ten_annotators_in_a_tree(tmp_path):
    whole = data.load("lidc", "all", path=write_layout("tree1", grey_records(3, 12), tmp_path)[1])
    assert whole.labels.shape[:2] == (3, 12) and whole.weights is None


def test_hdf5_with_its_own_split(tmp_path):
    h5py = pytest.importorskip("h5py")
    path, rng = tmp_path / "data_lidc.hdf5", np.random.RandomState(0)
    stored = {part: (rng.rand(n, 6, 7) - 0.5, rng.randint(0, 2, (n, 6, 7, 4)))
              for part, n in (("train", 5), ("val", 2), ("test", 3))}

    def save(uids):
        with h5py.File(path, "w") as file:
            for part, (images, labels) in stored.items():
                file[f"{part}/images"], file[f"{part}/labels"] = images, labels
                file[f"{part}/uids"] = uids[part]

    save({"train": range(5), "val": [7, 7], "test": [8, 9, 9]})
    train, test = data.load("lidc", ("train", "test"), path=path)
    np.testing.assert_array_equal(train.images[:, 0], stored["train"][0].astype(np.float32))
    np.testing.assert_array_equal(test.labels, stored["test"][1].transpose(0, 3, 1, 2))
    assert test.groups == ["8", "9", "9"] and test.names[0] == "test/00000"
    save({"train": range(5), "val": [7, 7], "test": [8, 9, 4]})
    refused("'4' is in train and in test", call=lambda: data.load("lidc", "val", path=path))
    raw = path.read_bytes()
    for stump in (raw[:3000], raw[:-200], b""):
        path.write_bytes(stump)
        refused(path, "HDF5", call=lambda: data.load("lidc", "all", path=path))
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = np.zeros((3, 5, 6)), np.zeros((3, 6, 5, 4))
    refused("3 x 5 x 6", "3 x 6 x 5 x 4", call=lambda: data.load("lidc", "all", path=path))


@pytest.mark.parametrize("module", ["h5py", "nibabel"])
def test_missing_packages_are_named(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "h5py":
        name, path = "lidc", tmp_path / "a.h5"
        path.write_bytes(b"")
    else:
        name, path = "brats", tmp_path
        for kind in ("flair", "t1", "t1ce", "t2", "seg"):
            (path / "p1").mkdir(exist_ok=True)
            (path / "p1" / f"p1_{kind}.nii.gz").write_bytes(b"")
    refused(f"pip install {module}", call=lambda: data.load(name, "all", path=path))


# ------------------------------------------------------------------------ sizes, splits and views


def test_cases_of_different_sizes_are_centred_in_the_largest(tmp_path):
    table, sizes = records(6), [(5, 6), (6, 6), (7, 4), (4, 9), (6, 6), (6, 6)]
    rng = np.random.RandomState(0)
    for record, size in zip(table.values(), sizes):
        record["image"] = rng.rand(*size)
        record["masks"] = [(rng.rand(*size) > 0.5).astype(np.uint8) for _ in range(4)]
    whole = data.load("lidc", "all", path=write(tmp_path / "a.pickle", table))
    assert whole.images.shape == (6, 1, 7, 9) and whole.weights is None
    for i, record in enumerate(table.values()):
        alone = Split(torch.tensor(record["image"]).float()[None, None],
                      torch.tensor(np.stack(record["masks"]))[None], None, ["0"], 2, ["0"])
        alone = data.center(alone, (7, 9))
        assert torch.equal(whole.images[i], alone.images[0])
        assert torch.equal(whole.labels[i], alone.labels[0])


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def test_split_files(tmp_path):
    path, file = write(tmp_path / "a.pickle", records(12)), tmp_path / "split.json"
    usual = data.load("lidc", ("train", "val", "test"), path=path)
    write_json(file, usual[0].parts)
    again = data.load("lidc", ("train", "val", "test"), path=path, split_file=file)
    for before, after in zip(usual, again):
        assert before.names == after.names and torch.equal(before.images, after.images)
    # Groups and cases may be mixed; what is not listed is left out.
    write_json(file, {"train": ["uid-0", "case-2", "case-3"], "test": ["uid-3"]})
    train, test = data.load("lidc", ("train", "test"), path=path, split_file=str(file))
    assert train.names == ["case-0", "case-1", "case-2", "case-3"]
    assert test.names == ["case-6", "case-7"]
    assert train.parts == {"train": train.names, "val": [], "test": test.names}
    whole = data.load("lidc", "all", path=path)
    assert torch.equal(test.labels, whole.labels[6:8])

    def told(content, *fragments, split="train"):
        write_json(file, content)
        refused(file, *fragments,
                call=lambda: data.load("lidc", split, path=path, split_file=file))

    told({"train": ["uid-9"]}, "'uid-9'", "'case-0'", "'uid-0'")
    told({"train": ["uid-0"], "test": ["case-1"]}, "'uid-0' is in train and in test")
    told({"train": ["case-0"], "val": ["case-1"]}, "'uid-0' is in train and in val")
    told({"train": ["uid-0"]}, "'val'", "listed", split="val")
    told({"training": []}, '"train"')
    told(["uid-0"], '"train"')
    told({"train": "uid-0"}, '"train"')
    file.write_text('{"train": [')
    refused(file, "JSON", call=lambda: data.load("lidc", path=path, split_file=file))
    refused("nowhere.json", call=lambda: data.load("lidc", path=path, split_file="nowhere.json"))
    refused("split_file=3", "text", call=lambda: data.load("lidc", path=path, split_file=3))
    refused("'split_file'", call=lambda: data.load("shapes", split_file="a.json"))


def test_names_of_cases_are_no_names_of_groups(tmp_path):
    """Case 7 is of patient 3, and case 3 of patient 1: a run's split.json lists cases."""
    path, file = tmp_path / "own.npz", tmp_path / "split.json"
    np.savez(path, images=np.random.rand(40, 8, 8), labels=np.ones((40, 1, 8, 8), np.uint8),
             groups=np.arange(40) // 2)
    first = data.load("npz", SPLITS, path)
    file.write_text(json.dumps(first[0].parts))
    for before, again in zip(first, data.load("npz", SPLITS, path, split_file=str(file))):
        assert before.names == again.names


def test_a_split_file_goes_over_the_sets_own_split(tmp_path):
    root = write_tree(tmp_path)
    file = write_json(tmp_path / "split.json", {"train": ["test-0"], "val": ["train-1"]})
    train, val = data.load("lidc", ("train", "val"), path=root, split_file=file)
    assert set(train.groups) == {"test-0"} and set(val.groups) == {"train-1"}


def test_a_patient_on_both_sides_of_a_tree_is_refused(tmp_path):
    root = write_tree(tmp_path)
    for kind in ("images", "gt"):
        (root / "val" / kind / "val-0").rename(root / "val" / kind / "train-2")
    refused("'train-2' is in train and in val", call=lambda: data.load("lidc", path=root))


def test_synthetic_sets_tell_their_parts(made):
    train, val = data.load("shapes", ("train", "val"), n=40)
    assert train.parts["train"] == train.names and val.parts["val"] == val.names
    assert sum(map(len, val.parts.values())) == 40


def test_a_subset_of_a_range_is_a_view(made):
    whole = made["cells"]
    for rows in (range(3, 9), range(0, 20, 4), range(5, 5)):
        view, copy = whole.subset(rows), whole.subset(list(rows))
        assert torch.equal(view.images, copy.images) and view.names == copy.names
        assert torch.equal(view.instances, copy.instances)
        assert view.images.untyped_storage().data_ptr() == whole.images.untyped_storage().data_ptr()


def test_two_cases_of_one_name_are_refused(tmp_path):
    refused("two cases", "'a'", call=lambda: load_npz(tmp_path, **arrays(),
                                                      names=np.array(list("abcdae"))))


# ----------------------------------------------------------------------------------------- folder


@pytest.mark.parametrize("kind, channels, suffix", [
    (np.uint8, (), ".png"), (np.uint16, (), ".png"), (np.uint8, (3,), ".png"),
    (np.uint16, (), ".tif"), (np.uint8, (3,), ".TIFF")])
def test_folder_of_pictures(tmp_path, kind, channels, suffix):
    images, labels = write_folder(tmp_path, kind, channels, suffix)
    whole = data.load("folder", "all", path=tmp_path)
    want = (images / np.float32(np.iinfo(kind).max)).reshape(6, 8, 7, -1).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(whole.images, want)
    np.testing.assert_array_equal(whole.labels, labels)
    assert whole.num_classes == 3 and whole.groups == whole.names == [f"case {i}" for i in range(6)]
    assert data.load("folder", "all", path=tmp_path, num_classes=5).num_classes == 5
    refused("num_classes is 1", call=lambda: data.load("folder", path=tmp_path, num_classes=1))
    assert [len(part) for part in data.load("folder", ("train", "val", "test"), path=tmp_path)] == [
        3, 1, 2]


def test_folder_palettes_missing_annotators_and_other_modes(tmp_path):
    images, labels = write_folder(tmp_path)
    picture = Image.fromarray(labels[0, 1], "L").convert("P")
    picture.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 250])
    picture.putdata(labels[0, 1].flatten().tolist())
    picture.save(tmp_path / "labels/ben/case 0.png")
    (tmp_path / "labels/anna/case 2.png").unlink()
    (tmp_path / "labels/ben/.DS_Store").write_bytes(b"")
    (tmp_path / "labels/ben/loop").symlink_to(tmp_path / "labels/ben")
    whole = data.load("folder", "all", path=tmp_path)
    np.testing.assert_array_equal(whole.labels[0], labels[0])
    assert whole.weights[2].tolist() == [0, 1] and (whole.labels[2, 0] == 255).all()
    Image.fromarray(images[1]).convert("RGB").save(tmp_path / "images/case 1.jpg")
    (tmp_path / "images/case 1.png").unlink()
    refused("case 1", "3 x 8 x 7", "1 x 8 x 7", "channels",
            call=lambda: data.load("folder", "all", path=tmp_path))
    for i in (0, 2, 3, 4, 5):
        mode = "RGBA" if i else "P"
        Image.fromarray(images[i]).convert(mode).save(tmp_path / f"images/case {i}.png")
    colours = data.load("folder", "all", path=tmp_path)
    assert colours.images.shape == (6, 3, 8, 7)
    np.testing.assert_array_equal(colours.images[2, 1], images[2] / np.float32(255))


def test_black_and_white_masks_need_a_word(tmp_path):
    _, labels = write_folder(tmp_path)
    for i in range(6):
        for annotator, name in enumerate(("anna", "ben")):
            save_picture(tmp_path / f"labels/{name}/case {i}.png",
                         (labels[i, annotator] > 0).astype(np.uint8) * 255)
    refused("255", "masks=binary", call=lambda: data.load("folder", path=tmp_path))
    whole = data.load("folder", "all", path=tmp_path, masks="binary")
    np.testing.assert_array_equal(whole.labels, labels > 0)
    assert whole.num_classes == 2
    refused("masks='grey'", "classes, binary",
            call=lambda: data.load("folder", path=tmp_path, masks="grey"))


def test_folder_groups(tmp_path):
    write_folder(tmp_path)
    lines = [f'case {i},"patient, {i // 2}"' for i in range(6)]
    (tmp_path / "groups.csv").write_text("\ufeffname,group\n" + "\n".join(lines), encoding="utf-8")
    whole = data.load("folder", "all", path=tmp_path)
    assert whole.groups == [f"patient, {i // 2}" for i in range(6)]
    for spoiled in (lines[:-1], [*lines, "case 9,x"]):
        (tmp_path / "groups.csv").write_text("\n".join(spoiled))
        refused("groups.csv", "'case", call=lambda: data.load("folder", path=tmp_path))
    (tmp_path / "groups.csv").write_text("case 0\n")
    refused("groups.csv", call=lambda: data.load("folder", path=tmp_path))


BAD_FOLDERS = {
    "truncated image": (cut("images/case 1.png", 60), ["images/case 1.png", "PNG"]),
    "truncated label": (cut("labels/ben/case 1.png", 45), ["labels/ben/case 1.png", "PNG"]),
    "same name": (lambda root: save_picture(root / "images/case 1.jpg", np.zeros((8, 7), np.uint8)),
                  ["case 1.jpg", "case 1.png", "same name"]),
    "no image": (lambda root: save_picture(root / "labels/ben/x.png", np.zeros((8, 7), np.uint8)),
                 ["labels/ben/x.png", "images/"]),
    "no label": (lambda root: save_picture(root / "images/x.png", np.zeros((8, 7), np.uint8)),
                 ["images/x.png", "no mask"]),
    "JPEG label": (lambda root: (save_picture(root / "labels/ben/case 1.jpg", np.zeros(
        (8, 7), np.uint8)), (root / "labels/ben/case 1.png").unlink()), ["case 1.jpg", "JPEG"]),
    "colour label": (lambda root: save_picture(root / "labels/ben/case 1.png", np.zeros(
        (8, 7, 3), np.uint8) + np.uint8([0, 0, 1])), ["case 1.png", "RGB", "palette"]),
    "sizes": (lambda root: save_picture(root / "labels/ben/case 1.png", np.zeros(
        (7, 8), np.uint8)), ["ben/case 1.png is 7 x 8", "images/case 1.png 8 x 7"]),
    "fractions": (lambda root: ((root / "labels/ben/case 1.png").unlink(), save_picture(
        root / "labels/ben/case 1.tif", np.full((8, 7), 0.5, np.float32))), ["'case 1'", "0.5"]),
    "class 300": (lambda root: save_picture(root / "labels/ben/case 1.png", np.full(
        (8, 7), 300, np.uint16)), ["'case 1'", "mask of ben", "300"]),
    "class 2 of 2": (lambda root: None, ["value 2", "0 to 1"]),
    "another kind": (lambda root: (root / "images/notes.txt").write_text("x"),
                     ["notes.txt", ".png"]),
    "a link to itself": (lambda root: (root / "images/x.png").symlink_to(root / "images/x.png"),
                         ["images/x.png", "PNG"]),
    "no labels": (lambda root: (root / "labels").rename(root / "masks"), ["labels"]),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_line(tmp_path, fault):
    root = tmp_path / "größe 1"
    write_folder(root)
    change, fragments = BAD_FOLDERS[fault]
    change(root)
    options = {"num_classes": 2} if fault == "class 2 of 2" else {}
    refused(*fragments, call=lambda: data.load("folder", "all", path=root, **options))


def test_folder_of_volumes(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.RandomState(0)
    volumes = rng.randint(-1000, 3000, (4, 5, 6, 7)).astype(np.int16)  # x, y, z
    labels = rng.randint(0, 3, (4, 5, 6, 7)).astype(np.uint8)
    for i in range(4):
        for kind, array in (("images", volumes[i]), ("labels/anna", labels[i])):
            (tmp_path / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, LPS), tmp_path / kind / f"v{i}.nii.gz")
    whole = data.load("folder", "all", path=tmp_path)
    assert whole.images.shape == (4, 1, 7, 6, 5) and whole.labels.shape == (4, 1, 7, 6, 5)
    np.testing.assert_array_equal(whole.labels[:, 0], labels.transpose(0, 3, 2, 1))
    want = volumes[2].T.astype(np.float64)
    np.testing.assert_allclose(whole.images[2, 0], (want - want.mean()) / want.std(), atol=1e-6)
    cut("images/v1.nii.gz", 90)(tmp_path)
    refused("v1.nii.gz", "NIfTI", call=lambda: data.load("folder", path=tmp_path))


def test_labels_that_lie_elsewhere_are_refused(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    world = np.random.default_rng(0).integers(0, 2, (4, 5, 6)).astype(np.uint8)
    for name, axes, matrix in (("images/v", (0, 1, 2), LPS), ("labels/anna/v", (2, 0, 1), LPS)):
        (tmp_path / name).parent.mkdir(parents=True)
        nibabel.save(nibabel.Nifti1Image(*stored(world, matrix, axes, (0, 1, 0))),
                     tmp_path / f"{name}.nii.gz")
    one = data.load("folder", "all", path=tmp_path)  # in another order: the same voxels
    np.testing.assert_array_equal(one.labels[0, 0] > 0, one.images[0, 0] > 0)
    nibabel.save(nibabel.Nifti1Image(world, np.eye(4)), tmp_path / "labels/anna/v.nii.gz")
    refused("labels/anna/v.nii.gz", "affine", call=lambda: data.load("folder", "all",
                                                                     path=tmp_path))


# --------------------------------------------------------------------------------------------- em


def sections(n=20, size=(8, 12)):
    """Images whose pixels tell section, row and column, and ids that are large and gappy."""
    rng = np.random.RandomState(0)
    return (rng.randint(0, 256, (n, *size)).astype(np.uint8),
            rng.choice([0, 3, 70, 4000, 60000], (n, *size)).astype(np.uint16))


def write_sections(root, layout, images, instances):
    if layout == "npz":
        np.savez(root / "em.npz", images=images, instances=instances)
        return root / "em.npz"
    for kind, stack in (("input", images), ("labels", instances)):
        pages = [Image.fromarray(page) for page in stack]
        pages[0].save(root / f"train-{kind}.tif", save_all=True, append_images=pages[1:])
    return root


@pytest.mark.parametrize("layout", ["npz", "tiff"])
def test_em_layouts_tiles_and_splits(tmp_path, layout):
    images, ids = sections()
    path = write_sections(tmp_path, layout, images, ids)
    train, val, test = data.load("em", ("train", "val", "test"), path=path, tile=4)
    assert [len(part) for part in (train, val, test)] == [16 * 6, 2 * 6, 2 * 6]
    assert set(val.groups) == {"section-0016", "section-0017"}
    assert set(test.groups) == {"section-0018", "section-0019"}
    row = test.names.index("section-0019/y0004-x0008")
    np.testing.assert_array_equal(test.images[row, 0], images[19, 4:, 8:] / np.float32(255))
    want = ids[19, 4:, 8:].astype(int)
    got = test.instances[row].numpy()
    assert ((got == 0) == (want == 0)).all() and got.max() < 5
    assert ((got[None, :, :, None, None] == got) == (want[None, :, :, None, None] == want)).all()
    for label in test.labels.unbind(1):  # each of the four maps colours every instance as a whole
        assert torch.equal(label == 0, test.instances == 0) and label.max() <= 15
        for value in test.instances[row].unique():
            assert label[row][test.instances[row] == value].unique().numel() == 1
    assert test.num_classes == 16 and test.weights is None and test.labels.shape[1] == 4
    whole = data.load("em", "all", path=path, tile=0)  # whole sections
    assert whole.images.shape == (20, 1, 8, 12) and whole.names == whole.groups
    assert data.load("em", "all", path=path, tile=5).images.shape == (40, 1, 5, 5)
    _, label = next(data.batches(train, 4, 0))
    assert label.max() <= 15


def test_em_splits_of_few_sections(tmp_path):
    path = write_sections(tmp_path, "npz", *sections(14))  # a tenth, rounded up, is 2
    parts = data.load("em", ("train", "val", "test"), path=path, tile=0)
    assert [len(part) for part in parts] == [10, 2, 2]
    path = write_sections(tmp_path, "npz", *sections(2))
    refused("'train'", "2 groups", call=lambda: data.load("em", path=path, tile=0))


def test_em_labels_of_a_case_hang_on_its_name_alone(tmp_path):
    images, ids = sections()
    path = write_sections(tmp_path, "npz", images, ids)
    first = data.load("em", "test", path=path, tile=4)
    ids[:18] = 7
    second = data.load("em", "test", path=write_sections(tmp_path, "npz", images, ids), tile=4)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.labels[:, 0], first.labels[:, 1])


BAD_SECTIONS = {
    "sizes": (lambda i, k: (i, k[:, :, :-1]), ["20 x 8 x 12", "20 x 8 x 11"]),
    "small": (lambda i, k: (i[:, :3], k[:, :3]), ["from 4 up"]),
    "fractions": (lambda i, k: (i, k + 0.5), ["section-0000", "float"]),
    "negative": (lambda i, k: (i, k.astype(int) - 9), ["section-0000", "-9"]),
    "float image": (lambda i, k: (i * np.nan, k), ["section-0000", "not finite"]),
}


@pytest.mark.parametrize("fault", BAD_SECTIONS)
def test_bad_sections_are_refused_in_one_line(tmp_path, fault):
    change, fragments = BAD_SECTIONS[fault]
    path = write_sections(tmp_path, "npz", *change(*sections()))
    refused(path, *fragments, call=lambda: data.load("em", path=path, tile=4))


def test_damaged_sections(tmp_path):
    root = write_sections(tmp_path, "tiff", *sections())
    cut("train-labels.tif", 1500)(root)
    refused("train-labels.tif", "TIFF", call=lambda: data.load("em", path=root, tile=4))
    (root / "train-labels.tif").unlink()
    refused("train-labels.tif", "no such file", call=lambda: data.load("em", path=root, tile=4))
    path = write_sections(tmp_path, "npz", *sections())
    cut("em.npz", 300)(root)
    refused(path, "npz", call=lambda: data.load("em", path=path, tile=4))


# ------------------------------------------------------------------------------------- cityscapes


CITIES = {"train": ("aachen", "ulm"), "val": ("lindau",)}


TRAIN_ID = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11,
            25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


def write_cityscapes(root, size=(8, 16)):
    """Two scenes a city: {name: (image (H, W, 3), instance ids (H, W))}."""
    rng, scenes = np.random.RandomState(0), {}
    for half, cities in CITIES.items():
        for city in cities:
            for number in range(2):
                name = f"{city}_00000{number}_000019"
                image = rng.randint(0, 256, (*size, 3)).astype(np.uint8)
                kinds = rng.choice([0, 3, 7, 8, 9, 21, 24, 26, 29, 33], size)
                ids = np.where(np.isin(kinds, (24, 26, 33)) & (rng.rand(*size) < 0.8),
                               kinds * 1000 + rng.randint(0, 4, size), kinds).astype(np.uint16)
                save_picture(root / f"leftImg8bit/{half}/{city}/{name}_leftImg8bit.png", image)
                truth = root / f"gtFine/{half}/{city}/{name}_gtFine"
                save_picture(truth.with_name(f"{truth.name}_labelIds.png"), kinds.astype(np.uint8))
                save_picture(truth.with_name(f"{truth.name}_instanceIds.png"), ids)
                scenes[name] = image, ids
    return scenes


def kind_of(ids):
    return np.where(ids < 1000, ids, ids // 1000)


def test_cityscapes_modes(tmp_path):
    scenes = write_cityscapes(tmp_path)
    train, val, test = data.load("cityscapes", ("train", "val", "test"), path=tmp_path, factor=1)
    assert [set(part.groups) for part in (train, val, test)] == [set(part.names) for part in (train, val, test)]
    assert train.num_classes == 24 and train.exact and train.labels.shape == (2, 1, 8, 16)
    assert train.scored == (0, 1, 8, 11, 13, 19, 20, 21, 22, 23)
    maps = train.all_maps()
    assert maps.labels.shape == (2, 32, 8, 16) and maps.flips is None and maps.all_maps() is maps
    flips = {1: 8, 11: 7, 13: 6, 8: 5, 0: 4}  # train ids of sidewalk ... road: odds in 17ths
    for i, name in enumerate(train.names):
        image, ids = scenes[name]
        np.testing.assert_array_equal(train.images[i], image.transpose(2, 0, 1) / np.float32(255))
        base = np.vectorize(lambda k: TRAIN_ID.get(k, 255))(kind_of(ids))
        for mode in range(32):
            want, odds = base.copy(), 1
            for j, (value, share) in enumerate(flips.items()):
                flipped = mode >> j & 1
                odds *= (share if flipped else 17 - share) / 17
                want[(base == value) & bool(flipped)] = 19 + j
            np.testing.assert_array_equal(maps.labels[i, mode], want)
            assert float(maps.weights[i, mode]) == pytest.approx(odds, abs=1e-7)
    torch.testing.assert_close(train.probabilities, maps.probabilities)


def test_flips_are_drawn_in_batches_by_their_odds(tmp_path):
    write_cityscapes(tmp_path)
    train = data.load("cityscapes", "train", path=tmp_path, factor=1).subset([1])
    assert train.flips.shape == (1, 32, 256)
    known, counts = train.all_maps().labels[0].long(), torch.zeros(32)
    for _, labels in itertools.islice(data.batches(train, 100, 0), 40):
        for label in labels:
            match = (known == label).flatten(1).all(1).nonzero().flatten()
            assert len(match) == 1
            counts[match] += 1
    expected = 4000 * train.weights[0]
    assert ((counts - expected)**2 / expected).sum() < 61.1  # chi-square, 31 dof, p = 0.001
    _, label = next(data.batches(data.labelled_by(train, [31]), 4, 0))
    assert (label == known[31]).all()
    # What holds for all splits: they move, are cut and padded like others.
    padded = data.center(train, (10, 12)).all_maps()
    assert (padded.labels[:, :, 0] == 255).all()
    assert torch.equal(padded.labels[:, :, 1:9], train.all_maps().labels[..., 2:14])
    augmentation = data.DATASETS["cityscapes"].augmentation
    _, label = next(data.batches(train, 4, 0, augmentation=augmentation))
    assert int(label[label != 255].max()) < 24
    assert train.to("meta").flips.device.type == "meta"
    rows = data._summary(train, data._distances(train))
    assert rows["annotators"] == "32" and "annotator 0" not in rows  # modes are nobody's


def test_cityscapes_cars(tmp_path):
    scenes = write_cityscapes(tmp_path)
    train = data.load("cityscapes", "train", path=tmp_path, task="cars", factor=1)
    assert train.num_classes == 23 and train.fixed == 18 and train.scored == tuple(range(18, 23))
    others = {k: v - (v > 13) for k, v in TRAIN_ID.items() if k != 26}
    stream = data.batches(train, 6, 0)
    drawn = [label for _ in range(20) for label in next(stream)[1]]
    seen = set()
    for i, name in enumerate(train.names):
        ids = scenes[name][1]
        fixed = np.vectorize(lambda k: others.get(k, 255))(kind_of(ids))  # groups of cars: 255
        cars = [ids == value for value in np.unique(ids) if value // 1000 == 26]
        maps = [label.numpy() for label in train.labels[i]]
        maps += [label.numpy() for label in drawn
                 if (label.numpy() == fixed)[~np.any(cars, 0)].all()]
        assert len(maps) == 4 + 60
        for label in maps:
            assert (label == fixed)[~np.any(cars, 0)].all()
            for car in cars:
                (value,) = np.unique(label[car])
                seen.add(int(value))
    assert seen == set(range(18, 23))
    # The fixed maps of a case are the same, whatever is read beside it.
    both = data.load("cityscapes", ("train", "val"), path=tmp_path, task="cars", factor=1)[1]
    alone = data.load("cityscapes", "val", path=tmp_path, task="cars", factor=1)
    assert torch.equal(both.labels, alone.labels)


def test_cityscapes_is_shrunk_as_the_papers_do(tmp_path):
    scenes = write_cityscapes(tmp_path)
    for task, factor in (("modes", 4), ("cars", 2)):
        train = data.load("cityscapes", "train", path=tmp_path, task=task)
        assert train.images.shape == (2, 3, 8 // factor, 16 // factor)
        image, ids = scenes[train.names[0]]
        small = Image.fromarray(image).resize((16 // factor, 8 // factor),
                                              Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(train.images[0].permute(1, 2, 0) * 255, np.asarray(small))
        kinds = Image.fromarray(kind_of(ids).astype(np.uint8)).resize(
            (16 // factor, 8 // factor), Image.Resampling.NEAREST)
        void = ~np.isin(kinds, list(TRAIN_ID))
        assert (train.labels[0, 0].numpy() == 255)[void].all()
    refused("shrunk to 0", call=lambda: data.load("cityscapes", path=tmp_path, factor=9))


def test_cityscapes_reads_only_what_is_asked(tmp_path):
    write_cityscapes(tmp_path)
    cut("gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png", 50)(tmp_path)
    (tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    assert len(data.load("cityscapes", "train", path=tmp_path)) == 2
    refused("lindau_000000", "PNG", call=lambda: data.load("cityscapes", "test", path=tmp_path))
    refused("ulm_000000", "PNG", call=lambda: data.load("cityscapes", "val", path=tmp_path))
    for file in (tmp_path / "leftImg8bit/train/ulm").iterdir():
        file.unlink()
    refused("'val'", "cities", call=lambda: data.load("cityscapes", "val", path=tmp_path))
    refused("task='streets'", "modes, cars",
            call=lambda: data.load("cityscapes", path=tmp_path, task="streets"))


# -------------------------------------------------------------------------------- synapse and brats


def write_synapse(root, volumes=5, slices=3):
    rng, stored = np.random.RandomState(0), {}
    (root / "train_npz").mkdir()
    for case in range(volumes):
        for z in range(slices):
            name = f"case{case:04d}_slice{z:03d}"
            stored[name] = rng.rand(12, 12).astype(np.float32), rng.randint(0, 9, (12, 12)) * 1.0
            np.savez(root / "train_npz" / f"{name}.npz", image=stored[name][0],
                     label=stored[name][1])
    return stored


def test_synapse_slices(tmp_path):
    stored = write_synapse(tmp_path)
    train, val = data.load("synapse", ("train", "val"), path=tmp_path, size=0)
    assert len(train) == 12 and len(set(val.groups)) == 1 and val.num_classes == 9
    for i, name in enumerate(train.names):
        np.testing.assert_array_equal(train.images[i, 0], stored[name][0])
        np.testing.assert_array_equal(train.labels[i, 0], stored[name][1])
        assert train.groups[i] == name[:8]
    small = data.load("synapse", "train", path=tmp_path, size=4)  # pixel k covers 3 k to 3 k + 2
    image, label = stored[small.names[0]]
    np.testing.assert_array_equal(small.labels[0, 0], label[1::3, 1::3])
    weights = np.array([1, 2, 3, 2, 1]) / 9  # a triangle of 3 pixels to either side
    assert float(small.images[0, 0, 1, 2]) == pytest.approx(
        float(weights @ image[2:7, 5:10] @ weights), abs=1e-5)
    assert data.load("synapse", "train", path=tmp_path).images.shape[-2:] == (224, 224)
    refused("'test'", "test_vol_h5", call=lambda: data.load("synapse", "test", path=tmp_path))
    np.savez(tmp_path / "train_npz/case0000_slice001.npz", image=np.zeros((12, 12)),
             label=np.zeros((12, 11)))
    refused("case0000_slice001.npz", "12 x 11", call=lambda: data.load("synapse", "all",
                                                                       path=tmp_path))


def test_synapse_volumes(tmp_path):
    h5py = pytest.importorskip("h5py")
    write_synapse(tmp_path)
    (tmp_path / "test_vol_h5").mkdir()
    rng = np.random.RandomState(1)
    image, label = rng.rand(4, 12, 12).astype(np.float32), rng.randint(0, 9, (4, 12, 12))
    with h5py.File(tmp_path / "test_vol_h5/case0008.npy.h5", "w") as file:
        file["image"], file["label"] = image, label
    test = data.load("synapse", "test", path=tmp_path, size=0)
    np.testing.assert_array_equal(test.images[:, 0], image)
    np.testing.assert_array_equal(test.labels[:, 0], label)
    assert test.groups == ["case0008"] * 4 and test.names[2] == "case0008_slice002"
    assert len(test.parts["train"]) == 12
    (tmp_path / "test_vol_h5/case0008.npy.h5").rename(tmp_path / "test_vol_h5/case0003.npy.h5")
    refused("'case0003", call=lambda: data.load("synapse", "test", path=tmp_path))


def write_brats(root, patients=10):
    nibabel = pytest.importorskip("nibabel")
    rng, stored = np.random.RandomState(0), {}
    for i in range(patients):
        folder = root / ("HGG" if i % 2 else "LGG") / f"Brats17_{i}_1"
        folder.mkdir(parents=True)
        brain = np.zeros((9, 8, 7), bool)  # x, y, z
        brain[1:6 + i % 3, 2:7, 1:6] = True
        brain[3, 4, 2:4] = False
        volumes = rng.randint(1, 900, (4, 9, 8, 7)).astype(np.int16) * brain
        seg = rng.choice([0, 1, 2, 4], (9, 8, 7)).astype(np.uint8)
        for kind, array in zip(("flair", "t1", "t1ce", "t2", "seg"), (*volumes, seg)):
            nibabel.save(nibabel.Nifti1Image(array, LPS),
                         folder / f"{folder.name}_{kind}.nii.gz")
        stored[folder.name] = volumes, seg, brain
    return stored


def test_brats(tmp_path):
    stored = write_brats(tmp_path)
    train, val, test = data.load("brats", ("train", "val", "test"), path=tmp_path)
    assert [len(part) for part in (train, val, test)] == [6, 1, 3] and train.num_classes == 4
    assert train.images.shape == (6, 4, 5, 5, 7) and train.groups == train.names
    for i, name in enumerate(train.names):
        volumes, seg, brain = stored[name]
        wide = int(brain.any((1, 2)).sum())
        low = (7 - wide) // 2  # brains of 5 and 6 are filled up to 7
        box, at = np.s_[..., 1:1 + wide, 2:7, 1:6], slice(low, low + wide)
        values = volumes[:, brain].T.astype(np.float64)  # (pixels of the brain, 4)
        want = np.where(brain, ((volumes.T - values.mean(0)) / values.std(0)).T, 0)
        np.testing.assert_allclose(train.images[i, ..., at], want[box].transpose(0, 3, 2, 1),
                                   atol=1e-5)
        truth = np.where(brain, np.where(seg == 4, 3, seg), 255)
        np.testing.assert_array_equal(train.labels[i, 0][..., at], truth[box].T)
        air = torch.ones(7, dtype=torch.bool)
        air[at] = False
        assert (train.labels[i, 0][..., air] == 255).all() and not train.images[i][..., air].any()
    folder = next(path for path in (tmp_path / "HGG").iterdir() if path.name == "Brats17_1_1")
    (folder / "Brats17_1_1_t2.nii.gz").unlink()
    refused("Brats17_1_1", "_t2.nii.gz", call=lambda: data.load("brats", "all", path=tmp_path))


def test_a_split_file_without_test_serves_training_and_says_so_when_asked(tmp_path):
    path = write(tmp_path / "a.pickle", records(12))
    file = write_json(tmp_path / "split.json", {"train": ["uid-0", "uid-1"], "val": ["uid-2"]})
    train, val = data.load("lidc", ("train", "val"), path, split_file=file)
    assert len(train) == 4 and len(val) == 2 and train.parts["test"] == []
    refused(file, "'test'", "none is listed",
            call=lambda: data.load("lidc", "test", path, split_file=file))


def test_the_readmes_pooling_of_folds_runs(tmp_path, monkeypatch, capsys):
    """Patient p of fold 1 has two cases, q and r of fold 2 have one each."""
    text = Path(data.__file__).with_name("sources").joinpath("README.md").read_text("utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for fold, lines in (("1", ["a,p,0.5", "b,p,nan"]), ("2", ["c,q,1", "d,r,1.5"])):
        (tmp_path / f"runs/fold{fold}").mkdir(parents=True)
        (tmp_path / f"runs/fold{fold}/per_case.csv").write_text(
            "\n".join(["name,group,ged_16", *lines, ""]))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    pooled = metrics.bootstrap([0.5, 1, 1.5], ["p", "q", "r"])
    assert capsys.readouterr().out == f"{pooled}\n" and pooled["mean"] == 1
