import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import analysis.ambiguity
import analysis.instances
import analysis.ood
import analysis.paper_figures
import analysis.pictures
import analysis.predict
import analysis.scores
import data
import evaluate
import metrics
import models
from sources import runs
import sources.brats
from common import UserError
from sources.base import Split

# a tiny DeepMedic
VOLUME = dict(dims=3, in_channels=4, num_classes=4, rank=2,
              deepmedic=dict(pathway=(3, 4), scales=(1, 3), hidden=(5,), patch=6))


def test_ambiguity_finds_the_threshold(tmp_path):
    """Annotators disagree on every odd case, and samples mark something there half of the time."""
    def split(count):
        labels = torch.zeros(count, 2, 4, 4, dtype=torch.uint8)
        labels[:, 0, 1, 1] = 1
        labels[::2, 1, 1, 1] = 1
        images = (torch.arange(count) % 2).float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        return Split(images, labels, None, ["g"] * count, 2, ["n"] * count)

    class Model:
        def sample(self, image, n, generator=None):
            marks = torch.ones(n, len(image), 2, 4, 4)
            draw = torch.arange(n).view(-1, 1, 1, 1) % 2
            marks[:, :, 1] = torch.where(draw >= image[:, 0], 2.0, 0.0)
            return marks

    result = analysis.ambiguity.ambiguity(Model(), split(6), split(9), tmp_path)
    assert result["accuracy"] == 1 and 8 < result["threshold"] <= 16
    assert result["commoner"] == 5 / 9 and (tmp_path / "ambiguity.png").exists()
    with pytest.raises(UserError, match="in none of the 3 test cases"):
        analysis.ambiguity.ambiguity(Model(), split(6), split(6).subset([0, 2, 4]), tmp_path)


def test_an_image_of_ones_own(run, tmp_path, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (21, 30), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "größe 1.png")
    assert evaluate.main([str(run), "--image", str(tmp_path / "größe 1.png"), "--out",
                          str(tmp_path / "out"), "--samples", "5", "--device", "cpu"]) == 0
    arrays = np.load(tmp_path / "out" / "größe 1_arrays.npz")
    assert arrays["samples"].shape == (5, 21, 30) and arrays["samples"].dtype == np.uint8
    assert arrays["probabilities"].shape == (4, 21, 30)
    np.testing.assert_allclose(arrays["probabilities"].sum(0), 1, rtol=1e-5)
    assert (tmp_path / "out" / "größe 1_samples.png").exists()
    read = lambda kind: np.asarray(Image.open(tmp_path / "out" / f"größe 1_{kind}.png"))
    for k in range(4):
        assert read(f"probability_{k}").dtype == np.uint16
        np.testing.assert_allclose(read(f"probability_{k}") / 65535, arrays["probabilities"][k],
                                   atol=1e-5)
    np.testing.assert_allclose(read("entropy") / 65535 * np.log(4), arrays["entropy"], atol=2e-5)
    assert (read("mean") == arrays["probabilities"].argmax(0)).all()
    sizes = json.loads((tmp_path / "out" / "größe 1_volumes.json").read_text())
    assert (sizes["samples"], sizes["unit"]) == (5, "pixels")
    assert list(sizes["volume"]) == ["foreground", "class_1", "class_2", "class_3"]
    assert sizes["volume"]["class_2"]["mean"] == pytest.approx((arrays["samples"] == 2).sum() / 5)
    assert f"class_3: {sizes['volume']['class_3']['mean']:.4g} pixels" in capsys.readouterr().out
    assert list(map(analysis.predict.number, (0.00123456, 999.5, 1234567.8))) == [
        "0.001235", "999.5", "1,234,568"]


def test_volumes_by_hand():
    nibabel = pytest.importorskip("nibabel")
    samples = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    for i in range(5):  # 0, 1, 2, 3, 4 voxels of class 1, and 2 of class 2
        samples[i, 0, 0, :i], samples[i, 2, 0, :2] = 1, 2
    turned = np.array([[0, 0.5, 0, 7], [-2, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1.0]])
    source = nibabel.Nifti1Image(np.zeros((4, 4, 3), np.uint8), turned)
    sizes = analysis.predict.volumes(samples, 3, source)
    assert (sizes["samples"], sizes["unit"]) == (5, "mm^3")
    want = {"foreground": [12, 6.6, 17.4], "class_1": [6, 0.6, 11.4], "class_2": [6, 6, 6]}
    for kind, numbers in want.items():  # a voxel has 3 mm^3
        assert list(sizes["volume"][kind].values()) == pytest.approx(numbers)
    source.header.set_xyzt_units("meter")
    assert analysis.predict.volumes(samples, 3, source)["volume"]["class_2"]["mean"] == (
        pytest.approx(6e9))
    assert list(analysis.predict.volumes(samples > 0, 2)["volume"]) == ["foreground"]


@pytest.mark.parametrize("name, options", [("toy1d", {}), ("lesions3d", dict(n=6, size=32))])
def test_pictures_of_lines_and_volumes(tmp_path, name, options):
    split = data.load(name, "test", **options)
    size = split.labels.shape[2:]
    probs = torch.rand(20, 1, split.num_classes, *size).softmax(2)
    batch = split.subset(range(1)).all_maps()
    shown = analysis.pictures.cases_to_show(batch, {split.names[0]: "x"}, probs[0].argmax(1),
                                            probs.argmax(2), metrics.Moments(probs))
    assert [case.name for case in shown] == ["x"] and shown[0].samples.shape[0] == 16
    assert shown[0].image.dim() == 3 and shown[0].variance.dim() == 2
    assert analysis.pictures.cases_to_show(batch, {}, None, None, None) == []
    analysis.pictures.plot_samples(tmp_path / "a.png", shown)
    analysis.pictures.plot_uncertainty(tmp_path / "b.png", shown)
    assert {p.name for p in Path(tmp_path).iterdir()} == {"a.png", "b.png"}


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
    summary = analysis.ood.ood_summary(scores, ["a", "b", "c"])
    assert summary["variance_clean"]["mean"] == 2
    assert summary["auroc_variance_blur_2"]["mean"] == pytest.approx(7 / 9)
    assert summary["auroc_variance_foreign_organs"] == {"mean": 1.0, "stderr": 0.0, "n": 2}
    assert summary["auroc_gamma_blur_2"]["mean"] == 0.5


def test_ood_writes_what_it_returns(run, capsys, monkeypatch):
    monkeypatch.setattr(analysis.ood, "CASES", 3)
    monkeypatch.setattr(analysis.ood, "SAMPLES", 2)
    monkeypatch.setattr(analysis.ood, "CORRUPTIONS", {"blur": (1, 4), "patch": (10, 40),
                                                      "noise": (0.5, 2)})
    assert evaluate.main([str(run), "--ood", "--ood-data", "modes", "--device", "cpu"]) == 0
    assert "variance_foreign_modes" in capsys.readouterr().out
    summary = json.loads((run / "ood.json").read_text())
    spoiled = ["foreign_modes", "blur_1", "blur_4", "patch_10", "patch_40", "noise_0.5", "noise_2"]
    assert summary.keys() == {f"{score}_{kind}" for kind in ["clean", *spoiled]
                              for score in ("variance", "gamma")} | {
        f"auroc_{score}_{kind}" for kind in spoiled for score in ("variance", "gamma")}
    assert summary["gamma_blur_4"]["n"] == 3 and summary["gamma_blur_4"]["mean"] > 0
    assert 0 <= summary["auroc_gamma_blur_4"]["mean"] <= 1 and (run / "ood.png").exists()
    assert evaluate.main([str(run), "--ood-data", "modes", "here", "there", "--device", "cpu"]) == 2
    assert evaluate.main([str(run), "--ood", "--ood-data", "toy1d", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "a data set's name, and its path" in error and "those of toy1d have 1 axes" in error


class Colours:
    """Knows the true objects and gives each a random class in every sample."""

    def __init__(self, split):
        self.split, self.done, self.training = split, 0, False

    def train(self, mode=True):
        return self

    eval = train

    def sample(self, image, n, generator=None):
        ids = self.split.instances[self.done : self.done + len(image)].long()
        self.done += len(image)
        table = torch.randint(1, 16, (n, 1000), generator=generator)
        table[:, 0] = 0
        self.last = 40.0 * torch.nn.functional.one_hot(table[:, ids], 16).movedim(-1, 2)
        return self.last

    def predict(self, image):
        return self.last[0]


def scores_and_pictures(model, split, n=16, alpha=None):
    """Scores of the objects found in a split's samples, and what plot_instances is given."""
    [(batch, chunks)] = models.sample_batches(model, split, n)
    drawn = analysis.scores.draw(model, batch, chunks, (n,))
    shown = dict(zip(split.names, split.names))
    rows = evaluate.details(model, drawn, False, (n, alpha), shown)
    return analysis.scores.gather([rows]), rows["instances_shown"]


def test_instances_of_a_model_that_knows_them(tmp_path):
    split = data.load("cells", "test", n=15)
    split.instances[0, :5] = -1  # nobody knows
    scores, shown = scores_and_pictures(Colours(split), split)
    assert scores["rand_error_16"].shape == (len(split),) == (3,)
    assert scores["rand_error_16"].max() < 0.02  # all but slivers that the clean-up paints over
    assert scores["ap50_16"].min() > 0.7
    # cells are parted by their membranes: components of the true foreground are nearly as good
    assert scores["rand_error_components"].min() < 1e-6
    assert len(shown) == 3 and shown[0]["found"].shape == split.instances.shape[1:]
    analysis.instances.plot_instances(tmp_path / "instances.png", shown)
    name, value = evaluate.validation_score(Colours(split), split)
    assert name == "rand_error_16" and value == scores["rand_error_16"].mean()


@pytest.mark.slow
def test_instances_of_a_model_that_does_not():
    split = data.load("cells", "test", n=15)
    model = Colours(split)
    model.sample = lambda image, n, generator=None: torch.randn(
        (n, len(image), 16, *image.shape[2:]), generator=generator)
    model.predict = lambda image: torch.eye(16)[1][None, :, None, None].expand(
        len(image), -1, *image.shape[2:])  # all one object
    scores, _ = scores_and_pictures(model, split)
    assert scores["rand_error_16"].min() > 0.4 and scores["rand_error_components"].min() > 0.6
    assert evaluate.validation_score(model, split)[1] > 0.4
    # within reach even if all 8 differ
    scores, shown = scores_and_pictures(model, split, 8, 16)
    assert "rand_error_8_16" in scores and not shown[0]["found"].any()


def test_classes_below_the_objects_are_background():
    """Cells under two more classes, road and sky: the same scores as without them."""
    split = data.load("cells", "test", n=15)
    want, _ = scores_and_pictures(Colours(split), split)
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
    got, _ = scores_and_pictures(model, more)
    for name in ("rand_error_components", "rand_error_16", "ap50_16"):
        np.testing.assert_allclose(got[name], want[name], atol=0.03)


def test_short_names_are_unique():
    """Rows of a picture go by name: two cases of one name would be one row."""
    names = ["patient-with-a-long-name-1/slice-0007", "patient-with-a-long-name-2/slice-0007", "b"]
    short = analysis.pictures.short_names(names)
    assert short == ["-name-1/slice-0007"[-16:], "-name-2/slice-0007"[-16:], "b"]
    assert len(set(analysis.pictures.short_names(names, most=5))) == 3


def test_samples_are_scaled_after_the_fact(run, tmp_path):
    """At temperature 0, and with all classes at 0, every sample is the mean; T = 4 doubles."""
    model = models.load(run / "best.pt")
    image, inside = torch.rand(1, 12, 12), torch.ones(12, 12, dtype=torch.bool)

    def logits(temperature, scales):
        generator = torch.Generator().manual_seed(0)
        [chunk] = analysis.predict.scaled_samples(model, image[None], 5, generator, temperature,
                                                  scales)
        return chunk
    mean, plain = model.distribution(image[None]).mean, logits(1, {})
    assert torch.equal(plain, model.sample(image[None], 5, torch.Generator().manual_seed(0)))
    for samples in (logits(0, {}), logits(1, {k: 0 for k in range(4)})):
        torch.testing.assert_close(samples, mean.expand(5, -1, -1, -1, -1))
    torch.testing.assert_close(logits(4, {}) - mean, 2 * (plain - mean), atol=1e-5, rtol=1e-4)
    turned = logits(1, {2: -1.0})
    both = turned[:, :, 2] + plain[:, :, 2]
    torch.testing.assert_close(both, 2 * mean[:, 2].expand_as(both))
    assert torch.equal(turned[:, :, 1], plain[:, :, 1])
    arrays = analysis.predict.sample_arrays(model, image, inside, 5, 0.0, None)
    assert (arrays["samples"] == arrays["prediction"]).all() and not arrays["uncertainty"].any()
    assert arrays["entropy"].shape == (12, 12)
    deterministic = models.build("unet", dict(channels=(4, 6)))
    deterministic.distribution = lambda image: None  # as a user's own model may call a method
    with pytest.raises(UserError, match="only ssn predicts"):
        next(analysis.predict.scaled_samples(deterministic, image[None], 2, None, 2.0, {}))
    for factor in (10**400, 1e39, float("inf"), -float("inf"), float("nan")):
        with pytest.raises(UserError, match="--scale-class 1=.*: too large or not finite"):
            logits(1, {1: factor})


def test_manipulation_of_many_classes_and_of_volumes(tmp_path):
    many = models.build("ssn", dict(channels=(4, 6), num_classes=254, rank=2))
    analysis.paper_figures.plot_manipulation(many, torch.rand(1, 16, 16), tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as picture:
        assert max(picture.size) < 2000  # eight classes, not 253
    volume = models.build("ssn", VOLUME)
    analysis.paper_figures.plot_manipulation(volume, torch.rand(4, 5, 9, 8), tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def test_a_folder_of_pictures(run, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    arguments = [str(run), "--image", str(folder), "--out", str(tmp_path / "out"), "--samples", "2"]
    assert evaluate.main(arguments) == 2 and "no image in this folder" in capsys.readouterr().err
    for name, side in (("b.png", 20), ("a.JPG", 33), ("c.webp", 20), ("d.gif", 20)):
        Image.fromarray(np.full((side, side), 99, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    assert evaluate.main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != " "]
    assert [Path(line.split()[0]).name for line in lines] == [
        f"{name}_samples.png" for name in "abcd"]
    assert "a_arrays.npz" in lines[0] and "b_arrays.npz" in lines[1]
    assert np.load(tmp_path / "out" / "a_arrays.npz")["samples"].shape == (2, 33, 33)


@pytest.fixture(scope="module")
def volume_run(run, tmp_path_factory):
    """A tiny DeepMedic SSN of four channels, never trained."""
    folder = tmp_path_factory.mktemp("runs") / "volumes"
    folder.mkdir()
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= {"data": "folder", "data_args": {}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = models.build("ssn", VOLUME)
    runs.save(folder / "best.pt", "ssn", model, torch.optim.Adam(model.parameters()), 0, 0.0)
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
                           ("mean", ()), ("uncertainty", ()), ("entropy", ())):
            back = nibabel.load(tmp_path / "out" / f"{name}_{kind}.nii.gz")
            assert back.shape == array.shape[:3] + last
            np.testing.assert_allclose(back.affine, grid)
            samples[name, kind] = np.asarray(back.dataobj)
        assert (tmp_path / "out" / f"{name}_samples.png").exists()
        sizes = json.loads((tmp_path / "out" / f"{name}_volumes.json").read_text())
        assert sizes["unit"] == "mm^3" and sizes["volume"]["foreground"]["mean"] == pytest.approx(
            6 * (samples[name, "samples"] > 0).sum() / 3)  # voxels of 1 x 2 x 3 mm
    for kind in ("samples", "probabilities", "prediction", "uncertainty"):
        there = np.moveaxis(samples["turned", kind][:, ::-1], 2, 0)
        np.testing.assert_array_equal(samples["right", kind], there)
    np.testing.assert_allclose(samples["right", "probabilities"].sum(3), 1, atol=1e-5)
    with torch.no_grad():
        model = models.load(volume_run / "best.pt")
        image = (world - world.mean((0, 1, 2))) / world.std((0, 1, 2))
        want = model.predict(torch.from_numpy(image.T.copy())[None])[0].argmax(0)
    assert (samples["right", "prediction"] == want.numpy().T).mean() > 0.999
    nibabel.save(nibabel.Nifti1Image(world[..., 0], affine), tmp_path / "grey.nii.gz")
    assert evaluate.main([str(volume_run), "--image", str(tmp_path / "grey.nii.gz")]) == 2
    assert "1 channels of 3D; this model" in capsys.readouterr().err


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
    model = models.load(volume_run / "best.pt")
    _, written, _ = analysis.predict.predict_image(model, "folder", patient, tmp_path / "out",
                                                   samples=2)
    back = np.asarray(nibabel.load(written).dataobj)
    assert back.shape == (14, 12, 10, 2) and not back[~brain].any() and back[brain].any()
    probs = np.asarray(nibabel.load(tmp_path / "out/Brats17_1_1_probabilities.nii.gz").dataobj)
    np.testing.assert_allclose(probs.sum(3), 1, atol=1e-5)
    assert (probs[~brain] == [1, 0, 0, 0]).all()


def test_a_slice_for_a_model_of_slices(run, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    model, lps = models.load(run / "best.pt"), np.diag([-1.0, -1, 1, 1])
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


def test_a_volume_for_a_model_of_slices(run, tmp_path, capsys):
    """Each slice is predicted by itself, and comes back at its place."""
    nibabel = pytest.importorskip("nibabel")
    volume = np.random.default_rng(0).random((5, 20, 17)).astype(np.float32)  # D, H, W
    np.save(tmp_path / "a.npy", volume)
    np.save(tmp_path / "b.npy", volume[2])
    nibabel.save(nibabel.Nifti1Image(volume.T, np.diag([-1.0, -1, 1, 1])), tmp_path / "c.nii")
    model = models.load(run / "best.pt")
    want = model.predict(torch.from_numpy(volume)[:, None]).argmax(1)
    for name in "abc":
        assert evaluate.main([str(run), "--image", str(next(tmp_path.glob(f"{name}.n*"))), "--out",
                              str(tmp_path), "--samples", "3", "--device", "cpu"]) == 0
    arrays = np.load(tmp_path / "a_arrays.npz")
    assert arrays["samples"].shape == (3, 5, 20, 17)
    assert arrays["probabilities"].shape == (4, 5, 20, 17)
    np.testing.assert_array_equal(arrays["prediction"], want)
    single = dict(np.load(tmp_path / "b_arrays.npz"))
    for kind in single:
        np.testing.assert_allclose(arrays[kind].take(2, -3), single[kind], atol=1e-6)
    for shape in ((), (0, 5), (16, 16, 3), (2, 16, 16, 3, 1)):
        np.save(tmp_path / "odd.npy", np.zeros(shape, np.float32))
        assert evaluate.main([str(run), "--image", str(tmp_path / "odd.npy"), "--device", "cpu",
                              "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("channels come first\n") == 4
    got = np.asarray(nibabel.load(tmp_path / "c_prediction.nii.gz").dataobj)
    np.testing.assert_array_equal(got.T, want)
    assert nibabel.load(tmp_path / "c_samples.nii.gz").shape == (17, 20, 5, 3)


def test_a_volume_of_one_slice_for_a_model_of_volumes(volume_run, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    array = np.random.default_rng(0).random((9, 8, 1, 4)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "x.nii")
    model = models.load(volume_run / "best.pt")
    _, written, _ = analysis.predict.predict_image(model, "folder", tmp_path / "x.nii", tmp_path,
                                             samples=2)
    assert nibabel.load(written).shape == (9, 8, 1, 2)


def test_volumes_that_make_no_sense(volume_run, tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    array = np.ones((5, 5, 5, 4), np.float32)
    array[0, 0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "nan.nii")
    nibabel.save(nibabel.Nifti1Image(array.astype(np.complex64), np.eye(4)), tmp_path / "c.nii")
    for name, message in (("nan", "NaN or infinite"), ("c", "finite real numbers")):
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
    assert (tmp_path / "out" / "a.b_arrays.npz").exists()
    assert evaluate.main([*arguments, str(folder)]) == 2
    assert "--out must differ" in capsys.readouterr().err
    picture.save(folder / "a.b.jpg")
    assert evaluate.main([*arguments, str(tmp_path / "out")]) == 2
    assert "share the name a.b" in capsys.readouterr().err
    for ending in ("json", "npz"):  # as other programs name their annotations of a picture
        (folder / f"a.b.{ending}").write_text("mine")
    assert evaluate.main([str(run), "--image", str(folder / "a.b.png"), "--out", str(folder)]) == 0
    assert all((folder / f"a.b.{ending}").read_text() == "mine" for ending in ("json", "npz"))
    (folder / "a.b.png").rename(folder / "scan")
    evaluate.main([str(run), "--image", str(folder / "scan"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "scan_arrays.npz").exists()


@pytest.mark.parametrize("mode, dtype, top", [("L", np.uint8, 255), ("I;16", np.uint16, 65535)])
def test_pictures_are_scaled_to_one(tmp_path, mode, dtype, top):
    array = np.array([[0, top], [top // 5, 0]], dtype=dtype)
    Image.fromarray(array).save(tmp_path / "x.png")
    grey, inside, _ = analysis.predict.read_image(tmp_path / "x.png", 1, 2, "shapes")
    np.testing.assert_allclose(grey, [[[0, 1], [0.2, 0]]], atol=1e-4)
    assert inside.all() and inside.shape == (2, 2)
    colour, _, _ = analysis.predict.read_image(tmp_path / "x.png", 3, 2, "shapes")
    assert (colour == grey).all() and len(colour) == 3


def test_pixels_far_from_the_scale_of_training_are_told(tmp_path, capsys):
    """Of floats that are taken as they are: not of pictures of 8 bits, nor what is standardised."""
    def said(file, data_name="npz"):
        image, _, _ = analysis.predict.read_image(tmp_path / file, 1, 2, data_name)
        assert image.dtype == np.float32
        return capsys.readouterr().err

    image = np.random.default_rng(0).random((6, 5))
    for name, scale in (("good", 1), ("large", 255), ("small", 1 / 255)):
        np.save(tmp_path / f"{name}.npy", image * scale)
    Image.fromarray((image * 255).astype(np.float32)).save(tmp_path / "large.tif")
    np.save(tmp_path / "blank.npy", np.full((6, 5), 9, np.uint8))
    Image.fromarray(np.full((6, 5), 9, np.uint8)).save(tmp_path / "blank.png")
    assert said("good.npy") == said("blank.npy") == said("blank.png") == ""
    for file, advice in (("large.npy", "divide"), ("large.tif", "divide"),
                         ("small.npy", "multiply")):
        text = said(file)
        assert text.startswith("warning: ") and file in text and advice in text
        assert text.count("\n") == 1
    nibabel = pytest.importorskip("nibabel")
    volume = np.int16(2000 * image.T[..., None] - 1000)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-1.0, -1, 1, 1])), tmp_path / "ct.nii")
    assert said("ct.nii", "folder") == "" and "divide" in said("ct.nii", "npz")
