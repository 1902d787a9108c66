import csv
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import metrics
import models
from sources import runs
from analysis import scores
from analysis.calibration import mode_rows, pixel_curve, pooled, total_variation
from analysis.classes import class_rows, volume_rows, write_classes
from analysis.compare import compare
from analysis.page import MEASURES, split_name
from common import UserError, set_tf32
from data_files import refused
from helpers import undraw
from sources.base import Split


class Oracle(torch.nn.Module):
    """A model that knows: `shapes` cases from their images, drawn from the true probabilities."""

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

    def log_likelihood(self, image, label, n, mask=None, generator=None):
        return torch.full((len(image),), -float(n))


@pytest.fixture(scope="module")
def shapes():
    return data.load("shapes", "test", n=60, size=32)


def test_the_true_distribution_scores_as_theory_says(shapes):
    values = evaluate.score(Oracle(shapes), shapes, samples=(16, 400))
    assert all(len(v) == len(shapes) and np.isfinite(v).all() for v in values.values())
    # E[GED of n true draws] = E[d(s, s')] / n, with s, s' two independent draws
    iou = torch.stack([metrics.pairwise_iou(x, x, 4) for x in shapes.labels]).double()
    spread = 1 - torch.einsum("ba,bac,bc->b", shapes.weights.double(), iou,
                              shapes.weights.double()).mean()
    assert abs(values["ged_16"].mean() - spread / 16) < 0.25 * spread / 16
    assert abs(values["diversity_400"].mean() - spread) < 0.02
    assert values["ged_predict"].mean() > 5 * values["ged_16"].mean()
    assert (values["hungarian_iou_400"] > 0.9).all()
    assert (values["log_likelihood"] == -16).all()  # with 16 samples of its own
    assert (values["dice_q05"] <= values["dice_q50"]).all()


def known_modes(model, split, n):
    """Rows for calibration, as arrays."""
    batches = [mode_rows(batch, torch.cat([models.labels_of(x, 2) for x in chunks]))
               for batch, chunks in models.sample_batches(model, split, n)]
    return scores.gather(batches)


def test_true_draws_are_calibrated_and_one_mode_is_not(shapes):
    rows = known_modes(Oracle(shapes), shapes, 400)
    np.testing.assert_allclose(rows["mode_frequency"].sum(1), 1, rtol=1e-5)
    assert total_variation(rows).mean() < 0.08
    all_cases = pooled(rows, 400, shapes.groups)
    assert all_cases["mode_gap_400"]["mean"] < 0.02
    assert all_cases["mode_pooled_tv_400"]["mean"] < 0.05
    curve = pixel_curve(rows)
    known, share = curve[~np.isnan(curve[:, 0])].T
    assert len(known) > 10 and abs(known - share).max() < 0.05

    always = Oracle(shapes)
    always.sample = lambda image, n, generator=None: always.predict(image).expand(n, -1, -1, -1, -1)
    rows = known_modes(always, shapes, 4)
    likeliest = shapes.weights.max(1).values.mean().item()
    assert abs(total_variation(rows).mean() - (1 - likeliest)) < 1e-5  # all mass on one mode


def test_evaluation_repeats_itself_and_ignores_the_batch_before_it(shapes):
    model = Oracle(shapes)
    first = evaluate.score(model, shapes)
    torch.rand(3)
    again = evaluate.score(model, shapes)
    np.testing.assert_array_equal(first["ged_16"], again["ged_16"])
    name, value = evaluate.validation_score(model, shapes)
    assert name == "ged_16" and value == pytest.approx(again["ged_16"].mean(), rel=1e-5)


def test_expectation_over_annotators_skips_missing_ones():
    """iou_rec by hand: annotators at 1/2 each, one reconstructed exactly, one not at all."""
    labels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    labels[0, 0], labels[0, 1] = torch.tensor([[1, 0], [0, 0]]), torch.tensor([[0, 0], [0, 1]])
    part = Split(torch.zeros(1, 1, 2, 2), labels, None, ["g"], 2, ["n"])

    class Model:
        def reconstruct(self, image, label):  # always the first annotator's map
            return torch.nn.functional.one_hot(labels[:, 0].long(), 2).movedim(-1, 1).float()

        def log_likelihood(self, image, label, n, generator):
            return torch.where(label[:, 0, 0] == 1, -1.0, -3.0)

    out = scores.likelihoods(Model(), part, 5)
    assert out["iou_rec"].tolist() == [0.5] and out["log_likelihood"].tolist() == [-2.0]


def test_absent_classes_do_not_count_as_reconstructed():
    """Of 15 colours, the object has one and its reconstruction another: nothing is right."""
    labels = torch.ones(1, 1, 2, 2, dtype=torch.uint8)
    part = Split(torch.zeros(1, 1, 2, 2), labels, None, ["g"], 16, ["n"], instances=labels[:, 0])

    class Model:
        def reconstruct(self, image, label):
            return torch.nn.functional.one_hot(label + 1, 16).movedim(-1, 1).float()

        def log_likelihood(self, image, label, n, generator):
            return torch.zeros(1)

    assert scores.likelihoods(Model(), part, 5)["iou_rec"].tolist() == [0.0]


def test_only_the_scored_classes_count():
    """Classes 0 and 3 of five are scored: what else the maps say is background to the measures."""
    labels = torch.tensor([[[[0, 0, 3, 3, 4, 255]]]], dtype=torch.uint8)
    part = Split(torch.zeros(1, 1, 1, 6), labels, None, ["g"], 5, ["n"], scored=(0, 3))
    assert scores.only_scored(part, labels).flatten().tolist() == [1, 1, 2, 2, 0, 255]
    assert scores.scoring(part)[0] == 3

    sample = torch.tensor([[[[0, 0, 3, 3, 2, 1]]]], dtype=torch.uint8)  # 2 for 4: neither is scored
    assert scores.sample_ged(part, sample).tolist() == [0.0]
    part = replace(part, scored=())  # classes 1..4; absent in both, 1 and 2 count as right
    assert scores.sample_ged(part, sample).tolist() == [1.0]


@pytest.fixture(scope="module")
def judged(run, tmp_path_factory):
    """A copy of the run, judged with 16 samples."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("judged") / "run")
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        evaluate.report(folder, samples=(16,))
    return folder


def test_report_writes_csv_and_json_that_agree(run, undrawn, capsys):
    summary = evaluate.report(run, split="val", samples=(4,))
    folder = run / "val-all"
    assert json.loads((folder / "metrics.json").read_text()) == summary
    rows = list(csv.DictReader((folder / "per_case.csv").open()))
    assert len(rows) == 4 and rows[0]["name"].startswith("shape")
    column = [float(row["ged_4"]) for row in rows]
    assert abs(np.mean(column) - summary["ged_4"]["mean"]) < 1e-5
    counts = [sum(row[f"dice_class_{k}"] != "nan" for row in rows) for k in (1, 2, 3)]
    assert counts == [summary.get(f"dice_class_{k}", {"n": 0})["n"] for k in (1, 2, 3)]
    assert max(counts) > 0 and (folder / "per_class.csv").exists()
    explained = {name for texts in MEASURES.values() for name in texts}
    assert {split_name(name)[0] for name in summary} <= explained
    assert {"ece_band", "aurc_disagreement", "dice_max_4", "entropy"} <= summary.keys()
    for picture in ("reliability.png", "risk_coverage.png"):
        assert (folder / picture).stat().st_size > 0


def test_weights_of_the_end(run, tmp_path, undrawn):
    """last.pt is judged in a folder of its own, and is another model than best.pt."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    content = torch.load(folder / "last.pt", weights_only=True)
    content["state"]["mean.bias"] += torch.tensor([0.0, 50.0, 0.0, 0.0])
    torch.save(content, folder / "last.pt")
    assert evaluate.main([str(folder), "--weights", "last", "--samples", "2"]) == 0
    last = json.loads((folder / "test-all-last" / "metrics.json").read_text())
    best = evaluate.report(folder, samples=(2,))
    assert last["diversity_2"]["mean"] == 0 < best["diversity_2"]["mean"]  # all is class 1


def test_compare_tabulates_and_tests_runs(judged, tmp_path, capsys):
    run, better = judged, tmp_path / "better"
    shutil.copytree(run, better)
    rows = list(csv.reader((run / "per_case.csv").open()))
    column = rows[0].index("ged_16")
    for row in rows[1:]:
        row[column] = str(float(row[column]) - 0.1)
    with (better / "per_case.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert evaluate.main([str(run), "--compare", str(better), "--device", "cpu"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].endswith("| p (ged_16) |") and table[3].startswith("| better |")
    assert "paired permutation test of ged_16 against run;" in table[5]
    assert table[7].startswith("p compares 4 patients") and table[7].endswith("below 0.12.")
    assert table[8].endswith("pictures of the curves beside it") and len(table) == 9
    assert table[3].endswith("| 0.12 |")  # 4 cases, all better: 2 of 2^4 sign patterns
    assert (run / "compare.md").exists() and not (run / "compare.png").exists()  # of 16 alone
    for folder in (run, better):
        summary = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(summary | {"ged_4": summary["ged_16"]}))
    compare([run, better])
    assert (run / "compare.png").exists()
    rows[1][0] = "another case"
    with (better / "per_case.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(UserError, match="different cases"):
        compare([run, better])


def test_agreed_keeps_the_cases_that_every_annotator_marked(run, undrawn, monkeypatch):
    labels = torch.zeros(4, 2, 32, 32, dtype=torch.uint8)
    labels[0, :, 0, 0] = 1  # both
    labels[1, 0, 0, 0] = 1  # one
    labels[2, 0, 0, 0], labels[2, 1] = 1, 255  # the only one there is
    split = Split(torch.zeros(4, 1, 32, 32), labels, None, list("abcd"), 4, list("abcd"))
    monkeypatch.setattr(data, "load", lambda *args, **options: [split])
    evaluate.report(run, split="val", cases="agreed", samples=(2,))
    rows = csv.DictReader((run / "val-agreed" / "per_case.csv").open())
    assert [row["name"] for row in rows] == ["a", "c"]
    split.labels[0] = 255  # nothing to be judged by
    evaluate.report(run, split="val", samples=(2,))
    rows = csv.DictReader((run / "val-all" / "per_case.csv").open())
    assert [row["name"] for row in rows] == ["b", "c", "d"]
    split.labels[:] = 0
    with pytest.raises(UserError, match="marked by every annotator"):
        evaluate.report(run, split="val", cases="agreed", samples=(2,))
    split.labels[:] = 255
    with pytest.raises(UserError, match="4 of 4 cases of the val split of shapes are left out"):
        evaluate.report(run, split="val", samples=(2,))


def test_compare_pools_seeds(judged, undrawn, tmp_path):
    """Two seeds share a line: the mean of 1 and 3 is 2, their standard deviation sqrt 2."""
    run = judged
    for seed, ged in ((0, 1.0), (1, 3.0)):
        folder = tmp_path / f"run-{seed}"
        shutil.copytree(run, folder)
        config = json.loads((run / "config.json").read_text())
        config["settings"]["seed"] = seed
        (folder / "config.json").write_text(json.dumps(config))
        summary = json.loads((run / "metrics.json").read_text())
        summary["ged_16"]["mean"] = ged
        (folder / "metrics.json").write_text(json.dumps(summary))
    # the same seed twice is two runs, and so is another setting
    table = compare([tmp_path / "run-0", tmp_path / "run-1", run]).splitlines()
    assert len(table) == 8 and table[2].startswith("| run-0 (2 seeds) | 2.000 ± 1.414 |")
    assert table[3].startswith("| run |")
    config["settings"]["steps"] = 7
    (tmp_path / "run-1" / "config.json").write_text(json.dumps(config))
    assert len(compare([tmp_path / "run-0", tmp_path / "run-1"]).splitlines()) == 8
    twin = shutil.copytree(tmp_path / "run-1", tmp_path / "twin" / "run-1")  # named after its path
    assert f"| {twin} |" in compare([tmp_path / "run-0", tmp_path / "run-1", twin])


@pytest.mark.parametrize("more, precision, allowed", [
    ([], "highest", False), (["--precision", "tf32"], "high", True)])
def test_precision(run, monkeypatch, more, precision, allowed):
    found = []
    monkeypatch.setattr(evaluate, "report", lambda *args, **options: found.append((
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)))
    assert evaluate.main([str(run), "--device", "cpu", *more]) == 0
    set_tf32(False)
    assert found == [(precision, allowed)]


def test_ctrl_c_and_no_memory_are_one_line(run, monkeypatch, capsys):
    for error, status, text in ((KeyboardInterrupt(), 130, "stopped\n"),
                                (MemoryError(), 2, "error: out of memory: give fewer"),
                                (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 2,
                                 "error: out of memory: give fewer")):
        def fail(*args, **options):
            raise error
        monkeypatch.setattr(evaluate, "report", fail)
        assert evaluate.main([str(run), "--device", "cpu"]) == status
        assert capsys.readouterr().err.startswith(text)


@pytest.mark.parametrize("file, content, message", [
    ("metrics.json", "[]", "not judged yet"), ("metrics.json", '{"ged_16": 3}', "not judged yet"),
    ("metrics.json", '{"ged_16": {"mean": [], "stderr": 0}}', "not judged yet"),
    ("per_case.csv", "name,ged_16\na", "not judged yet"), ("config.json", "[]", "no run there"),
    ("config.json", '{"settings": {}}', "no run there"), ("config.json", "{", "no run there")])
def test_broken_files_of_a_run_are_one_line(judged, tmp_path, capsys, file, content, message):
    folder = tmp_path / "broken"
    shutil.copytree(judged, folder)
    (folder / file).write_text(content)
    assert evaluate.main([str(judged), "--compare", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and str(folder) in error


@pytest.mark.parametrize("name, fields, picture", [
    ("ssn", {}, "manipulation.png"), ("phiseg", dict(latent_levels=2), "levels.png"),
    ("hpunet", dict(latents=(1,), blocks=1), "scales.png"), ("vae_unet", {}, "latents.png")])
def test_every_method_has_its_figure(tmp_path, run, undrawn, name, fields, picture):
    """Which the tests of the method draw."""
    fields = dict(channels=(4, 6), num_classes=4) | fields
    model = models.build(name, fields)
    runs.save(tmp_path / "best.pt", name, model, torch.optim.Adam(model.parameters()), 0, 0.0)
    shutil.copy(run / "config.json", tmp_path)
    evaluate.report(tmp_path, samples=(2,), likelihood_samples=1)
    assert (tmp_path / picture).stat().st_size > 0


def test_of_equal_scores_the_first_class_wins():
    scores = torch.randint(3, (4, 5, 50, 2), generator=torch.Generator().manual_seed(0)).float()
    got = models.labels_of(scores, 1)
    assert got.dtype == torch.uint8 and (got.numpy() == scores.numpy().argmax(1)).all()


def test_samples_come_in_chunks(monkeypatch):
    """Of a large volume a few at a time; of outputs in turn, whole turns."""
    class Model:
        count = 1

        def sample(self, image, n, generator=None):
            return torch.randn(n, len(image), 2, 4, generator=generator)

    def chunks():
        generator = torch.Generator().manual_seed(0)
        return list(models.sample_chunks(Model(), torch.zeros(1, 1, 4), 10, 2, generator))
    assert [len(x) for x in chunks()] == [10]
    monkeypatch.setattr(models, "CHUNK", 30)  # of 8 logits a sample
    assert [len(x) for x in chunks()] == [3, 3, 3, 1]
    Model.count = 2
    assert [len(x) for x in chunks()] == [2] * 5
    Model.count = 5
    assert [len(x) for x in chunks()] == [5, 5]


@pytest.mark.parametrize("arguments, message", [
    (["/nowhere"], "no run there"), (["RUN", "--image", "/nowhere.png"], "no such file"),
    (["RUN", "--samples", "0"], "--samples 0: give 1 to 1000"),
    (["RUN", "--samples", "1000000"], "give 1 to 1000"),
    (["RUN", "--likelihood-samples", "0"], "--likelihood-samples 0: give 1 to 1000"),
    (["RUN", "--samples", "4", "--ood"], "--samples has no effect with --ood"),
    (["RUN", "--likelihood-samples", "4", "--image", "x.png"], "no effect with --image"),
    (["RUN", "--samples", "2", "4", "--image", "x.png"], "one number"),
    (["RUN", "--image", ""], "empty"),
    (["RUN", "--ood-data", "organs", "--compare", "RUN"], "--ood-data has no effect with --compare"),
    (["RUN", "--image", "FIFO"], "not a file"), (["RUN", "--image", "NAN"], "not finite"),
    (["RUN", "--image", "NAN", "--temperature", "nan"], "from 0 up"),
    (["RUN", "--temperature", "2"], "are for --image"),
    (["RUN", "--data-args", "csv=a.csv"], "--split all and --path"),
    (["RUN", "--split", "all", "--path", "x", "--data-args", "path=y"], "leave it out"),
    (["RUN", "--image", "GREY", "--scale-class", "9=1"], "classes are 0 to 3"),
    (["RUN", "--image", "GREY", "--scale-class", "a=1"], "a class and a number"),
    (["RUN", "--cluster", "16", "0"], "both at least 1"),
    (["RUN", "--image", "BROKEN"], "not a readable PNG"),
    (["RUN", "--path", "/nowhere"], "leave the path out")])
def test_mistakes_are_one_line(run, tmp_path, capsys, arguments, message):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "nan.tif")
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(tmp_path / "grey.png")
    swap = {"RUN": str(run), "BROKEN": str(broken), "FIFO": str(tmp_path / "pipe.png"),
            "NAN": str(tmp_path / "nan.tif"), "GREY": str(tmp_path / "grey.png")}
    assert evaluate.main([swap.get(a, a) for a in arguments] + ["--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


# ----------------------------------------------------------------- classes, out of distribution


def test_dice_of_the_whole_foreground():
    """Classes 1 and 2 taken for one another: each by itself is wrong, together they are right."""
    label = torch.zeros(1, 1, 2, 6, dtype=torch.uint8)
    label[..., 0], label[..., 1], label[..., 2], label[..., 5] = 1, 2, 2, 255
    split = Split(label[:, 0][:, None].float(), label, None, ["g"], 3, ["a"])

    class Swaps(torch.nn.Module):
        def predict(self, image):
            found = torch.tensor([[2, 1, 1, 1, 0, 1]]).expand(1, 2, 6)
            return torch.nn.functional.one_hot(found, 3).movedim(-1, 1).float()

        def sample(self, image, n, generator=None):
            return self.predict(image).expand(n, -1, -1, -1, -1)

        def log_likelihood(self, image, label, n, generator):
            return torch.zeros(1)

    values = evaluate.score(Swaps(), split, (1,))
    assert values["dice"].item() == 0
    assert values["dice_foreground"].item() == pytest.approx(6 / 7)  # 4 columns against 3


class Reads(torch.nn.Module):
    """A model that reads the class of each pixel off the image; sample i finds i classes less."""

    def predict(self, image):
        return torch.nn.functional.one_hot(image[:, 0].long(), 4).movedim(-1, 1).float()

    def sample(self, image, n, generator=None):
        return torch.stack([self.predict(image * (image > i)) for i in range(n)])


def test_volumes_are_stacked_from_slices_and_judged_at_native_size():
    """Two volumes of 40 and 3 slices, mixed, on which the network works at half of their size."""
    rng = np.random.default_rng(0)
    groups = ["b"] * 20 + ["a"] * 2 + ["b"] * 20 + ["a"]
    labels = torch.from_numpy(rng.integers(0, 4, (43, 1, 6, 8)).astype(np.uint8))
    coarse = labels[:, :, 1::2, 1::2]  # where the middle of each coarse pixel lies
    names = [f"{group}_z{i:04d}" for i, group in enumerate(groups)]
    split = Split(coarse.float(), coarse, None, groups, 4, names)
    found = volume_rows(Reads(), split, labels, 3)
    assert found["volumes"].tolist() == found["groups"].tolist() == ["b", "a"]
    assert found["class_dice"].shape == found["class_hd95"].shape == (2, 4, 3)
    for v, group in enumerate("ba"):
        rows = [i for i, other in enumerate(groups) if other == group]
        truth = labels[rows, 0].numpy()
        predicted = coarse[rows, 0].numpy().repeat(2, 1).repeat(2, 2)
        for i in range(4):  # predict and three samples
            for k in (1, 2, 3):
                a = (predicted == k) & (predicted > i - 1)
                b = truth == k
                dice = 2 * (a & b).sum() / (a.sum() + b.sum())
                assert found["class_dice"][v, i, k - 1] == pytest.approx(dice, rel=1e-6)
                distance = metrics.hausdorff95(torch.from_numpy(a)[None].byte(),
                                               torch.from_numpy(b)[None].byte())
                assert found["class_hd95"][v, i, k - 1] == pytest.approx(float(distance),
                                                                         nan_ok=True)
    assert np.isnan(found["class_hd95"][:, 3, :2]).all()  # classes that sample 2 does not find


class MissesLeft(torch.nn.Module):
    """Reads the class of each pixel off the image, but not in the first two columns of six."""

    config = models.MODELS["vae_unet"].Config(num_classes=9)

    def predict(self, image):
        assert image.shape[2:] == (6, 6)
        classes = image[:, 0].round().long()
        classes[..., :2] = 0
        return torch.nn.functional.one_hot(classes, 9).movedim(-1, 1).float()

    def sample(self, image, n, generator=None):
        return self.predict(image).expand(n, -1, -1, -1, -1)


def test_the_scans_of_a_patient_are_volumes_of_their_own():
    images = torch.ones(4, 1, 6, 6)
    for slices in ("/z0000", "/z0001"), ("_z0000", "_z10000"), ("_slice000", "_slice001"):
        names = [volume + ending for volume in "ab" for ending in slices]
        split = Split(images, images.byte(), None, ["patient"] * 4, 9, names)
        found = volume_rows(MissesLeft(), split, split.labels, 1)
        assert len(found["class_dice"]) == 2 and found["volumes"].tolist() == ["a", "b"]
        assert found["groups"].tolist() == ["patient"] * 2
    split.names[2] = "c"  # nothing says which volume it is of
    refused("--per-volume needs slices", "VOLUME_z0000", "'c'",
            call=lambda: volume_rows(MissesLeft(), split, split.labels, 1))


def test_a_line_for_each_volume(tmp_path):
    """Two volumes, two classes, a prediction and two samples; the second volume lacks class 2."""
    nan = np.nan
    rows = {"volumes": np.array(["p, 1", "v2"]), "groups": np.array(["p", "q"]),
            "class_dice": np.array([[[0.5, 1], [0.25, 0], [0.75, 0.5]],
                                    [[1, nan], [1, nan], [0, nan]]]),
            "class_hd95": np.array([[[2, 0], [3, nan], [5, 1]], [[0, nan], [0, nan], [nan, nan]]])}
    write_classes(tmp_path / "per_volume.csv", rows)
    first, second = csv.DictReader((tmp_path / "per_volume_case.csv").open())
    assert list(first.values()) == ["p, 1", "p", "0.5", "1", "0.5", "0.25", "2", "0", "4", "1"]
    assert list(second.values()) == ["v2", "q", "1", "", "0.5", "", "0", "", "0", ""]
    assert list(first) == ["name", "group", "dice_class_1", "dice_class_2", "dice_class_1_samples",
                           "dice_class_2_samples", "hd95_class_1", "hd95_class_2",
                           "hd95_class_1_samples", "hd95_class_2_samples"]


def test_per_volume_reads_synapse_at_native_size(tmp_path, monkeypatch, capsys):
    """Slices of 12 x 12 pixels, which the run has resampled to 6 x 6; slice z is of class z + 1.

    All 144 pixels of a class and the 96 found are surface. 12 pixels each lie 4, 3, 2 and 1 pixels
    from the nearest one found, the others on it: 95 % of the distances are below 3.05.
    """
    (tmp_path / "train_npz").mkdir()
    for case, z in np.ndindex(5, 3):
        label = np.full((12, 12), z + 1.0)
        np.savez(tmp_path / f"train_npz/case{case:04d}_slice{z:03d}.npz", label=label,
                 image=label.astype(np.float32))
    folder = tmp_path / "run"
    folder.mkdir()
    settings = dict(model="vae_unet", data="synapse", path=str(tmp_path), data_args=dict(size=6))
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    monkeypatch.setattr(evaluate.models, "load", lambda *_: MissesLeft())
    assert evaluate.main([str(folder), "--per-volume", "--split", "val", "--samples", "2",
                          "--device", "cpu"]) == 0
    assert "1 volumes, 2 samples of each" in capsys.readouterr().out
    rows = {(row["mode"], row["class"]): row
            for row in csv.DictReader((folder / "val-all/per_volume.csv").open())}
    for mode, k in ("predict", "1"), ("sample_2", "3"), ("samples", "2"):
        assert rows[mode, k]["cases"] == "1" and float(rows[mode, k]["dice"]) == 0.8
        assert float(rows[mode, k]["hd95"]) == pytest.approx(3.05)
    [volume] = csv.DictReader((folder / "val-all/per_volume_case.csv").open())
    assert volume["name"] == volume["group"] and volume["name"].startswith("case000")
    assert volume["dice_class_1"] == volume["dice_class_3_samples"] == "0.8"
    assert volume["dice_class_8"] == volume["hd95_class_8_samples"] == ""  # the volume lacks it
    settings = dict(model="ssn", data="cells", path=None)
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    monkeypatch.setattr(MissesLeft, "config", replace(MissesLeft.config, num_classes=16))
    assert evaluate.main([str(folder), "--per-volume", "--device", "cpu"]) == 2
    assert "cells has none" in capsys.readouterr().err


def test_every_annotator_of_a_class_counts():
    """Two of three agree with the prediction, one marked a quarter of it, one nothing at all."""
    labels = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    labels[0, :3, :4, :4] = 1
    labels[0, 0, 2:], labels[0, 0, :, 2:] = 0, 0
    split = Split(torch.zeros(1, 1, 8, 8), labels, None, ["g"], 2, ["a"])
    rows = class_rows(split, labels[:, 1], labels[:, :1].transpose(0, 1))
    dice, distance = rows["class_dice"][0, :, 0], rows["class_hd95"][0, :, 0]
    few = 2 * 4 / (4 + 16)
    assert dice.tolist() == pytest.approx([(few + 1 + 1) / 3, (1 + few + few) / 3])
    assert 0 < distance[0] < distance[1]


def test_every_class_by_itself(tmp_path):
    """Two cases, three classes: one of two annotators marked something; one case has class 2."""
    labels = torch.zeros(2, 2, 6, 6, dtype=torch.uint8)
    labels[:, 1, 1:5, 1:3] = 1  # 8 pixels
    labels[0, 1, 0, 5] = 2
    labels[1, 1, 5] = 255
    split = Split(torch.zeros(2, 1, 6, 6), labels, torch.tensor([[0.4, 0.6]] * 2), ["g"] * 2,
                       3, ["a", "b"])
    prediction = torch.zeros(2, 6, 6)
    prediction[:, 1:5, 1:4] = 1  # 12 pixels, 8 of them right
    samples = torch.stack([prediction, labels[:, 1] % 255])
    samples[:, 1, 5] = 2  # ignored there
    values = scores.gather([class_rows(split, prediction.byte(), samples.byte())])
    nan = np.nan
    dice = [[[0.8, 0], [0.8, 0], [1, 1]], [[0.8, nan], [0.8, nan], [1, nan]]]
    np.testing.assert_allclose(values["class_dice"], dice, rtol=1e-6)
    # of class 1, half of the borders' pixels are a pixel away
    np.testing.assert_allclose(values["class_hd95"], [[[1, nan], [1, nan], [0, 0]],
                                                      [[1, nan], [1, nan], [0, nan]]])
    write_classes(tmp_path / "per_class.csv", values)
    rows = {(row["mode"], row["class"]): row
            for row in csv.DictReader((tmp_path / "per_class.csv").open())}
    assert len(rows) == 12  # predict, samples, and each of two samples
    assert rows["sample_1", "1"]["dice"] == "0.8" and rows["sample_2", "1"]["dice"] == "1"
    first, second, mean = (rows["samples", k] for k in ("1", "2", "mean"))
    assert (float(first["dice"]), first["cases"]) == (pytest.approx(0.9), "2")
    assert float(first["dice_deviation"]) == pytest.approx(0.1)
    assert (second["dice"], second["cases"], second["missed"]) == ("0.5", "1", "0.5")
    assert float(mean["dice"]) == pytest.approx((0.9 + 0.5) / 2)
    assert rows["predict", "2"]["hd95"] == "" and rows["predict", "1"]["dice_deviation"] == ""
