"""report.html, the curves of --compare, and what they are made of."""
import base64
import csv
import io
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import analysis.compare
import evaluate
import metrics
import train
from analysis.compare import training_time, validations
from analysis.page import (MEASURES, PICTURES, explained, label_png, numbers_html, outline_path,
                           split_name, write_page)
from analysis.pictures import COLORS, cases_to_show, new_plot, save_figure
from sources.base import Split

NAMES = ["<script>alert(1)</script>", "a & 'b'", '"><img src=x onerror=alert(2)>']


def write_files(folder, names, size=(16, 20), classes=3, annotators=2):
    """A judged run's files and its page, of random cases and samples."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (len(names), annotators, *size), generator=generator).byte()
    labels[0, 0].view(-1)[0] = 255
    split = Split(torch.rand(len(names), 1, *size, generator=generator), labels, None,
                  list(names), classes, list(names))
    probs = torch.rand(5, len(names), classes, *size, generator=generator).softmax(2)
    shown = {name: f"short {i}" for i, name in enumerate(names)}
    cases = cases_to_show(split, shown, probs[0].argmax(1), probs.argmax(2), metrics.Moments(probs))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"settings": {"data": "npz"}}))
    log = [dict(step=1, loss=2.0, steps=1, seconds_per_step=3.0), dict(step=2, val_ged_16=1.0)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    result = {"mean": 0.25, "stderr": 0.0625, "n": len(names)}
    (folder / "metrics.json").write_text(json.dumps(dict.fromkeys(
        ["ged_1", "ged_16", "dice", "<b>new</b>_4"], result)))
    with open(folder / "per_case.csv", "w", newline="") as file:
        csv.writer(file).writerows([["name", "ged_1", "ged_16", "dice"],
                                    *([name, 1, i, 0.5] for i, name in enumerate(names))])
    figure, _ = new_plot(size=(2, 2))
    save_figure(figure, folder / "ged.png")
    (folder / "somebody's.png").write_bytes(b"nothing to do with it")
    write_page(folder, folder, "3 <cases>", cases, shown)
    return folder / "report.html"


class Page(HTMLParser):
    """What a page shows and what it would load."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.attributes, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append(dict(attributes))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(text)

    def all(self, tag):
        return [a for t, a in zip(self.tags, self.attributes) if t == tag]


def test_a_page_holds_everything_and_runs_nothing_of_its_cases(tmp_path):
    path = write_files(tmp_path / "run <i>", NAMES)
    page, text = Page(path), path.read_text(encoding="utf-8")
    images = page.all("img")
    # three cases: the sample that is played, 2 annotators, a prediction, 3 maps, 5 samples; ged.png
    assert len(images) == 3 * (1 + 2 + 1 + 3 + 5) + 1
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert all(image["alt"] for image in images)
    for image in images:
        Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))).load()
    assert len(page.all("article")) == len(NAMES)
    assert len(page.all("path")) == 3 * 2 and all(a["stroke"] in COLORS for a in page.all("path"))
    assert [page.text.count(name) for name in NAMES] == [1, 1, 1]  # above each case
    assert [sum(f"{name} · GED 16 {i}.000" in t for t in page.text)
            for i, name in enumerate(NAMES)] == [1, 1, 1]  # in the list
    assert page.tags.count("script") == 1 and not {"i", "b", "link", "iframe"} & set(page.tags)
    assert not any(name.startswith("on") for a in page.attributes for name in a)
    assert all(a["href"].startswith("#") for a in page.attributes if "href" in a)
    assert all(a["src"].startswith("data:") for a in page.attributes if "src" in a)
    assert set(re.findall(r"url\((.{5})", text)) == {"data:"} and "@import" not in text
    assert "run <i>" in page.text and "3 <cases>" in "".join(page.text)
    assert "1 training steps in 0:00:03 (h:min:s)" in "".join(page.text)


@pytest.mark.parametrize("size, shown", [((40,), (20, 40)), ((3, 24, 16), (24, 16)),
                                         ((500, 250), (192, 96))])
def test_pages_of_lines_volumes_and_large_images(tmp_path, size, shown):
    page = Page(write_files(tmp_path / "run", ["a"], size))
    [film] = [a for a in page.all("img") if a.get("class") == "film"]
    picture = Image.open(io.BytesIO(base64.b64decode(film["src"].split(",")[1])))
    assert picture.size == shown[::-1]
    assert page.all("svg")[0]["viewbox"] == f"0 0 {shown[1]} {shown[0]}"


def test_every_number_is_in_a_table():
    summary = {name: {"mean": mean, "stderr": 0.5, "n": 4} for name, mean in
               {"ged_16": 2.0, "ged_4": 1.0, "dice": 123.46, "dice_q05": 3.0, "ece": 5.0,
                "ece_band": 6.0, "new": 4.0}.items()}
    summary["new"]["n"] = 3
    html = numbers_html(summary, 4)
    assert html.count("of 3 cases") == 1 and html.count(" cases</small>") == 1
    heads = re.findall(r"<h3>(.*?)</h3>", html)
    assert [list(MEASURES).index(head) for head in heads[:-1]] == [0, 2, 5, 7]
    assert heads[-1] == "Further measures"
    assert re.findall(r"<th scope=col>(.*?)</th>", html) == ["4", "16", "all", "band", "5"]
    assert re.findall(r"<td>([\d.]+)", html) == ["1.000", "2.000", "5.000", "6.000", "123.5",
                                                 "3.000", "4.000"]
    assert html.count("lower is better") == 2 and html.count("higher is better") == 1


def test_help_explains_every_measure_and_picture():
    """In ASCII, which every terminal can print."""
    text = explained()
    named = set(re.findall(r"^ {4}(\S+)", text, re.MULTILINE))
    assert named == {*PICTURES, *(name for texts in MEASURES.values() for name in texts)}
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    assert "(lower is better) Squared generalised energy distance" in text


@pytest.mark.parametrize("name, parts", [
    ("ged_16", ("ged", "16")), ("dice", ("dice", "")), ("dice_q05", ("dice_q", "05")),
    ("ap50_16_4", ("ap50", "16_4")), ("hd95_class_3", ("hd95_class", "3")),
    ("mode_pooled_tv_100", ("mode_pooled_tv", "100")),
    ("ece_band", ("ece", "band")),
    ("ece", ("ece", "")), ("e_aurc_mutual_information", ("e_aurc", "mutual_information"))])
def test_names_of_measures_are_split(name, parts):
    assert split_name(name) == parts


def test_the_edge_of_what_is_ignored_is_no_outline():
    label = np.zeros((4, 6), np.uint8)
    label[:, 4:] = 255
    assert outline_path(label) == ""
    label[1:3, 2:5] = 1  # its right side lies in what is ignored: drawn to there, and open
    label[:, 4:] = 255
    assert sorted(outline_path(label).split("M")[1:]) == ["2 1h2", "2 1v2", "2 3h2"]


def test_outlines_are_the_borders_between_classes():
    label = np.random.default_rng(0).integers(3, size=(7, 9), dtype=np.uint8)
    drawn = set()
    for x, y, kind, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", outline_path(label)):
        for i in range(int(length)):
            drawn.add((kind, int(x) + i * (kind == "h"), int(y) + i * (kind == "v")))
    wanted = {("h", x, y) for y in range(1, 7) for x in range(9) if label[y, x] != label[y - 1, x]}
    wanted |= {("v", x, y) for y in range(7) for x in range(1, 9) if label[y, x] != label[y, x - 1]}
    assert drawn == wanted
    square = np.zeros((6, 6), np.uint8)
    square[1:4, 2:5] = 1
    assert outline_path(square) == "M2 1h3M2 4h3M2 1v3M5 1v3"


def test_label_maps_become_transparent_pictures():
    label = np.array([[0, 1, 2], [9, 255, 0]], np.uint8)
    uri = label_png(label)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert (np.asarray(picture) == label).all()
    colors = np.asarray(picture.convert("RGBA"))
    first = [int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert colors[0, 0, 3] == 0 and (colors[0, 1, :3] == first).all() and colors[0, 1, 3] == 166
    assert (colors[1, 0] == colors[0, 1]).all()  # eight colours, over and over
    assert (colors[1, 1] == [128, 128, 128, 166]).all()


# ------------------------------------------------------------------------------------- the curves


def test_training_time_of_logs():
    log = [dict(step=1, steps=1, seconds_per_step=4.0), dict(step=50, steps=49, seconds_per_step=2),
           dict(step=60, val_ged_16=0.5), dict(step=100, steps=50, seconds_per_step=1.0),
           # killed at 120 after a checkpoint at 110: the log goes on with the steps since 110
           dict(step=150, steps=40, seconds_per_step=3.0), dict(step=150, val_ged_16=0.25)]
    assert training_time(log) == [(1, 4), (50, 102), (100, 152), (150, 302)]
    name, steps, minutes, scores = validations(log)
    assert name == "val_ged_16" and steps == (60, 150) and scores == (0.5, 0.25)
    np.testing.assert_allclose(minutes * 60, [112, 302])  # a fifth of the way from 102 to 152
    assert validations([]) == ("", (), (), ()) and training_time([]) == []
    assert validations([dict(step=5, val_rand_error_16=1.0)])[2] == [0]  # no pace is known


def test_compare_draws_the_curves_of_every_run(tmp_path, monkeypatch):
    folders, drawn = [tmp_path / name for name in "abc"], []
    for folder, model, seed in zip(folders, ("ssn", "unet", "ssn"), (0, 0, 1)):
        write_files(folder, ["x", "y"])
        settings = dict(data="npz", model=model, seed=seed)
        (folder / "config.json").write_text(json.dumps({"settings": settings}))
    analysis.compare.compare(folders)
    with Image.open(folders[0] / "compare_curves.png") as picture:
        assert picture.width > 700
    monkeypatch.setattr(analysis.compare, "plot_validation", lambda path, runs: drawn.extend(runs))
    analysis.compare.compare(folders)
    assert [name for name, *_ in drawn] == ["a (2 seeds)", "a (2 seeds)", "b"]
    for _, *curve in drawn:
        assert curve == ["val_ged_16", (2,), 0.05, (1,)]
    drawn.clear()
    for folder in folders:
        (folder / "log.jsonl").unlink()
    analysis.compare.compare(folders)
    assert not drawn


def test_training_time_leaves_validation_out(tmp_path, monkeypatch):
    waited, now = [0.0], time.monotonic

    def validation_score(model, split):
        waited[0] += 1e6
        return "ged_16", 0.5
    monkeypatch.setattr(time, "monotonic", lambda: now() + waited[0])
    monkeypatch.setattr(evaluate, "validation_score", validation_score)
    monkeypatch.setattr(train, "plot_curves", lambda *args: None)
    monkeypatch.setattr(evaluate, "report", lambda *args, **options: None)
    arguments = ["--model", "unet", "--data", "shapes", "--data-args", "n=20", "size=32",
                 "--model-args", "channels=(4,6)", "--batch-size", "2", "--device", "cpu",
                 "--steps", "60", "--out", tmp_path / "run"]
    assert train.main([*map(str, arguments)]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [entry["step"] for entry in log if "val_ged_16" in entry] == [50, 60]
    assert training_time(log)[-1][0] == 60 and training_time(log)[-1][1] < 1e5


# ------------------------------------------------------------------------------------ in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_pages_plays_and_fits(tmp_path, width):
    """Probes stand in for a user; they note what they see in the page's title."""
    path = write_files(tmp_path / "run", ["first", "second", "third"])

    def seen_after(actions, milliseconds):
        probe = f"""<script>{actions}
            setTimeout(() => {{ const visible = cases.filter(item => item.offsetHeight);
            document.title = [visible.length, cases.indexOf(visible[0]), sample,
              get("play").innerText, visible[0].querySelector(".film").naturalWidth,
              get("choice").selectedIndex,
              document.documentElement.scrollWidth <= innerWidth].join(); }}, {milliseconds});
            </script></html>"""
        copy = tmp_path / "probe.html"
        copy.write_text(path.read_text(encoding="utf-8").replace("</html>", probe))
        done = subprocess.run(
            [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
             f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
             "--virtual-time-budget=5000", copy.as_uri()], capture_output=True, text=True,
            timeout=120)
        return re.search("<title>(.*?)</title>", done.stdout)[1].split(",")

    key = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: '%s', bubbles: true}));"
    assert seen_after("", 100) == ["1", "0", "0", "Pause", "20", "0", "true"]
    assert seen_after("", 1300)[2] == "2"  # two samples later
    assert seen_after(key % "ArrowRight", 100)[1] == "1"
    assert seen_after(key % "ArrowLeft", 100)[1] == "2"  # around the end
    assert seen_after("get('next').click(); get('next').click(); get('play').click()", 1300) == [
        "1", "2", "0", "Play", "20", "2", "true"]
    stop = "document.querySelectorAll('.case button')[3].click()"
    assert seen_after(stop, 1300)[2:4] == ["3", "Play"]
