"""sources/templates.py and sources/export.py: folders of any layout, tables, volumes by slice,
trees that do not fit, and what is written for other codebases."""

import json
import os
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sources.base
import sources.templates
from analysis.classes import SLICE
from common import key_values
from data_files import LPS, arrays, grey_records, records, refused, save_picture, write
from sources.export import export


def put(root, files):
    """{path: array} as pictures, .npy or NIfTI of what numpy calls (z,) y, x."""
    for name, array in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".npy"):
            np.save(root / name, array)
        elif ".nii" in name:
            nibabel = pytest.importorskip("nibabel")
            nibabel.save(nibabel.Nifti1Image(array.T, LPS), root / name)
        else:
            save_picture(root / name, array)
    return root


def grey(seed, size=(6, 5)):
    return np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)


def mask(seed, size=(6, 5), classes=2):
    return np.random.default_rng(seed).integers(0, classes, size).astype(np.uint8)


KAGGLE = {f"LIDC-IDRI-{p:04}/nodule-{n}/{kind}/slice-{z}.png":
          grey(p + z) if kind == "images" else 255 * mask((p, n, z, a))
          for p in range(10) for n in range(1, 3) for z in range(2)
          for a, kind in enumerate(["images", "mask-0", "mask-1", "mask-2", "mask-3"])}


# ------------------------------------------------------------------------------------ what is read


def test_kaggles_lidc_is_found_by_itself(tmp_path, capsys):
    put(tmp_path, KAGGLE)
    (tmp_path / "LIDC-IDRI-0003/nodule-2/mask-1/slice-1.png").unlink()
    train, val, test = data.load("lidc", ("train", "val", "test"), tmp_path)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "kaggle-lidc" in told and "mask-{annotator}" in told
    assert told.endswith(", annotators 0, 1, 2, 3, 40 images of 10 groups (patients)\n")
    assert [len(set(part.groups)) for part in (train, val, test)] == [6, 2, 2]  # 64/16/20 of 10
    whole = data.load("lidc", "all", tmp_path)
    assert whole.labels.shape == (40, 4, 6, 5) and whole.num_classes == 2 and whole.weights is None
    row = whole.names.index("LIDC-IDRI-0003/nodule-2/slice-1")
    for a in (0, 2, 3):
        np.testing.assert_array_equal(whole.labels[row, a], mask((3, 2, 1, a + 1)))
    assert not whole.labels[row, 1].any()  # who has no mask drew nothing
    np.testing.assert_array_equal(whole.images[row, 0], grey(4) / np.float32(255))


def test_a_folder_too_high_up_is_told_what_it_holds(tmp_path):
    put(tmp_path / "LIDC-IDRI-slices", KAGGLE)
    refused("nothing to read", "holds LIDC-IDRI-slices", "Kaggle's",
            call=lambda: data.load("lidc", "train", tmp_path))


def test_other_processes_do_not_say_what_a_folder_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    data.load("lidc", "train", put(tmp_path, KAGGLE))
    assert not capsys.readouterr().out


def test_slow_reading_is_on_threads_and_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources.base, "SLOW", -1)
    threads, real = set(), sources.templates.read_array
    monkeypatch.setattr(sources.templates, "read_array", lambda *given, **how: threads.add(
        threading.current_thread()) or real(*given, **how))
    data.load("lidc", "train", put(tmp_path, KAGGLE))
    assert f"{tmp_path}: 40 cases read" in capsys.readouterr().out
    assert threads and threading.main_thread() not in threads


def test_templates_on_the_command_line(tmp_path, capsys):
    """Values that begin with a brace are no Python literals, and stay text."""
    root = put(tmp_path / "own", {name.replace("images", "scan"): array
                                  for name, array in KAGGLE.items()})
    arguments = ["--data", "folder", "--path", str(root), "--data-args",
                 "image={group}/{nodule}/scan/{name}.png",
                 "label={group}/{nodule}/mask-{annotator}/{name}.png", "masks=binary"]
    assert data.main(["show", "--out", str(tmp_path / "a.png"), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["cases"] == ["24", "8", "8"] and rows["annotators"] == ["4"] * 3


def test_fields(tmp_path):
    """A field twice, a split by other names, any field in the name, annotators in natural order."""
    files = {}
    for part, patient in (("Training", "p1"), ("Training", "p2"), ("validation", "p3"),
                          ("TEST", "p4"), ("notes", "p5")):
        files[f"{part}/{patient}/{patient}_T1.png"] = grey(1)
        for a in (2, 10):
            files[f"{part}/{patient}/seg-{a}_T1.png"] = mask(a) + 1
    put(tmp_path, files)
    templates = dict(image="{split}/{group}/{group}_{kind}.png",
                     label="{split}/{group}/seg-{annotator}_{kind}.png")
    train, val, test = data.load("folder", ("train", "val", "test"), tmp_path, **templates)
    assert train.names == ["Training/p1/T1", "Training/p2/T1"] and train.groups == ["p1", "p2"]
    assert val.names == ["validation/p3/T1"] and test.groups == ["p4"] and train.num_classes == 3
    np.testing.assert_array_equal(val.labels[0], [mask(2) + 1, mask(10) + 1])
    (tmp_path / "TEST/p4/p4_T1.png").unlink()
    for a in (2, 10):
        (tmp_path / f"TEST/p4/seg-{a}_T1.png").unlink()
    refused("'test'", "test/{group}/{group}_{kind}.png",
            call=lambda: data.load("folder", "test", tmp_path, **templates))


def test_a_binary_file_a_class(tmp_path):
    """As of QUBIQ's nested regions: where classes overlap, the last counts."""
    regions = [mask((1, c)) for c in range(3)]
    put(tmp_path, {"c1/image.nii.gz": grey(0)[None]} | {
        f"c1/task{c + 1:02}_seg{a:02}.nii.gz": regions[c][None] * (a + c < 4)
        for c in range(3) for a in (1, 2)})
    whole = data.load("folder", "all", tmp_path)
    for a in (1, 2):
        want = np.zeros((6, 5), int)
        for c in range(3):
            if a + c < 4:
                want[regions[c] > 0] = c + 1
        np.testing.assert_array_equal(whole.labels[0, a - 1], want)
    assert whole.num_classes == 4 and whole.groups == ["c1"]


@pytest.mark.parametrize("empty, want", [("stored", [0, 255]), ("nothing", [0, 0]),
                                         ("missing", [255, 255])])
def test_what_an_empty_mask_and_no_file_mean(tmp_path, empty, want):
    put(tmp_path, {"images/x.png": grey(0), "images/y.png": grey(1), "labels/a/x.png": mask(0),
                   "labels/b/x.png": 0 * mask(0), "labels/b/y.png": mask(1),
                   "labels/c/y.png": mask(2)})
    whole = data.load("folder", "all", tmp_path, empty=empty)
    assert [int(whole.labels[0, a].max()) for a in range(3)] == [1, *want]
    assert whole.weights is None or whole.weights[0].tolist() == [
        (value < 255) / sum(v < 255 for v in (0, *want)) for value in (0, *want)]
    (tmp_path / "labels/a/x.png").unlink()
    (tmp_path / "labels/b/x.png").unlink()
    refused("images/x.png", "no mask", call=lambda: data.load("folder", "all", tmp_path, empty=empty))


@pytest.mark.parametrize("kind", [bool, np.int16, np.float64])
def test_binary_masks_of_every_kind_of_number(tmp_path, kind):
    put(tmp_path, {"images/x.npy": grey(0), "labels/x.npy": (mask(0) * 3).astype(kind)})
    whole = data.load("folder", "all", tmp_path, masks="binary")
    np.testing.assert_array_equal(whole.labels[0, 0], mask(0))


@pytest.mark.parametrize("background", [np.nan, np.inf, "0", 0j])
def test_binary_masks_whose_background_is_no_number_are_refused(tmp_path, background):
    """All of these differ from 0, or cannot be compared with it."""
    wrong = np.where(mask(0) > 0, np.ones_like(background), background)
    put(tmp_path, {"images/x.npy": grey(0), "labels/x.npy": wrong})
    refused("labels/x.npy", str(wrong.dtype), "0 for background",
            call=lambda: data.load("folder", "all", tmp_path, masks="binary"))


def test_a_layout_by_name(tmp_path):
    put(tmp_path, KAGGLE)
    named = data.load("folder", "all", tmp_path, layout="kaggle-lidc")
    assert torch.equal(named.labels, data.load("lidc", "all", tmp_path).labels)
    refused("images/{name} matches nothing", tmp_path / "images",
            call=lambda: data.load("folder", "all", tmp_path, layout="folders"))
    refused("unknown layout 'x'", "curvas", call=lambda: data.load("folder", path=tmp_path,
                                                                   layout="x"))


def test_arrays(tmp_path):
    """An .npy with or without channels, in 2D and 3D, floats as they are."""
    for name, shape in (("flat", (6, 5)), ("channels", (3, 6, 5)), ("volume", (2, 3, 4, 5))):
        image = np.random.default_rng(0).random(shape)
        size = shape if name == "flat" else shape[1:]
        put(tmp_path / name, {"images/x.npy": image, "labels/a/x.npy": mask(1, size, 3)})
        whole = data.load("folder", "all", tmp_path / name)
        want = image[None] if name == "flat" else image
        np.testing.assert_array_equal(whole.images[0], want.astype(np.float32))
        np.testing.assert_array_equal(whole.labels[0, 0], mask(1, size, 3))


def test_a_picture_is_six_functions_away(tmp_path, monkeypatch):
    """From `load` to the one that opens the file."""
    stacks, real = [], Image.open

    def note(*arguments):
        functions, frame = [], sys._getframe(1)
        while frame:
            if Path(frame.f_code.co_filename).parent.name == "sources":
                functions.append(frame.f_code.co_name)
            frame = frame.f_back
        stacks.append(["load", "collect", *functions[:0:-1]])  # but for the context manager
        return real(*arguments)

    monkeypatch.setattr(Image, "open", note)
    data.load("lidc", "all", put(tmp_path, KAGGLE))
    assert {len(stack) for stack in stacks} == {6} and len(stacks) == 200
    assert {stack[-1] for stack in stacks} == {"read_picture", "read_label"}


# ------------------------------------------------------------------------------------------ tables


def write_csv(root, *lines):
    (root / "cases.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")


def test_a_table(tmp_path):
    """Columns that are not ours, a missing annotator, a split; names from the files."""
    put(tmp_path, {f"scans/{i}.png": grey(i) for i in range(4)} | {
        f"{a}/{i}.png": mask((a == "ben", i)) for a in ("anna", "ben") for i in range(4)})
    write_csv(tmp_path, "age,image,label_10,label_9,group,split",
              *(f'7,scans/{i}.png,anna/{i}.png,{"" if i == 1 else f"ben/{i}.png"},"p, {i // 2}",'
                f"{'validation' if i > 1 else 'train'}" for i in range(4)))
    train, val = data.load("folder", ("train", "val"), tmp_path, csv="cases.csv")
    assert train.names == ["scans/0", "scans/1"] and train.groups == ["p, 0"] * 2
    assert val.groups == ["p, 1"] * 2 and train.weights.tolist() == [[0.5, 0.5], [0, 1]]
    np.testing.assert_array_equal(train.labels[0], [mask((1, 0)), mask((0, 0))])
    refused("cases.csv", "'test'", call=lambda: data.load("folder", "test", tmp_path,
                                                          csv="cases.csv"))
    write_csv(tmp_path, "image,label", *(f"scans/{i}.png,anna/{i}.png" for i in range(4)))
    whole = data.load("folder", "all", tmp_path, csv="cases.csv")
    assert whole.labels.shape[1] == 1 and whole.groups == whole.names


@pytest.mark.parametrize("lines, fragments", [
    (["name,label", "x,y"], ["columns name, label", "image"]),
    (["image,mask", "x,y"], ["columns image, mask", "label_<annotator>"]),
    (["image,label,split", "scans/0.png,anna/0.png,Fold 1"], ["row 1", "'Fold 1'"]),
    (["image,label", ",anna/0.png"], ["row 1"]),
    (["image,label"], ["cases.csv: lists no images"]),
    (["image,label_a,label_a", "scans/0.png,anna/0.png,anna/0.png"], ["2 columns label_a"]),
    (["image,label,split,split", "scans/0.png,anna/0.png,val,train"], ["2 columns split"]),
    (["image,label,label_a", "scans/0.png,anna/0.png,anna/0.png"],
     ["columns label, label_a", "label alone, or label_<annotator>"]),
    (["image,label_a", "scans/0.png,benign"], ["row 1", "label_a is 'benign'", ".nii.gz"]),
    (["image,label", "scans/0.png,anna/9.png"], ["anna/9.png", "no such file"]),
    (["image,label", "/dev/zero,anna/0.png"], ["/dev/zero", "regular"]),
    (["image,label", "scans/\0.png,anna/0.png"], ["scans/", "no such file"]),
    (["image,label", '"' + "x" * 200_000 + '",y'], ["cases.csv", "field larger than"]),
    (["image,label"] + ["scans/0.png,anna/0.png"] * 2, ["two cases are named 'scans/0'"])])
def test_bad_tables_are_refused_in_one_line(tmp_path, lines, fragments):
    put(tmp_path, {"scans/0.png": grey(0), "anna/0.png": mask(0)})
    write_csv(tmp_path, *lines)
    refused(tmp_path if "dev" not in fragments[0] else "dev", *fragments,
            call=lambda: data.load("folder", "all", tmp_path, csv="cases.csv"))


def test_columns_that_are_not_read_may_come_twice(tmp_path):
    """As the empty ones that spreadsheets add to the right."""
    put(tmp_path, {"scans/0.png": grey(0), "anna/0.PNG": mask(0)})
    write_csv(tmp_path, "image,label,,,age,age", "scans/0.png,anna/0.PNG,,,1,2")
    assert data.load("folder", "all", tmp_path, csv="cases.csv").names == ["scans/0"]


def test_no_table(tmp_path):
    put(tmp_path, {"a.png": grey(0)})
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("none.csv", "pipe.csv", "\0"):
        refused("not a readable table", call=lambda: data.load("folder", "all", tmp_path, csv=name))


# ----------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("ending", ["nii.gz", "npy"])
def test_volumes_slice_by_slice(tmp_path, ending, monkeypatch):
    """The same voxels as in 3D; a volume is read once, and one of a single slice stays one."""
    depths = [4, 1, 3]
    for i, depth in enumerate(depths):
        put(tmp_path, {f"images/v{i}.{ending}": grey(i, (depth, 6, 5)),
                       f"labels/a/v{i}.{ending}": mask(i, (depth, 6, 5), 3)})
    reads = []
    real = sources.templates.read_array
    monkeypatch.setattr(sources.templates, "read_array",
                        lambda file, *rest, **how: reads.append(file) or real(file, *rest, **how))
    slices = data.load("folder", "all", tmp_path, slices="axial")
    assert len(reads) == len(set(reads)) == 6
    assert slices.names == [f"v{i}/z{z:04}" for i in range(3) for z in range(depths[i])]
    assert slices.groups == ["v0"] * 4 + ["v1"] + ["v2"] * 3
    for row, (i, z) in enumerate((i, z) for i in range(3) for z in range(depths[i])):
        volume = grey(i, (depths[i], 6, 5)).astype(np.float64)
        want = ((volume - volume.mean()) / volume.std() if ending == "nii.gz" else volume / 255)[z]
        np.testing.assert_allclose(slices.images[row, 0], want, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(slices.labels[row, 0], mask(i, (depths[i], 6, 5), 3)[z])


def test_only_volumes_are_sliced(tmp_path):
    put(tmp_path, {"images/x.png": grey(0), "labels/a/x.png": mask(0)})
    refused("images/x.png", "not a volume", call=lambda: data.load("folder", "all", tmp_path,
                                                                   slices="axial"))
    put(tmp_path / "b", {"images/x.npy": grey(0), "labels/a/x.npy": mask(0)})
    refused("images/x.npy", "not a volume", call=lambda: data.load("folder", "all", tmp_path / "b",
                                                                   slices="axial"))


# ---------------------------------------------------------------------------------- what is refused


TREE = {"p1/scan/s1.png": grey(0), "p1/by-anna/s1.png": mask(0), "p1/by-ben/s1.png": mask(1),
        "p2/scan/s1.png": grey(1), "p2/by-anna/s1.png": mask(2), "p2/by-ben/s1.png": mask(3)}
OWN = dict(image="{group}/scan/{name}.png", label="{group}/by-{annotator}/{name}.png")
BAD_TREES = {
    "no image": (dict(image="{group}/scans/{name}.png"), {},
                 ["{group}/scans/{name}.png matches nothing", "tried {root}/p1/scans",
                  "{root}/p1 holds by-anna, by-ben, scan"]),
    "other ending": (dict(image="{group}/scan/{name}.tif"), {},
                     ["tried {root}/p1/scan/{name}.tif", "{root}/p1/scan holds s1.png"]),
    "no label": (dict(label="{group}/of-{annotator}/{name}.png"), {},
                 ["tried {root}/p1/of-{annotator}", "{root}/p1 holds by-anna"]),
    "a label alone": ({}, {"p2/by-ben/s7.png": mask(0)},
                      ["p2/by-ben/s7.png", "{root}/p2/scan/s7.png", "{root}/p2/scan holds s1.png"]),
    "sizes": ({}, {"p2/by-ben/s1.png": mask(0, (5, 6))},
              ["{root}/p2/by-ben/s1.png is 5 x 6 and {root}/p2/scan/s1.png 6 x 5"]),
    "two files": (dict(image="{group}/scan/{name}", label="{group}/by-{annotator}/{name}"),
                  {"p2/by-ben/s1.tif": mask(0)},
                  ["{root}/p2/by-ben/s1.tif", "s1.png", "same name"]),
    "half a pair": (dict(label=""), {}, ["image= and label="]),
    "two ways": (dict(layout="qubiq"), {}, ["or one layout="]),
    "three ways": (dict(csv="cases.csv"), {}, ["csv= alone"]),
    "two fields in one": (dict(image="{group}/scan/{name}{kind}.png"), {}, ["text between them"]),
    "no such fields": (dict(label="{annotator}/{name}.png"), {}, ["the same fields"]),
    "a field too many": (dict(label="{group}/by-{annotator}/{x}/{name}.png"), {}, ["same fields"]),
    "annotator of an image": (dict(image="{group}/by-{annotator}/{name}.png"), {}, ["same fields"]),
    "no field": (dict(image="p1/scan/s1.png"), {}, ["fields in braces"]),
    "an open brace": (dict(image="{group}/scan/{name.png"), {}, ["fields in braces"]),
    "outside": (dict(image="../{group}/scan/{name}.png"), {}, ["below the folder"]),
    "absolute": (dict(image="/{group}/scan/{name}.png"), {}, ["below the folder"]),
    "no ending": (dict(image="{group}/scan/{name}.bmp"), {}, [".nii.gz"]),
    "a null": (dict(image="{group}/\0/{name}.png"), {}, ["below the folder"]),
    "no layout": (dict(image="", label=""), {},
                  ["no images/NAME.png or other layout (folders", "holds p1, p2", "image="])}


@pytest.mark.parametrize("fault", BAD_TREES)
def test_bad_trees_are_refused_in_one_line(tmp_path, fault):
    templates, files, fragments = BAD_TREES[fault]
    put(tmp_path, TREE | files)
    refused(*(fragment.replace("{root}", str(tmp_path)) for fragment in fragments),
            call=lambda: data.load("folder", "all", tmp_path, **OWN | templates))


def test_the_good_tree_is_read(tmp_path):
    whole = data.load("folder", "all", put(tmp_path, TREE), **OWN)
    assert whole.names == ["p1/s1", "p2/s1"] and whole.groups == ["p1", "p2"]


@pytest.mark.parametrize("content", [
    b"", b"\x93NUMPY", pickle.dumps([1]), b"PK\x03\x04" + bytes(99),
    b"\x93NUMPY\x01\x00\x4e\x00{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 9999999), }"
    % 2**50, b"\x93NUMPY\x01\x00\x36\x00{'descr': '|O', 'fortran_order': False, 'shape': (3,), }"])
def test_damaged_arrays(tmp_path, content):
    put(tmp_path, {"images/x.npy": grey(0), "labels/a/x.npy": mask(0)})
    (tmp_path / "labels/a/x.npy").write_bytes(content)
    refused("labels/a/x.npy", "not a readable .npy", call=lambda: data.load("folder", "all",
                                                                            tmp_path))
    (tmp_path / "images/x.npy").write_bytes(content)
    refused("images/x.npy", "not a readable .npy",
            call=lambda: data.load("folder", "all", tmp_path, slices="axial"))


# ----------------------------------------------------------------------------------------- export


def same(a, b):
    """Two Splits, but for their names."""
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert a.groups == b.groups and a.num_classes == b.num_classes
    assert (a.weights is None) == (b.weights is None)
    assert a.weights is None or torch.allclose(a.weights, b.weights)


LOADED_AS = {"npz": "npz", "pickle": "lidc", "png": "folder"}


@pytest.mark.parametrize("layout", LOADED_AS)
@pytest.mark.parametrize("kind", ["grey", "missing", "floats"])
def test_what_is_exported_reads_as_the_same_split(tmp_path, layout, kind, capsys):
    table = records(12) if kind == "floats" else grey_records(12)
    if kind == "missing":  # annotator 1 of one case; a part of a mask of another
        table["case-3"]["masks"][1] = np.full((9, 9), 255, np.uint8)
        table["case-4"]["masks"][0][:3] = 255
    table = {f"p/é {i:02}": record for i, record in enumerate(table.values())}
    path, out = write(tmp_path / "a.pickle", table), tmp_path / f"o.{layout}".removesuffix(".png")
    assert data.main(["export", "--data", "lidc", "--path", str(path), "--out", str(out)]) == 0
    told = capsys.readouterr().out.split()
    name, at = told[told.index("--data") + 1], told.index("--data-args") + 1
    options = key_values("", told[at:])
    assert name == LOADED_AS[layout]
    for a, b in zip(data.load("lidc", ("train", "val", "test"), path),
                    data.load(name, ("train", "val", "test"), out, **options)):
        same(a, b)
        assert a.names == b.names or b.names == [n.replace("/", "_").replace(" ", "_")
                                                 for n in a.names]
    if layout == "png":  # what 8 bits hold is a picture
        ending = ".npy" if kind == "floats" else ".png"
        assert {file.suffix for file in (out / "images").iterdir()} == {ending}
        assert len(list(out.glob("labels/*/*.png"))) == 48 - (kind == "missing")
    with np.load(out) if layout == "npz" else open(path, "rb") as file:
        assert layout != "npz" or (file["images"].dtype == np.uint8) == (kind != "floats")


def test_export_of_colours_volumes_and_probabilities(tmp_path):
    colours = (np.random.default_rng(0).random((6, 3, 5, 4)) * 255).astype(np.uint8)
    weights = np.tile([1.0, 3.0], (6, 1))
    for given in (arrays() | {"images": colours, "weights": weights},
                  arrays(shape=(3, 5, 4)), arrays(n=6, shape=(3, 3, 3))):
        np.savez(tmp_path / "own.npz", **given)
        whole = data.load("npz", "all", tmp_path / "own.npz")
        for layout in ("npz", "png"):
            out = tmp_path / f"{given['images'].ndim}{len(given)}{given['images'].shape[2]}"
            told = export(whole, out, layout)
            out = out if layout == "png" else out.with_suffix(".npz")
            lost = layout == "png" and "weights" in given
            assert ("probabilities of its label maps" in told) == lost
            back = data.load(LOADED_AS[layout], "all", out)
            if layout == "png":
                back.weights = whole.weights  # have no place there
            same(whole, back)
            assert whole.names == back.names
        refused("one channel", call=lambda: export(whole, tmp_path / "a.pickle"))
    refused("lines", call=lambda: export(data.load("toy1d", "all"), tmp_path / "a.npz"))


def test_names_that_are_no_file_names_stay_apart(tmp_path):
    names = [".hidden", "a/b", "a_b", "a b", "x" * 300, "x" * 299]
    np.savez(tmp_path / "own.npz", **arrays(), names=names, groups=list("ppqqrs"))
    whole = data.load("npz", "all", tmp_path / "own.npz")
    export(whole, tmp_path / "out")
    listed = json.loads((tmp_path / "out/split.json").read_text())
    back = data.load("folder", "all", tmp_path / "out")
    assert sorted(sum(listed.values(), [])) == sorted(back.names) and len(set(back.names)) == 6
    rows = {group: [i for i, g in enumerate(back.groups) if g == group] for group in "pqrs"}
    assert [len(rows[group]) for group in "pqrs"] == [2, 2, 1, 1]
    assert torch.equal(back.labels[rows["s"]], whole.labels[5:])


def test_exported_slices_keep_their_numbers(tmp_path):
    """So that volumes are still recognised, also where a name is cut to 60 characters."""
    names = [f"{'v' * 99}/z{z:04d}" for z in range(6)]
    np.savez(tmp_path / "own.npz", **arrays(), names=names)
    export(data.load("npz", "all", tmp_path / "own.npz"), tmp_path / "out")
    back = data.load("folder", "all", tmp_path / "out")
    assert [SLICE.fullmatch(name)[1] for name in back.names] == [back.names[0][:-6]] * 6
    assert [name[-6:] for name in back.names] == [f"_z{z:04d}" for z in range(6)]
    assert len(back.names[0]) == 60


def test_export_overwrites_nothing_and_leaves_no_half(tmp_path, capsys, monkeypatch):
    path = str(write(tmp_path / "a.pickle", records(12)))
    for name in ("there.npz", "there", "new.pickle", "other.npz"):
        if name in ("new.pickle", "other.npz"):
            (tmp_path / name).with_suffix(".split.json").write_text("mine")
        elif name == "there":
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_text("mine")
        before = sorted(tmp_path.rglob("*"))
        assert data.main(["export", "--data", "lidc", "--path", path,
                          "--out", str(tmp_path / name)]) == 2
        message = capsys.readouterr().err
        assert "is there: delete it" in message and message.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
    assert data.main(["export", "--data", "lidc", "--path", path,
                      "--out", str(tmp_path / "a.bmp")]) == 2
    assert "npz, png, pickle" in capsys.readouterr().err
    before = sorted(tmp_path.rglob("*"))
    for module, function in ((np, "save"), (np, "savez_compressed"), (pickle, "dumps")):
        def fail(*_, **__):
            raise OSError(28, "No space left on device")
        with monkeypatch.context() as patch:
            patch.setattr(module, function, fail)
            out = {"save": "x", "savez_compressed": "x.npz", "dumps": "x.pickle"}[function]
            assert data.main(["export", "--data", "lidc", "--path", path,
                              "--out", str(tmp_path / out)]) == 2
        assert "No space left" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
