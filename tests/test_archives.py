"""What the files of public data sets hold besides the expected: scaled labels, channels along z,
pages, leftovers of other systems; and what would silently go wrong with a user's own."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data_files import arrays, load_npz, refused, save_picture
from helpers import generator
from sources import base
from sources.files import read_array, standardised
from sources.warp import Augmentation, apply_warp, draw_warp


def nifti(path, array, slope=None):
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, np.diag([-1.0, -1, 1, 1]))
    if slope:
        image.header.set_slope_inter(slope)
    nibabel.save(image, path)
    return path


def test_labels_with_a_header_s_scale_are_whole_numbers(tmp_path):
    """As in some annotations of CURVAS: stored as 0, 1, 2 times a slope that is not quite 1."""
    label = np.random.default_rng(0).integers(0, 3, (6, 5, 4)).astype(np.float32)
    path = nifti(tmp_path / "label.nii.gz", label * np.float32(1.0000001))
    got, _ = read_array(path, label=True)
    assert got.dtype == np.uint8 and (got == label.T).all()
    fractions, _ = read_array(nifti(tmp_path / "half.nii.gz", label / 2), label=True)
    assert fractions.max() == 1 and 0.5 in fractions  # left as they are, and refused later


def test_channels_along_z(tmp_path):
    """QUBIQ's brain tumours: an image of 9 x 8 x 4 voxels is a slice of four channels."""
    rng = np.random.default_rng(0)
    for case in range(6):
        image = rng.random((9, 8, 4)).astype(np.float32)
        nifti(tmp_path / f"case{case:02d}/image.nii.gz", image)
        for annotator in (1, 2):
            label = (rng.random((9, 8)) > 0.5).astype(np.uint8)
            nifti(tmp_path / f"case{case:02d}/task01_seg{annotator:02d}.nii.gz", label)
    whole = data.load("folder", "all", tmp_path)
    assert whole.images.shape == (6, 4, 8, 9) and whole.labels.shape == (6, 2, 8, 9)
    np.testing.assert_allclose(whole.images[5], standardised(image.T, np.ones((8, 9), bool)),
                               atol=1e-6)
    np.testing.assert_allclose(whole.images.mean((2, 3)), 0, atol=1e-6)


def test_standardised_is_mean_0_and_deviation_1_inside():
    volume = np.random.default_rng(0).normal(900, 30, (2, 5, 6, 7)).astype(np.float32)
    volume[1] = 4  # constant
    inside = np.random.default_rng(1).random((5, 6, 7)) > 0.4
    got = standardised(volume, inside)
    values = volume[0][inside].astype(float)
    np.testing.assert_allclose(got[0][inside], (values - values.mean()) / values.std(), atol=1e-6)
    assert not got[1].any() and not got[:, ~inside].any() and volume[1].min() == 4


def test_thin_volumes_keep_their_labels():
    """Of 6 slices, turns by 10 degrees and shifts by 4 voxels would lose most; cubes are as before.
    """
    mild = Augmentation(rotation=10, shear=0.05, scale=0.1, translation=4, elastic=2)
    for shape, most in (((6, 64, 64), 0.15), ((32, 32, 32), 0.45)):
        warp = draw_warp(mild, 4, shape, shape, generator())
        _, labels = apply_warp(torch.rand(4, 1, *shape), torch.ones(4, *shape, dtype=torch.uint8),
                               warp, shape, True)
        assert 0.01 < (labels == 255).float().mean() < most


def test_pages_are_not_dropped(tmp_path):
    for kind in ("images", "labels"):
        for name in "abc":
            pages = [Image.fromarray(np.full((8, 8), n, np.uint8)) for n in range(3)]
            (tmp_path / kind).mkdir(exist_ok=True)
            pages[0].save(tmp_path / kind / f"{name}.tif", save_all=True, append_images=pages[1:])
    refused("a.tif", "3 pages", call=lambda: data.load("folder", "all", tmp_path))


def test_mixed_black_and_white_masks_are_noticed(tmp_path, capsys):
    given = arrays()
    given["labels"] = (given["labels"] > 0).astype(np.uint8)
    load_npz(tmp_path, **given)
    assert "black and white" not in capsys.readouterr().err
    given["labels"][:2] *= 255
    load_npz(tmp_path, **given)
    said = capsys.readouterr().err
    assert "4 label maps hold nothing but 0 and 255 (ignored), such as that of '0' by" in said
    given["labels"][5, 0, 0] = 255  # where ignored pixels are used, they can be all that is marked
    load_npz(tmp_path, **given)
    assert "black and white" not in capsys.readouterr().err


def test_classes_in_files_of_their_own(tmp_path, capsys):
    """A missing file of a class is told; Windows' own files in the folder are not."""
    for i in range(4):
        save_picture(tmp_path / f"images/{i}.png", np.full((8, 8), 50 * i, np.uint8))
        for k in ("liver", "spleen")[: 2 if i else 1]:
            save_picture(tmp_path / f"labels/{k}/{i}.png", np.full((8, 8), 255, np.uint8))
    (tmp_path / "images/Thumbs.db").write_bytes(b"x")
    templates = dict(image="images/{name}", label="labels/{class}/{name}")
    whole = data.load("folder", "all", tmp_path, **templates)
    said = capsys.readouterr()
    assert "1 label maps have files of some of the classes liver, spleen only ('0'" in said.err
    assert "4 images without groups: each counts as a patient of its own" in said.out
    assert [int(label.max()) for label in whole.labels] == [1, 2, 2, 2]


def test_a_table_with_half_a_split_is_refused(tmp_path):
    rows = ["image,label,split"]
    for i in range(4):
        save_picture(tmp_path / f"{i}.png", np.full((8, 8), i % 2, np.uint8))
        rows.append(f"{i}.png,{i}.png,{'train' if i else ''}")
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    refused("1 of 4 rows have no split", call=lambda: data.load(
        "folder", "all", tmp_path, csv="cases.csv"))


def test_leftovers_of_macos_and_a_renamed_label(tmp_path, capsys):
    for i in range(10):
        for kind in ("flair", "t1", "t1ce", "t2", "seg"):
            volume = np.random.default_rng(i).integers(1, 3, (8, 8, 8)).astype(np.int16)
            nifti(tmp_path / f"B_{i}/B_{i}_{kind}.nii.gz", volume)
    (tmp_path / "B_0/._B_0_seg.nii.gz").write_bytes(b"x")
    (tmp_path / "B_3/B_3_seg.nii.gz").rename(tmp_path / "B_3/W39_1998.09.19_Segm.nii.gz")
    assert len(data.load("brats", "all", tmp_path)) == 9
    assert "left out, because they have no *_seg.nii.gz: B_3" in capsys.readouterr().err


def test_a_set_that_does_not_fit_is_refused_before_it_is_read():
    base.check_room("x", 10, (1, 64, 64), 4)
    refused("x: 1000000 cases of 4 x 512 x 512", "name fewer cases in a split_file",
            call=lambda: base.check_room("x", 10**6, (4, 512, 512), 4))


def test_sections_that_are_no_instances(tmp_path, capsys):
    membranes = np.tile(np.array([[0, 255]]), (10, 8, 4))
    for ids, message in ((membranes, "only one instance"), (membranes + 1, "no pixel is 0")):
        np.savez(tmp_path / "em.npz", images=np.zeros((10, 8, 8)), instances=ids)
        data.load("em", "all", tmp_path / "em.npz", tile=0)
        assert message in capsys.readouterr().err


def test_a_split_file_keeps_what_is_not_asked_for(tmp_path, capsys):
    """Its test split lists a patient, the others list cases; a misspelt name there is told."""
    given = arrays(12) | {"groups": np.repeat(["p1", "p2", "p3", "p4"], 3)}
    np.savez(tmp_path / "own.npz", **given)
    lists = {"train": [str(i) for i in range(6)], "val": ["6", "7", "8"], "test": ["p4", "p5"]}
    (tmp_path / "split.json").write_text(json.dumps(lists))
    train, _ = data.load("npz", ("train", "val"), tmp_path / "own.npz",
                         split_file=str(tmp_path / "split.json"))
    assert train.parts["test"] == ["9", "10", "11"]
    assert "1 names of other splits are not in the data, such as 'p5'" in capsys.readouterr().err
    refused("'p5'", call=lambda: data.load("npz", "test", tmp_path / "own.npz",
                                           split_file=str(tmp_path / "split.json")))
