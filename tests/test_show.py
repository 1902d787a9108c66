"""python data.py show: the table and the picture of a data set."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import data


def table(text):
    rows = [line.split("  ") for line in text.splitlines()[1:-1] if "  " in line]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in rows[1:]} | {"splits": rows[0]}


@pytest.fixture
def own(tmp_path):
    """Ten cases of three annotators worked by hand. The third is missing in half of them, and drew
    nothing in the others, where it left a corner of 8 of the 80 pixels open."""
    images = np.linspace(0, 1, 10, dtype=np.float32)[:, None, None].repeat(8, 1).repeat(10, 2)
    labels = np.zeros((10, 3, 8, 10), np.uint8)
    labels[:, 0, :4] = 1  # upper half
    labels[:, 1, :, :5] = 1  # left half: IoU with the upper half is 20 / 60
    labels[1::2, 2, 6:, 6:] = 255
    labels[::2, 2] = 255
    np.savez(tmp_path / "own.npz", images=images, labels=labels, groups=[str(i) for i in range(10)])
    return tmp_path / "own.npz"


def test_show_prints_what_was_worked_by_hand(own, tmp_path):
    text = data.show("npz", own, "all", tmp_path / "sheet.png")
    rows = {key: value[0] for key, value in table(text).items()}
    assert rows == {
        "splits": "all", "cases": "10", "groups": "10", "channels": "1", "size": "8 x 10",
        "intensity": "0 to 1", "annotators": "3", "missing": "16.7%", "empty masks": "16.7%",
        # two annotators: 1 - (2 + 2/3) / 4 = 1/3; with an empty third: 1 - (3 + 2/3) / 9 = 16/27
        "diversity": f"{(1 / 3 + 16 / 27) / 2:.3f}",
        # means of 40 of 80 pixels and of 152, 80 and 8 of 240
        "class 0": "56.67%", "class 1": "41.67%", "ignored": "1.67%",
        # The third marks nothing in the five cases it saw, where the others differ from it by 1.
        # With it, each of the two others has 10 pairs at 2/3 and 5 at 1.
        "annotator 0": f"50.00% / {7 / 9:.3f} / 33.3%",
        "annotator 1": f"50.00% / {7 / 9:.3f} / 33.3%",
        "annotator 2": "0.00% / 1.000 / 100.0%"}
    rows = table(data.show("npz", own, out=tmp_path / "sheet.png"))
    assert rows["splits"] == ["train", "val", "test"] and rows["cases"] == ["6", "2", "2"]


def test_the_picture_shows_the_cases_of_most_disagreement(own, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(data, "save_grid", lambda path, rows, *_: drawn.update(rows))
    data.show("npz", own, "all", tmp_path / "sheet.png")
    whole = data.load("npz", "all", own)
    # Eight of ten, those with an empty third map first; ties are in the set's order.
    assert list(drawn) == [f"{i}\ndiversity {16 / 27:.2f}" for i in (1, 3, 5, 7, 9)] + [
        f"{i}\ndiversity {1 / 3:.2f}" for i in (0, 2, 4)]
    assert [len(row) for row in drawn.values()] == [4] * 5 + [3] * 3
    for name, (image, *maps) in drawn.items():
        for picture, label in zip(maps, whole.labels[int(name.split()[0])]):
            assert torch.equal((picture != image).any(2), label > 0)


def test_a_single_annotator_agrees_with_nobody(tmp_path):
    """No row of disagreement, and no division by 0."""
    labels = np.zeros((10, 1, 8, 10), np.uint8)
    labels[:, :, :4] = 1
    np.savez(tmp_path / "own.npz", images=np.zeros((10, 8, 10), np.float32), labels=labels)
    text = data.show("npz", tmp_path / "own.npz", "all", tmp_path / "a.png")
    assert table(text)["diversity"] == ["0.000"] and "annotator 0" not in text


@pytest.mark.parametrize("name, options", [
    ("toy1d", {}), ("cells", {"n": 10}), ("modes", {"n": 10}),
    ("lesions3d", {"n": 8, "size": 32})])
def test_show_takes_every_kind_of_set(name, options, tmp_path, capsys):
    arguments = [f"{key}={value}" for key, value in options.items()]
    assert data.main(["show", "--data", name, "--split", "val", "--out", str(tmp_path / "a.png"),
                      *(["--data-args", *arguments] if arguments else [])]) == 0
    rows = table(capsys.readouterr().out)
    whole = data.load(name, "val", **options)
    assert rows["size"][1] == " x ".join(map(str, whole.images.shape[2:]))
    shares = [(whole.probabilities * (whole.labels == k).flatten(2).float().mean(2)).sum(1).mean()
              for k in range(whole.num_classes)]
    assert [float(rows[f"class {k}"][1][:-1]) for k in range(whole.num_classes)] == pytest.approx(
        [100 * float(share) for share in shares], abs=0.006)
    assert Image.open(tmp_path / "a.png").size[0] > 100


def test_show_makes_do_with_the_splits_that_are_there(tmp_path):
    """A tree of PNGs with only one of its parts."""
    for place in ("images/p/a", "gt/p/a_l0"):
        (tmp_path / "tree/train" / place).parent.mkdir(parents=True)
        Image.new("L", (16, 16), 255).save(tmp_path / "tree/train" / f"{place}.png")
    rows = table(data.show("lidc", tmp_path / "tree", out=tmp_path / "a.png"))
    assert rows["splits"] == ["train"]


def test_the_data_sets_are_listed(capsys):
    assert data.main([]) == 0
    text = capsys.readouterr().out
    for name, source in data.DATASETS.items():
        assert any(line.split()[:1] == [name] and source.doc in line for line in text.splitlines())
    assert "build-lidc" in text and "show" in text


@pytest.mark.parametrize("arguments, fragment", [
    (["--data", "none"], "unknown data set"),
    (["--data", "shapes", "--data-args", "n"], "key=value"),
    (["--data", "shapes", "--data-args", "path=x"], "is synthetic, not read from x"),
    (["--data", "shapes", "--data-args", "n=x"], "whole number"),
    (["--data", "npz", "--path", "nowhere"], "there is no nowhere")])
def test_mistakes_of_show_are_one_line(arguments, fragment, capsys):
    assert data.main(["show", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and fragment in message


def test_show_replaces_no_device(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path):
        assert data.main(["show", "--data", "toy1d", "--out", str(place)]) == 2
        assert "not a regular file" in capsys.readouterr().err
    assert pipe.is_fifo()
