"""What a newcomer meets with a folder of PNGs of their own, by annotators called anna and bob."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import train
from analysis import pictures
from analysis.compare import compare
from common import UserError
from data_files import refused, save_picture
from helpers import undraw
from metrics import Moments
from sources import runs

BINARY = ["--data-args", "masks=binary"]


def write(root, foreground, count=10, name="scan"):
    """Scans of 16 x 16; anna draws the upper half, bob the left one, but not of scan 0."""
    rng = np.random.default_rng(0)
    for i in range(count):
        image = rng.integers(0, 256, (16, 16)).astype(np.uint8)
        save_picture(root / f"images/{name}{i}.png", image)
        maps = np.zeros((2, 16, 16), np.uint8)
        maps[0, :8] = maps[1, :, :8] = foreground
        for who, label in zip(("anna", "bob")[: 2 if i else 1], maps):
            save_picture(root / f"labels/{who}/{name}{i}.png", label)
    return root


@pytest.fixture
def own(tmp_path):
    return write(tmp_path / "own", 1)


@pytest.fixture
def black_and_white(tmp_path):
    return write(tmp_path / "white", 255)


def one_line(capsys, main, *arguments):
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# ----------------------------------------------------------------------------------------- names


def test_annotators_keep_their_names(own, tmp_path, capsys):
    """In the table of show, and through every layout of export that has a place for them."""
    whole = data.load("folder", "all", own)
    assert whole.annotators == ["anna", "bob"] == data.load("folder", "val", own).annotators
    text = data.show("folder", own, out=tmp_path / "a.png")
    assert "annotator anna" in text and "annotator bob" in text and "numbered" not in text
    for out, name in (("copy", "folder"), ("copy.npz", "npz")):
        assert data.main(["export", "--data", "folder", "--path", str(own),
                          "--out", str(tmp_path / out)]) == 0
        again = data.load(name, "all", tmp_path / out)
        assert again.annotators == ["anna", "bob"] and torch.equal(again.labels, whole.labels)
    assert (tmp_path / "copy/labels/anna/scan0.png").exists()
    assert not (tmp_path / "copy/labels/bob/scan0.png").exists()


def test_a_table_and_templates_name_annotators(own):
    (own / "cases.csv").write_text("image,label_bob,label_anna\n" + "".join(
        f"images/scan{i}.png,labels/bob/scan{i}.png,labels/anna/scan{i}.png\n"
        for i in range(1, 10)))
    assert data.load("folder", "all", own, csv="cases.csv").annotators == ["anna", "bob"]
    files = dict(image="images/{name}.png", label="labels/anna/{name}.png")
    assert data.load("folder", "all", own, **files).annotators == ["0"]  # without {annotator}


def test_annotators_without_names_are_numbered_from_0(own, tmp_path):
    out = tmp_path / "copy.pickle"
    data.export(data.load("folder", "all", own), out)
    assert data.load("lidc", "all", out).annotators == ["0", "1"]
    text = data.show("lidc", out, out=tmp_path / "a.png")
    assert "annotator 0" in text and "annotator (numbered from 0): pixels" in text


def test_other_label_maps_have_no_names(own):
    whole = data.load("folder", "all", own)
    hidden = data.load("folder", "all", own, hide=50)
    assert whole.to("cpu").subset([1]).annotators == whole.annotators
    assert len(hidden.annotators) == hidden.labels.shape[1] == 1
    assert data.load("shapes", "val", n=10).annotators == [str(i) for i in range(12)]
    assert len(data.load("modes", "val", n=10).annotators) == 32


def test_a_split_is_a_short_line(own):
    assert repr(data.load("folder", "all", own)) == (
        "Split(10 cases of 1 x 16 x 16, 2 classes, annotators anna, bob)")
    assert repr(data.load("toy1d", "all")) == "Split(1 cases of 1 x 21, 2 classes, 2 label maps)"


def test_pictures_name_annotators_and_leave_room_for_a_missing_one(own, monkeypatch):
    """Scan 0, whose maps are swapped, has none of anna's, and bob's stands in his own column."""
    whole = data.load("folder", "all", own).subset([0, 1])
    whole.labels[0], whole.weights[0] = whole.labels[0].flip(0), whole.weights[0].flip(0)
    probs = torch.rand(2, 2, 2, 16, 16).softmax(2)
    cases = pictures.cases_to_show(whole, {"scan0": "scan0", "scan1": "scan1"}, probs[0].argmax(1),
                                   probs.argmax(2), Moments(probs))
    assert [list(case.drawn_by.values()) for case in cases] == [
        ["annotator\nbob"], ["annotator\nanna", "annotator\nbob"]]
    drawn = {}
    monkeypatch.setattr(pictures, "save_grid",
                        lambda path, rows, columns, *_, **__: drawn.update(rows, columns=columns))
    pictures.plot_overview("", cases)
    assert drawn["columns"][:3] == ["image", "annotator\nanna", "annotator\nbob"]
    assert drawn["scan0"][1] is None and drawn["scan0"][2] is not None
    assert all(picture is not None for picture in drawn["scan1"])


def test_annotators_are_chosen_by_name(own, capsys):
    split = data.load("folder", "all", own)
    assert train.annotators("all", split) is None
    assert train.annotators("bob, anna", split) == [1, 0]
    split.annotators = ["1", "2", "3"]  # of folders with these names
    assert train.annotators("1,3", split) == [0, 2]
    refused("'0'", "choose from 1, 2, 3", call=lambda: train.annotators("0,1", split))
    assert train.annotators("0,2", data.load("shapes", n=10)) == [0, 2]  # where they have no names
    refused("'ana'", "did you mean anna? choose from anna, bob",
            call=lambda: train.annotators("ana", data.load("folder", "all", own)))
    whole = data.load("folder", "all", own)
    by_bob = data.labelled_by(whole, [1])  # who lacks scan0
    assert by_bob.names == [name for name in whole.names if name != "scan0"]
    whole.weights = None
    assert data.labelled_by(whole, [1]).names == by_bob.names
    assert "1 of 10 training cases are left out, because they were not labelled by bob" in capsys.readouterr().err
    assert len(data.labelled_by(whole, [0, 1])) == len(whole)


@pytest.mark.parametrize("lines, fragments", [
    ("scan0,p0\nscan0,p1", ["more than once", "'scan0'"]),
    ("image,patient\n{}", ["no image of 'image'", "heading name,group"]),
    ("scan0;p0", ["'scan0;p0'", "name,group"]), ("scan0,p0", ["does not list 'scan1'"]),
    ("scan0,", ["'scan0,'", "its own name"]), (",p0", ["',p0'", "its own name"])])
def test_mistakes_in_the_table_of_groups(own, lines, fragments):
    rest = "\n".join(f"scan{i}, p{i // 2} " for i in range(10))
    (own / "groups.csv").write_text(f"name,group\n{rest}")
    assert data.load("folder", "all", own).groups == [f"p{i // 2}" for i in range(10)]
    (own / "groups.csv").write_text(lines.format(rest) if "{}" in lines or "," not in lines
                                    or "does" in fragments[0] else f"{lines}\n{rest}")
    refused(*fragments, call=lambda: data.load("folder", "all", own))


# -------------------------------------------------------------------------------------- mistakes


def test_mistakes_in_the_command_are_told_before_an_old_run(own, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "last.pt").touch()
    command = ["--data", "folder", "--path", own, "--quick", "--device", "cpu", "--out", run]
    for more, fragment in ((["--path", own / "nowhere"], "there is no"),
                           (["--path", own / "images"], "no images/NAME.png"),
                           (["--data-args", "mask=binary"], "did you mean masks?"),
                           (["--model-args", "ranks=1"], "did you mean rank?"),
                           (["--model", "sssn"], "did you mean ssn?"),
                           (["--data", "foldr"], "did you mean folder?"),
                           (["--annotators", "all,anna"], "choose from anna, bob"),
                           ([], "holds a run already")):
        assert fragment in one_line(capsys, train.main, *command, *more)


def test_black_and_white_masks_are_told_how_to_be_read(black_and_white, capsys):
    where = ["--data", "folder", "--path", black_and_white]
    assert "add --data-args masks=binary" in one_line(capsys, data.main, "show", *where)
    where += ["--quick", "--out", black_and_white / "run"]
    assert "add --data-args masks=binary" in one_line(capsys, train.main, *where)
    assert data.load("folder", "all", black_and_white, masks="binary").num_classes == 2


def test_black_and_white_masks_that_do_not_look_like_it(black_and_white, own, capsys):
    """Of one annotator alone; with grey borders; saved as colours."""
    shutil.rmtree(own / "labels/bob")
    shutil.copytree(black_and_white / "labels/bob", own / "labels/bob")
    data.load("folder", "all", own)
    assert "such as that of 'scan1' by annotator bob" in capsys.readouterr().err
    for file in sorted(own.glob("labels/bob/*")):
        with Image.open(file) as picture:
            soft = picture.resize((24, 24), Image.Resampling.BILINEAR).resize((16, 16))
            picture.convert("RGBA").save(file)
    colours = data.load("folder", "all", own, masks="binary")
    white = data.load("folder", "all", black_and_white, masks="binary")
    assert torch.equal(colours.labels, white.labels)
    soft.save(file)
    refused("classes; if that is right", "num_classes=", "masks=binary",
            call=lambda: data.load("folder", "all", own))


def test_groups_are_listed_with_or_without_endings(own):
    for ending in ("", ".png"):
        lines = [f"scan{i}{ending},patient{i // 2}\n" for i in range(10)]
        (own / "groups.csv").write_text("".join(lines))
        assert data.load("folder", "all", own).groups[:3] == ["patient0", "patient0", "patient1"]


def test_a_single_annotator_needs_no_folder(own):
    for i in range(10):
        (own / f"labels/anna/scan{i}.png").rename(own / f"labels/scan{i}.png")
    shutil.rmtree(own / "labels/anna")
    shutil.rmtree(own / "labels/bob")
    whole = data.load("folder", "all", own)
    assert whole.annotators == ["0"] and whole.labels.shape == (10, 1, 16, 16)


def test_a_wrong_path_says_what_is_there_and_what_to_give(own):
    refused("there is no", own / "imgs/x", f"{own} holds images, labels", "give as --path",
            "datasets/folder", "images/NAME.png",
            call=lambda: data.load("folder", "all", own / "imgs/x"))
    refused("nothing to read at", "images holds scan0.png", "--path",
            call=lambda: data.load("lidc", "all", own / "images"))
    refused("no images/NAME.png", "images holds scan0.png", "give another --path",
            call=lambda: data.load("folder", "all", own / "images"))


def test_masks_that_do_not_fit_are_named(own):
    save_picture(own / "labels/bob/scan3.png", np.ones((16, 15), np.uint8))
    refused("labels/bob/scan3.png is 16 x 15", "images/scan3.png 16 x 16", "of one size",
            call=lambda: data.load("folder", "all", own))
    (own / "labels/bob/scan3.png").unlink()
    (own / "labels/anna/scan3.png").unlink()
    refused("images/scan3.png", "no mask of any annotator",
            call=lambda: data.load("folder", "all", own))
    save_picture(own / "labels/anna/scan3.png", np.full((16, 16), 300, np.uint16))
    refused("'scan3': mask of anna has the value 300", call=lambda: data.load("folder", "all", own))


def test_what_a_folder_was_taken_for_is_said_once(own, capsys):
    for split in ("train", "test"):
        data.load("folder", split, own)
    assert capsys.readouterr().out.count("read as folders") == 1


# --------------------------------------------------------------------------------------- commands


def test_show_replaces_no_picture_of_the_users(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").write_text("mine")
    assert data.main(["show", "--data", "folder", "--path", str(own)]) == 0
    assert "wrote show-folder.png" in capsys.readouterr().out
    assert (tmp_path / "folder.png").read_text() == "mine"
    Image.open(tmp_path / "show-folder.png").load()


def test_runs_on_other_cases_are_told_the_cure(tmp_path):
    for run, case in (("a", "x"), ("b", "y")):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.json").write_text(json.dumps({"settings": {"data": "folder"}}))
        (tmp_path / run / "metrics.json").write_text(json.dumps({"ged_16": dict(mean=0, stderr=0)}))
        (tmp_path / run / "per_case.csv").write_text(f"name,group,ged_16\n{case},1,0.5\n")
    with pytest.raises(UserError, match="different cases.*split_file=.*/a/split.json"):
        compare([tmp_path / "a", tmp_path / "b"])


# ----------------------------------------------------------------------- a run on data that change


SMALL = ["--quick", "--steps", "2", "--batch-size", "2", "--device", "cpu", "--model-args",
         "channels=(4,4)", "convs=1", "mc_samples=2", "rank=1"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A function (more options) -> the folder of a run on 20 scans."""
    undraw(monkeypatch)
    write(tmp_path / "own", 1, count=20)

    def train_run(*more, name="run"):
        command = [*SMALL, "--data", "folder", "--path", tmp_path / "own", *more]
        assert train.main([*map(str, command), "--out", str(tmp_path / name)]) == 0
        return tmp_path / name

    return train_run


def judged(folder):
    """The names of the cases in a folder's per_case.csv."""
    return [line.split(",")[0] for line in (folder / "per_case.csv").read_text().splitlines()[1:]]


def test_images_that_come_later_change_no_split(trained, tmp_path, capsys):
    folder = trained()
    split, before = (folder / "split.json").read_text(), judged(folder)
    write(tmp_path / "own", 1, count=30)
    fresh = data.load("folder", "test", tmp_path / "own")
    assert set(fresh.names) & set(json.loads(split)["train"])  # or there would be nothing to test
    assert evaluate.main([str(folder), "--device", "cpu"]) == 0
    assert judged(folder) == before
    assert train.main(["--resume", str(folder), "--steps", "4", "--device", "cpu"]) == 0
    assert (folder / "split.json").read_text() == split and judged(folder) == before
    assert "12 training cases" in capsys.readouterr().out.split("resumed")[0].splitlines()[-1]
    assert evaluate.main([str(folder), "--split", "all", "--device", "cpu"]) == 0
    assert "12 of these 30 cases have names of training cases" in capsys.readouterr().out
    for gone in json.loads(split)["train"][0], json.loads(split)["test"][0]:
        for file in tmp_path.glob(f"own/**/{gone}.png"):
            file.unlink()
        if gone in json.loads(split)["train"]:  # the test split is still there
            assert evaluate.main([str(folder), "--device", "cpu"]) == 0
            assert "1 names of other splits are not in the data" in capsys.readouterr().err
    assert f"split.json: no case and no group is named '{gone}'" in one_line(
        capsys, evaluate.main, folder)


def test_other_data_are_judged_beside_the_run(trained, tmp_path, capsys):
    folder, other = trained(), write(tmp_path / "other", 1, name="exam")
    before = (folder / "metrics.json").read_text()
    assert "--split all judges every case" in one_line(
        capsys, evaluate.main, folder, "--path", other, "--device", "cpu")
    assert evaluate.main([str(folder), "--path", str(other), "--split", "all",
                          "--device", "cpu"]) == 0
    assert "note" not in capsys.readouterr().out
    place = evaluate.folder_of(folder, "all", path=other)
    assert place.name.startswith(f"all-all-{tmp_path.name}-other-") and len(judged(place)) == 10
    elsewhere = tmp_path / "elsewhere" / tmp_path.name / "other"  # its last two names are the same
    assert evaluate.folder_of(folder, "all", path=elsewhere) != place
    assert (folder / "metrics.json").read_text() == before
    (other / "images").rename(other / "scans")
    assert evaluate.main([str(folder), "--path", str(other), "--split", "all", "--data-args",
                          "image=scans/{name}", "label=labels/{annotator}/{name}",
                          "--device", "cpu"]) == 0
    (other / "scans").rename(other / "images")
    for file in other.glob("images/*"):
        Image.open(file).convert("RGB").save(file)
    assert "3 channels of 2D and 2 classes; this model takes 1 of 2D" in one_line(
        capsys, evaluate.main, folder, "--path", other, "--split", "all", "--device", "cpu")
    shutil.move(tmp_path / "own", tmp_path / "moved")
    assert evaluate.main([str(folder), "--path", str(tmp_path / "moved"), "--device", "cpu"]) == 0
    place = evaluate.folder_of(folder, "test", path=tmp_path / "moved")
    assert judged(place) == judged(folder)


def test_what_lies_outside_the_middle_is_told(trained, capsys):
    """Of scans of 16 x 16, the middle 8 x 8 pixels have a quarter of what was drawn."""
    folder = trained("--image-size", 8)
    assert "75% of the annotated foreground lies outside" in capsys.readouterr().err
    assert evaluate.main([str(folder), "--whole", "--device", "cpu"]) == 0
    assert "outside" not in capsys.readouterr().err
    geds = [json.loads((place / "metrics.json").read_text())["ged_16"]["mean"]
            for place in (folder, folder / "test-all-whole")]
    assert geds[0] != geds[1]
    other = trained("--image-size", 12, name="other")
    capsys.readouterr()
    assert "crops of different sizes" in one_line(
        capsys, evaluate.main, folder, "--compare", other)


def test_an_image_is_segmented_by_the_weights_asked_for(trained, tmp_path, capsys):
    folder = trained()
    (folder / "last.pt").write_bytes(b"broken")
    image = ["--image", str(tmp_path / "own/images/scan0.png"), "--device", "cpu", "--out",
             str(tmp_path)]
    assert evaluate.main([str(folder), *image]) == 0
    assert "last.pt: not a checkpoint" in one_line(
        capsys, evaluate.main, folder, *image, "--weights", "last")
    assert "--whole" in one_line(capsys, evaluate.main, folder, *image, "--whole")


def test_a_run_replaces_no_file_of_the_users(trained, tmp_path, capsys):
    (tmp_path / "own" / "split.json").write_text("mine")
    (tmp_path / "own" / ".notes.tmp").write_text("mine")
    command = [*SMALL, "--data", "folder", "--path", tmp_path / "own", "--out", tmp_path / "own"]
    assert "holds a split.json, but no run" in one_line(capsys, train.main, *command)
    (tmp_path / "own" / "config.json").write_text("{}")
    assert "holds a config.json, but no run" in one_line(capsys, train.main, *command)
    assert (tmp_path / "own" / "split.json").read_text() == "mine"
    assert (tmp_path / "own" / ".notes.tmp").read_text() == "mine"
    (tmp_path / "new").mkdir()
    for written in (b"", b"p", b"process 7 on x"):  # a full disk cuts it short
        (tmp_path / "new" / "lock").write_bytes(written)
        runs.check_free(tmp_path / "new")
    (tmp_path / "new" / "lock").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds a lock"):
        runs.check_free(tmp_path / "new")
