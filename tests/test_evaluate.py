import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import analysis.ambiguity
import analysis.calibration
import analysis.instances
import analysis.ood
import analysis.pictures
import analysis.predict
import models
import sources.base
import sources.brats
import pytest
import torch
from PIL import Image

import data
import evaluate
import metrics
import train
from common import UserError


class Oracle(torch.nn.Module):
    """A model that knows: `shapes` cases from their images, drawn from the true odds."""

    def __init__(self, split):
        super().__init__()
        self.split = split

    def _case(self, image):
        same = (self.split.images[None] == image[:, None]).flatten(2).all(2)
        return same.float().argmax(1)

    def sample(self, image, n, generator=None):
        case = self._case(image)
        modes = torch.multinomial(self.split.weights[case], n, replacement=True,
                                  generator=generator).T  # (n, B)
        labels = self.split.labels[case.expand(n, -1), modes].long()
        return 40.0 * torch.nn.functional.one_hot(labels, 4).movedim(-1, 2)

    def predict(self, image):
        case = self._case(image)
        best = self.split.weights[case].argmax(1)
        label = self.split.labels[case, best].long()
        return torch.nn.functional.one_hot(label, 4).movedim(-1, 1).float()

    def log_likelihood(self, image, label, n, mask=None):
        return torch.full((len(image),), -float(n))


@pytest.fixture(scope="module")
def shapes():
    return data.load("shapes", "test", n=60, size=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--data", "shapes", "--data-args", "n=20", "size=32", "--model-args",
                 "channels=(4,6)", "convs=1", "mc_samples=4", "--batch-size", "4",
                 "--device", "cpu", "--steps", "1", "--out", folder]
    assert train.main([*map(str, arguments)]) == 0
    return folder


def test_the_true_distribution_scores_as_theory_says(shapes):
    values = evaluate.score(Oracle(shapes), shapes, samples=(16, 400))
    assert all(v.shape == (len(shapes),) and not v.isnan().any() for v in values.values())
    # E[GED of n true draws] = E[d(s, s')] / n, with s, s' two independent draws
    iou = torch.stack([metrics.pairwise_iou(x, x, 4) for x in shapes.labels]).double()
    spread = 1 - torch.einsum("ba,bac,bc->b", shapes.weights.double(), iou,
                              shapes.weights.double()).mean()
    assert abs(values["ged_16"].mean() - spread / 16) < 0.25 * spread / 16
    assert abs(values["diversity_400"].mean() - spread) < 0.02
    assert values["ged_predict"].mean() > 5 * values["ged_16"].mean()
    assert (values["hungarian_iou_400"] > 0.9).all()
    assert (values["log_likelihood"] == -400).all()
    assert (values["dice_q05"] <= values["dice_q50"]).all()


def test_true_draws_are_calibrated_and_one_mode_is_not(shapes):
    modes = analysis.calibration.calibrate(Oracle(shapes), shapes, 400)
    np.testing.assert_allclose(modes.frequency.sum(1), 1, rtol=1e-5)
    assert abs(modes.frequency - modes.probabilities).sum(1).mean() / 2 < 0.08
    pooled = analysis.calibration.pooled(modes, 400)
    assert pooled["mode_gap_400"]["mean"] < 0.02 and pooled["mode_pooled_tv_400"]["mean"] < 0.05
    known, share = modes.marginal[~np.isnan(modes.marginal[:, 0])].T
    assert len(known) > 10 and abs(known - share).max() < 0.05

    always = Oracle(shapes)
    always.sample = lambda image, n, generator=None: always.predict(image).expand(n, -1, -1, -1, -1)
    modes = analysis.calibration.calibrate(always, shapes, 4)
    likeliest = shapes.weights.max(1).values.mean().item()
    tv = abs(modes.frequency - modes.probabilities).sum(1).mean() / 2
    assert abs(tv - (1 - likeliest)) < 1e-5  # all mass on one mode


def test_evaluation_repeats_itself_and_ignores_the_batch_before_it(shapes):
    model = Oracle(shapes)
    first = evaluate.score(model, shapes, full=False)
    torch.rand(3)
    assert torch.equal(first["ged_16"], evaluate.score(model, shapes, full=False)["ged_16"])


def test_expectation_over_readers_skips_missing_ones():
    """iou_rec by hand: readers at 1/2 each, one reconstructed exactly, one not at all."""
    labels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    labels[0, 0], labels[0, 1] = torch.tensor([[1, 0], [0, 0]]), torch.tensor([[0, 0], [0, 1]])
    part = sources.base.Split(torch.zeros(1, 1, 2, 2), labels, None, ["g"], 2, ["n"])

    class Model:
        def reconstruct(self, image, label):  # always the first reader's map
            return torch.nn.functional.one_hot(labels[:, 0].long(), 2).movedim(-1, 1).float()

        def log_likelihood(self, image, label, n):
            return torch.where(label[:, 0, 0] == 1, -1.0, -3.0)

    out = evaluate.likelihoods(Model(), part, 5)
    assert out["iou_rec"].tolist() == [0.5] and out["log_likelihood"].tolist() == [-2.0]


def test_only_the_scored_classes_count():
    """Classes 0 and 3 of five are scored: what else the maps say is background to the measures."""
    labels = torch.tensor([[[[0, 0, 3, 3, 4, 255]]]], dtype=torch.uint8)
    part = sources.base.Split(torch.zeros(1, 1, 1, 6), labels, None, ["g"], 5, ["n"], scored=(0, 3))
    assert evaluate.only_scored(part, labels).flatten().tolist() == [1, 1, 2, 2, 0, 255]
    assert evaluate.scored_classes(part) == 3

    class Model:
        training = False
        eval = train = lambda self, *_: self

        def sample(self, image, n, generator=None):
            maps = torch.tensor([[0, 0, 3, 3, 2, 1]])  # class 2 for 4: neither is scored
            return torch.nn.functional.one_hot(maps, 5).movedim(-1, 0)[None, None].float()

    assert evaluate.score(Model(), part, (1,), full=False)["ged_1"].tolist() == [0.0]
    part = data.replace(part, scored=())  # classes 1..4; absent in both, 1 and 2 count as right
    assert evaluate.score(Model(), part, (1,), full=False)["ged_1"].tolist() == [1.0]


def test_report_writes_csv_and_json_that_agree(run, capsys):
    summary = evaluate.report(run, split="val", samples=(4,), quiet=True)
    folder = run / "val-all"
    assert json.loads((folder / "metrics.json").read_text()) == summary
    rows = list(csv.DictReader((folder / "per_case.csv").open()))
    assert len(rows) == 4 and rows[0]["name"].startswith("shape")
    column = [float(row["ged_4"]) for row in rows]
    assert abs(np.mean(column) - summary["ged_4"]["mean"]) < 1e-5
    counts = [sum(row[f"dice_class_{k}"] != "nan" for row in rows) for k in (1, 2, 3)]
    assert counts == [summary.get(f"dice_class_{k}", {"n": 0})["n"] for k in (1, 2, 3)]
    assert max(counts) > 0 and (folder / "per_class.csv").exists()


def test_weights_of_the_end(run, tmp_path):
    """last.pt is judged in a folder of its own, and is another model than best.pt."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    content = torch.load(folder / "last.pt", weights_only=True)
    content["state"]["mean.bias"] += torch.tensor([0.0, 50.0, 0.0, 0.0])
    torch.save(content, folder / "last.pt")
    assert evaluate.main([str(folder), "--weights", "last", "--samples", "2"]) == 0
    last = json.loads((folder / "test-all-last" / "metrics.json").read_text())
    best = evaluate.report(folder, samples=(2,), quiet=True)
    assert last["diversity_2"]["mean"] == 0 < best["diversity_2"]["mean"]  # all is class 1


def test_compare_tabulates_and_tests_runs(run, tmp_path, capsys):
    evaluate.report(run, samples=(16,), quiet=True)
    better = tmp_path / "better"
    shutil.copytree(run, better)
    rows = list(csv.reader((run / "per_case.csv").open()))
    column = rows[0].index("ged_16")
    for row in rows[1:]:
        row[column] = str(float(row[column]) - 0.1)
    with (better / "per_case.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert evaluate.main([str(run), "--compare", str(better), "--device", "cpu"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and table[3].startswith("| better |")
    assert table[3].endswith("| 0.12 |")  # 4 cases, all better: 2 of 2^4 sign patterns
    assert (run / "compare.md").exists() and (run / "compare.png").exists()
    rows[1][0] = "another case"
    with (better / "per_case.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(UserError, match="different cases"):
        evaluate.compare([run, better])


def test_ambiguity_finds_the_threshold(run, monkeypatch):
    """Readers disagree on every odd case, and samples mark something there half of the time."""
    def split(count):
        labels = torch.zeros(count, 2, 4, 4, dtype=torch.uint8)
        labels[:, 0, 1, 1] = 1
        labels[::2, 1, 1, 1] = 1
        images = (torch.arange(count) % 2).float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        return sources.base.Split(images, labels, None, ["g"] * count, 2, ["n"] * count)

    class Model:
        def sample(self, image, n, generator=None):
            marks = torch.ones(n, len(image), 2, 4, 4)
            draw = torch.arange(n).view(-1, 1, 1, 1) % 2
            marks[:, :, 1] = torch.where(draw >= image[:, 0], 2.0, 0.0)
            return marks

    monkeypatch.setattr(train, "load", lambda *a: Model())
    monkeypatch.setattr(data, "load", lambda *a, **k: [split(6), split(9)])
    result = analysis.ambiguity.ambiguity(run, device=torch.device("cpu"))
    assert result["accuracy"] == 1 and 8 < result["threshold"] <= 16
    assert result["commoner"] == 5 / 9 and (run / "ambiguity.png").exists()


def test_agreed_keeps_the_cases_that_every_reader_marked():
    labels = torch.zeros(4, 2, 3, 3, dtype=torch.uint8)
    labels[0, :, 0, 0] = 1  # both
    labels[1, 0, 0, 0] = 1  # one
    labels[2, 0, 0, 0], labels[2, 1] = 1, 255  # the only one there is
    split = sources.base.Split(torch.zeros(4, 1, 3, 3), labels, None, list("abcd"), 2, list("abcd"))
    assert evaluate.agreed(split) == [0, 2]


def test_an_image_of_ones_own(run, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (21, 30), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "größe 1.png")
    assert evaluate.main([str(run), "--image", str(tmp_path / "größe 1.png"), "--out",
                          str(tmp_path / "out"), "--samples", "5", "--device", "cpu"]) == 0
    arrays = np.load(tmp_path / "out" / "größe 1.npz")
    assert arrays["samples"].shape == (5, 21, 30) and arrays["samples"].dtype == np.uint8
    assert arrays["probabilities"].shape == (4, 21, 30)
    np.testing.assert_allclose(arrays["probabilities"].sum(0), 1, rtol=1e-5)
    assert (tmp_path / "out" / "größe 1_samples.png").exists()


@pytest.mark.parametrize("mode, dtype, top", [("L", np.uint8, 255), ("I;16", np.uint16, 65535)])
def test_pictures_are_scaled_to_one(tmp_path, mode, dtype, top):
    array = np.array([[0, top], [top // 5, 0]], dtype=dtype)
    Image.fromarray(array).save(tmp_path / "x.png")
    grey = analysis.predict.read_picture(tmp_path / "x.png", 1)
    np.testing.assert_allclose(grey, [[[0, 1], [0.2, 0]]], atol=1e-4)
    assert analysis.predict.read_picture(tmp_path / "x.png", 3).shape == (3, 2, 2)


@pytest.mark.parametrize("arguments, message", [
    (["/nowhere"], "no run there"), (["RUN", "--image", "/nowhere.png"], "no such file"),
    (["RUN", "--samples", "0"], "from 1 up"), (["RUN", "--cluster", "16", "0"], "from 1 up"),
    (["RUN", "--image", "BROKEN"], "not a picture"),
    (["RUN", "--path", "/nowhere"], "leave the path out")])
def test_mistakes_are_one_line(run, tmp_path, capsys, arguments, message):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    swap = {"RUN": str(run), "BROKEN": str(broken)}
    assert evaluate.main([swap.get(a, a) for a in arguments] + ["--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name, options", [("toy1d", {}), ("lesions3d", dict(n=6, size=32))])
def test_pictures_of_lines_and_volumes(tmp_path, name, options):
    split = data.load(name, "test", **options)
    size = split.labels.shape[2:]
    probs = torch.rand(3, split.num_classes, *size).softmax(1)
    shown = [analysis.pictures.plane(split, 0, probs, probs[0], *probs[:2, 1])]
    assert shown[0].image.dim() == 3 and shown[0].probs.dim() == 4
    analysis.pictures.plot_samples(tmp_path / "a.png", shown)
    analysis.pictures.plot_uncertainty(tmp_path / "b.png", shown)
    assert {p.name for p in Path(tmp_path).iterdir()} == {"a.png", "b.png"}


# ----------------------------------------------------------------- classes, out of distribution


class Fixed:
    """A model whose prediction and samples are given label maps, whatever the image."""

    def __init__(self, prediction, samples, classes):
        self.maps = [torch.nn.functional.one_hot(x.long(), classes).movedim(-1, -3).float()
                     for x in (prediction, samples)]

    def predict(self, image):
        return self.maps[0]

    def sample(self, image, n, generator=None):
        return 40 * self.maps[1][:n]


def test_every_class_by_itself(tmp_path):
    """Two cases, three classes: the likelier of two readers counts; class 2 is in one of them."""
    labels = torch.zeros(2, 2, 6, 6, dtype=torch.uint8)
    labels[:, 1, 1:5, 1:3] = 1  # 8 pixels
    labels[0, 1, 0, 5] = 2
    labels[1, 1, 5] = 255
    split = sources.base.Split(torch.zeros(2, 1, 6, 6), labels, torch.tensor([[0.4, 0.6]] * 2), ["g"] * 2,
                       3, ["a", "b"])
    prediction = torch.zeros(2, 6, 6)
    prediction[:, 1:5, 1:4] = 1  # 12 pixels, 8 of them right
    samples = torch.stack([prediction, labels[:, 1] % 255])
    samples[:, 1, 5] = 2  # ignored there
    values = evaluate.per_class(Fixed(prediction, samples, 3), split, n=2)
    nan = np.nan
    np.testing.assert_allclose(values["dice"], [[[0.8, 0], [0.8, nan]], [[0.8, 0], [0.8, nan]],
                                                [[1, 1], [1, nan]]], rtol=1e-6)
    # of class 1, half of the borders' pixels are a pixel away
    np.testing.assert_allclose(values["hd95"], [[[1, nan], [1, nan]], [[1, nan], [1, nan]],
                                                [[0, 0], [0, nan]]])
    evaluate.write_per_class(tmp_path / "per_class.csv", values)
    rows = {(row["mode"], row["class"]): row
            for row in csv.DictReader((tmp_path / "per_class.csv").open())}
    assert len(rows) == 6
    first, second, mean = (rows["samples", k] for k in ("1", "2", "mean"))
    assert (float(first["dice"]), first["cases"]) == (pytest.approx(0.9), "2")
    assert float(first["dice_deviation"]) == pytest.approx(0.1)
    assert (second["dice"], second["cases"], second["missed"]) == ("0.5", "1", "0.5")
    assert float(mean["dice"]) == pytest.approx((0.9 + 0.5) / 2)
    assert rows["predict", "2"]["hd95"] == "" and rows["predict", "1"]["dice_deviation"] == ""


def test_corruptions():
    images = torch.zeros(2, 2, 33, 33)
    images[:, :, 16, 16] = 1
    at = torch.arange(33) - 16.0
    for sigma in (1, 2):
        line = analysis.ood.corrupt(images, "blur", sigma)[0, 0].sum(0)
        assert line.sum().item() == pytest.approx(1, abs=1e-5)
        assert (line * at.square()).sum().item() == pytest.approx(sigma**2, rel=0.01)
    assert torch.allclose(analysis.ood.corrupt(images + 3, "blur", 8).mean(), images.mean() + 3)
    for percent, side in ((1, 1), (10, 3), (40, 13)):
        patched = analysis.ood.corrupt(torch.rand(2, 2, 33, 33) - 2, "patch", percent, seed=1)
        for image in patched:
            rows, columns = (image == image.max()).all(0).nonzero().unbind(1)
            assert rows.max() - rows.min() == columns.max() - columns.min() == side - 1
            assert len(rows) == side**2
    assert images.sum() == 4  # left as they were
    images = torch.rand(4, 1, 64, 64)
    weak, strong = (analysis.ood.corrupt(images, "noise", s) - images for s in (0.5, 2))
    assert weak.std().item() == pytest.approx(0.5 * images.std().item(), rel=0.02)
    assert torch.allclose(4 * weak, strong, atol=1e-5)
    assert torch.equal(analysis.ood.corrupt(images, "noise", 2) - images, strong)


def test_foreign_images_look_alike():
    like = 5 + 3 * torch.randn(4, 3, 20, 24)
    for channels in (1, 2, 3):
        foreign = analysis.ood.as_foreign(torch.rand(2, channels, 40, 30), like)
        assert foreign.shape == (2, 3, 20, 24)
        assert foreign.mean().item() == pytest.approx(like.mean().item(), abs=1e-4)
        assert foreign.std().item() == pytest.approx(like.std().item(), rel=1e-4)


def test_warning_scores_against_a_loop():
    probs = torch.rand(5, 2, 3, 30, 25, generator=torch.Generator().manual_seed(0)) ** 3
    probs[:, :, 0] += 2
    probs[:, 0, 1, 3:5, 20] += 9  # what is predicted of the first case; nothing of the second
    probs /= probs.sum(2, keepdim=True)
    scores = analysis.ood.warning_scores(probs)
    probs = probs.double().numpy()
    gamma = metrics.gamma_map(torch.from_numpy(probs)).numpy()
    near = [(y, x) for y in range(30) for x in range(25)
            if max(abs(y - 3), abs(x - 20)) <= 5 or max(abs(y - 4), abs(x - 20)) <= 5]
    everywhere = [(y, x) for y in range(30) for x in range(25)]
    for case, place in enumerate((near, everywhere)):
        var = [sum(np.var(probs[:, case, k, y, x]) for k in range(3)) for y, x in place]
        assert scores["variance"][case].item() == pytest.approx(np.mean(var), rel=1e-5)
        of_gamma = np.mean([gamma[case, y, x] for y, x in place])
        assert scores["gamma"][case].item() == pytest.approx(of_gamma, rel=1e-5)


def test_auroc_of_scores():
    both = lambda values: {"variance": np.array(values), "gamma": np.zeros(len(values))}
    scores = {("clean", ""): both([1.0, 2, 3]), ("blur", 2): both([2.0, 3, 4]),
              ("foreign", "organs"): both([9.0, 8])}
    summary = analysis.ood.ood_summary(scores)
    assert summary["variance_clean"]["mean"] == 2
    assert summary["auroc_variance_blur_2"]["mean"] == pytest.approx(7 / 9)
    assert summary["auroc_variance_foreign_organs"] == {"mean": 1.0, "stderr": 0.0, "n": 2}
    assert summary["auroc_gamma_blur_2"]["mean"] == 0.5


def test_ood_writes_what_it_returns(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "OOD_CASES", 3)
    monkeypatch.setattr(evaluate, "OOD_SAMPLES", 2)
    monkeypatch.setattr(evaluate, "CORRUPTIONS", {"blur": (1, 4), "patch": (10, 40),
                                                  "noise": (0.5, 2)})
    assert evaluate.main([str(run), "--ood", "--ood-data", "modes", "--device", "cpu"]) == 0
    assert "variance_foreign_modes" in capsys.readouterr().out
    summary = json.loads((run / "ood.json").read_text())
    rows = list(csv.DictReader((run / "ood.csv").open()))
    assert len(rows) == (1 + 6 + 1) * 3
    strong = [float(row["gamma"]) for row in rows
              if (row["kind"], row["strength"]) == ("blur", "4")]
    clean = [float(row["gamma"]) for row in rows if row["kind"] == "clean"]
    assert summary["gamma_blur_4"]["mean"] == pytest.approx(np.mean(strong), rel=1e-4)
    assert summary["auroc_gamma_blur_4"]["mean"] == pytest.approx(metrics.auroc(strong, clean))
    assert (run / "ood.png").exists() and (run / "ood_curve.png").exists()
    assert evaluate.main([str(run), "--ood-data", "modes", "here", "there", "--device", "cpu"]) == 2
    assert evaluate.main([str(run), "--ood", "--ood-data", "toy1d", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "a data set's name, and its path" in error and "those of toy1d have 1 axes" in error


class Colours:
    """Knows the true objects and gives each a random class in every sample."""

    def __init__(self, split):
        self.split, self.done = split, 0

    def sample(self, image, n, generator=None):
        ids = self.split.instances[self.done : self.done + len(image)].long()
        self.done += len(image)
        table = torch.randint(1, 16, (n, 1000), generator=generator)
        table[:, 0] = 0
        self.last = 40.0 * torch.nn.functional.one_hot(table[:, ids], 16).movedim(-1, 2)
        return self.last

    def predict(self, image):
        return self.last[0]


def test_instances_of_a_model_that_knows_them():
    split = data.load("cells", "test", n=15)
    split.instances[0, :5] = -1  # nobody knows
    scores, shown = analysis.instances.instances(Colours(split), split)
    assert scores["rand_error_16"].shape == (len(split),) == (3,)
    assert scores["rand_error_16"].max() < 0.02  # all but slivers that the clean-up paints over
    assert scores["ap50_16"].min() > 0.7
    # cells are parted by their membranes: components of the true foreground are nearly as good
    assert scores["rand_error_components"].min() < 1e-6
    assert len(shown) == 3 and shown[0]["found"].shape == split.instances.shape[1:]


def test_instances_of_a_model_that_does_not():
    split = data.load("cells", "test", n=15)
    model = Colours(split)
    model.sample = lambda image, n, generator=None: torch.randn(
        (n, len(image), 16, *image.shape[2:]), generator=generator)
    model.predict = lambda image: torch.eye(16)[1][None, :, None, None].expand(
        len(image), -1, *image.shape[2:])  # all one object
    scores, _ = analysis.instances.instances(model, split)
    assert scores["rand_error_16"].min() > 0.4 and scores["rand_error_components"].min() > 0.6
    scores, shown = analysis.instances.instances(model, split, 8, 16)  # within reach even if all 8 differ
    assert "rand_error_8_16" in scores and not shown[0]["found"].any()


def test_classes_below_the_objects_are_background():
    """Cells under two more classes, road and sky: the same scores as without them."""
    split = data.load("cells", "test", n=15)
    want, _ = analysis.instances.instances(Colours(split), split)
    more = replace(split, instances=split.instances + 2 * (split.instances > 0), fixed=3,
                   num_classes=18)
    stuff = torch.randint(3, more.instances.shape)
    more.instances = torch.where(more.instances == 0, stuff, more.instances)
    inner = Colours(split)

    def widened(scores):
        background, objects = scores[..., :1, :, :], scores[..., 1:, :, :]
        at = more.instances[: background.shape[-4]]  # of the batch: there is but one
        others = [background.where(at[:, None] == k, torch.full_like(background, -99.0))
                  for k in range(3)]
        return torch.cat([*others, objects], -3)

    model = SimpleNamespace(sample=lambda *args: widened(inner.sample(*args)),
                            predict=lambda image: widened(inner.predict(image)))
    got, _ = analysis.instances.instances(model, more)
    for name in ("rand_error_components", "rand_error_16", "ap50_16"):
        np.testing.assert_allclose(got[name], want[name], atol=0.03)


def test_short_names_are_unique():
    """Rows of a picture go by name: two cases of one name would be one row."""
    names = ["patient-with-a-long-name-1/slice-0007", "patient-with-a-long-name-2/slice-0007", "b"]
    part = sources.base.Split(torch.zeros(3, 1, 2, 2), None, None, names, 2, names)
    short = [analysis.pictures.short_name(part, i) for i in range(3)]
    assert short == ["-name-1/slice-0007"[-16:], "-name-2/slice-0007"[-16:], "b"]
    assert len({analysis.pictures.short_name(part, i, most=5) for i in range(3)}) == 3


def test_a_folder_of_pictures(run, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    arguments = [str(run), "--image", str(folder), "--out", str(tmp_path / "out"), "--samples", "2"]
    assert evaluate.main(arguments) == 2 and "no image in this folder" in capsys.readouterr().err
    for name, side in (("b.png", 20), ("a.JPG", 33)):
        Image.fromarray(np.full((side, side), 99, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    assert evaluate.main(arguments) == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == ["a.npz", "b.npz"]
    assert np.load(tmp_path / "out" / "a.npz")["samples"].shape == (2, 33, 33)


@pytest.fixture(scope="module")
def volume_run(tmp_path_factory):
    """A tiny DeepMedic SSN of four channels, never trained."""
    folder = tmp_path_factory.mktemp("runs") / "volumes"
    folder.mkdir()
    (folder / "config.json").write_text('{"settings": {"data": "folder"}}')
    fields = dict(dims=3, in_channels=4, num_classes=4, rank=2,
                  deepmedic=dict(pathway=(3, 4), scales=(1, 3), hidden=(5,), patch=6))
    torch.manual_seed(0)
    model = models.build("ssn", fields)
    models.save(folder / "best.pt", "ssn", model, torch.optim.Adam(model.parameters()), 0, 0.0)
    return folder


def test_a_volume_comes_back_on_its_own_grid(volume_run, tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    world = rng.normal(50, 9, (12, 11, 10, 4)).astype(np.float32)  # x, y, z, channel
    affine = np.diag([-1.0, -2.0, 3.0, 1.0])
    matrix = affine @ np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 9], [0, 0, 0, 1.0]])
    files = {"right": (world, affine), "turned": (world.transpose(1, 2, 0, 3)[:, ::-1], matrix)}
    samples = {}
    for name, (array, grid) in files.items():
        nibabel.save(nibabel.Nifti1Image(array, grid), tmp_path / f"{name}.nii.gz")
        assert evaluate.main([str(volume_run), "--image", str(tmp_path / f"{name}.nii.gz"), "--out",
                              str(tmp_path / "out"), "--samples", "3", "--device", "cpu"]) == 0
        for kind, last in (("samples", (3,)), ("probabilities", (4,)), ("prediction", ()),
                           ("uncertainty", ())):
            back = nibabel.load(tmp_path / "out" / f"{name}_{kind}.nii.gz")
            assert back.shape == array.shape[:3] + last
            np.testing.assert_allclose(back.affine, grid)
            samples[name, kind] = np.asarray(back.dataobj)
        assert (tmp_path / "out" / f"{name}_samples.png").exists()
    for kind in ("samples", "probabilities", "prediction", "uncertainty"):
        there = np.moveaxis(samples["turned", kind][:, ::-1], 2, 0)
        np.testing.assert_array_equal(samples["right", kind], there)
    np.testing.assert_allclose(samples["right", "probabilities"].sum(3), 1, atol=1e-5)
    with torch.no_grad():
        model = data.load(volume_run / "best.pt")
        image = (world - world.mean((0, 1, 2))) / world.std((0, 1, 2))
        want = model.predict(torch.from_numpy(image.T.copy())[None])[0].argmax(0)
    assert (samples["right", "prediction"] == want.numpy().T).mean() > 0.999
    nibabel.save(nibabel.Nifti1Image(world[..., 0], affine), tmp_path / "grey.nii.gz")
    assert evaluate.main([str(volume_run), "--image", str(tmp_path / "grey.nii.gz")]) == 2
    assert "1 channels of 3D; the model" in capsys.readouterr().err


def test_a_patient_of_brats(volume_run, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    brain = np.zeros((14, 12, 10), bool)
    brain[3:11, 2:9, 1:8] = True
    brain[3:6, 2:5, 1:4] = False  # not a box
    patient = tmp_path / "Brats17_1_1"
    patient.mkdir()
    for kind in sources.brats.BRATS:
        volume = (rng.integers(1, 900, brain.shape) * brain).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)),
                     patient / f"Brats17_1_1_{kind}.nii.gz")
    written = analysis.predict.predict_image(volume_run, patient, samples=2, out=tmp_path / "out",
                                     device=torch.device("cpu"))
    back = np.asarray(nibabel.load(written).dataobj)
    assert back.shape == (14, 12, 10, 2) and not back[~brain].any() and back[brain].any()
    odds = np.asarray(nibabel.load(tmp_path / "out/Brats17_1_1_probabilities.nii.gz").dataobj)
    np.testing.assert_allclose(odds.sum(3), 1, atol=1e-5)
    assert (odds[~brain] == [1, 0, 0, 0]).all()


def test_a_slice_for_a_model_of_slices(run, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    model, lps = data.load(run / "best.pt"), np.diag([-1.0, -1, 1, 1])
    for name, shape in (("x", (20, 17)), ("y", (20, 17, 1))):
        array = np.random.default_rng(0).random(shape).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(array, lps), tmp_path / f"{name}.nii")
        assert evaluate.main([str(run), "--image", str(tmp_path / f"{name}.nii"), "--out",
                              str(tmp_path), "--device", "cpu"]) == 0
        back = nibabel.load(tmp_path / f"{name}_samples.nii.gz")
        assert back.shape == (20, 17, 1, 16) and (back.affine == lps).all()
        # of a model of `shapes` the values are taken as they are
        want = model.predict(torch.from_numpy(array.reshape(20, 17).T.copy())[None, None])
        got = np.asarray(nibabel.load(tmp_path / f"{name}_prediction.nii.gz").dataobj)
        np.testing.assert_array_equal(got[..., 0].T, want[0].argmax(0))


def test_a_volume_of_one_slice_for_a_model_of_volumes(volume_run, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    array = np.random.default_rng(0).random((9, 8, 1, 4)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "x.nii")
    written = analysis.predict.predict_image(volume_run, tmp_path / "x.nii", samples=2, out=tmp_path,
                                     device=torch.device("cpu"))
    assert nibabel.load(written).shape == (9, 8, 1, 2)


def test_volumes_that_make_no_sense(volume_run, tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    array = np.ones((5, 5, 5, 4), np.float32)
    array[0, 0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "nan.nii")
    nibabel.save(nibabel.Nifti1Image(array.astype(np.complex64), np.eye(4)), tmp_path / "c.nii")
    for name, message in (("nan", "NaN or infinite"), ("c", "one real number")):
        assert evaluate.main([str(volume_run), "--image", str(tmp_path / f"{name}.nii")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_names_of_results(run, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    picture = Image.fromarray(np.full((20, 20), 99, np.uint8))
    picture.save(folder / "a.b.png")
    arguments = [str(run), "--image", str(folder), "--samples", "2", "--device", "cpu", "--out"]
    assert evaluate.main([*arguments, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "a.b.npz").exists()
    assert evaluate.main([*arguments, str(folder)]) == 2
    assert "another folder" in capsys.readouterr().err
    picture.save(folder / "a.b.jpg")
    assert evaluate.main([*arguments, str(tmp_path / "out")]) == 2
    assert "share the name a.b" in capsys.readouterr().err
    (folder / "a.b.png").rename(folder / "scan")
    evaluate.main([str(run), "--image", str(folder / "scan"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "scan.npz").exists()
