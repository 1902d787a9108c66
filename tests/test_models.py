"""Building models, drawing samples for a split, and what several processes share."""
import dataclasses
import math

import pytest
import torch
from torch import nn

import data
import models
import train
from backbones.unet import UNet
from common import UserError, cross_entropy, standard_normal, valid_label
from helpers import undraw


@pytest.mark.parametrize("name", models.MODELS)
def test_every_default_model_can_be_built_without_memory(name):
    model = models.build(name, {}, meta=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.config == models.MODELS[name].Config()


def test_weights_depend_on_the_seed_alone():
    """Not on the trial on the meta device that comes first."""
    torch.manual_seed(3)
    built = models.build("unet", dict(channels=(4, 6), convs=1)).state_dict()
    torch.manual_seed(3)
    Model = models.MODELS["unet"]
    direct = Model(Model.Config(channels=(4, 6), convs=1)).state_dict()
    assert all(torch.equal(built[key], direct[key]) for key in direct)


@dataclasses.dataclass(frozen=True)
class ShiftConfig:
    in_channels: int = 1
    num_classes: int = 2
    dims: int = 2
    channels: tuple = (8, 16)


class Shift(nn.Module):
    """A U-Net's logits, and one standard normal number for each class added to all its pixels."""

    Config = ShiftConfig
    TRAINING = dict(optimizer="adam", lr=2e-3, batch_size=8, steps=20_000)
    QUICK_CONFIG, QUICK_TRAINING = {}, dict(steps=2)

    def __init__(self, config=ShiftConfig()):
        super().__init__()
        self.config = c = config
        self.unet = UNet(c.in_channels, c.channels, convs=1)
        self.head = nn.Conv2d(self.unet.out_channels, c.num_classes, 1)

    def sample(self, image, n, generator=None):
        logits = self.head(self.unet(image))
        shift = standard_normal((n, *logits.shape[:2], 1, 1), logits, generator)
        return logits + shift

    def forward(self, image, label, mask=None):
        loss = cross_entropy(self.sample(image, 1)[0], valid_label(label, mask)).mean()
        return loss, {"cross_entropy": loss.detach()}

    def predict(self, image):
        return self.head(self.unet(image)).softmax(1)

    def log_likelihood(self, image, label, n, mask=None, generator=None):
        samples = self.sample(image, n, generator)
        return (-cross_entropy(samples, valid_label(label, mask))).logsumexp(0) - math.log(n)


def test_a_method_of_your_own(tmp_path, monkeypatch):
    """A class that keeps the contract is trained and judged like the others."""
    monkeypatch.setitem(models.MODELS, "shift", Shift)
    undraw(monkeypatch)
    run = tmp_path / "run"
    assert train.main(["--model", "shift", "--data", "shapes", "--data-args", "n=20", "--quick",
                       "--device", "cpu", "--out", str(run)]) == 0
    assert isinstance(models.load(run), Shift) and (run / "report.html").exists()


@dataclasses.dataclass(frozen=True)
class LooseConfig(ShiftConfig):
    width: int | None = None
    weight: float = 1


def test_the_type_of_an_option_is_that_of_its_annotation(monkeypatch):
    for name, field, value in (("prob_unet", "beta", "x"), ("ssn", "mc_samples", 2.5),
                               ("vae_unet", "reparameterised", 1), ("ssn", "channels", 3)):
        with pytest.raises(UserError, match=f"{field}={value!r}; give a value like "):
            models.build(name, {field: value}, meta=True)
    assert models.build("prob_unet", dict(beta=1, channels=[4, 4]), meta=True).config.beta == 1
    Loose = type("Loose", (Shift,), dict(Config=LooseConfig))
    monkeypatch.setitem(models.MODELS, "loose", Loose)
    assert models.build("loose", dict(width=3, weight=0.5), meta=True).config.weight == 0.5


@pytest.mark.parametrize("name, value", [*((name, value) for name in models.MODELS
                                           for value in ("x", ())), ("phiseg", 10**30)])
def test_nonsense_is_one_line(name, value):
    for field in dataclasses.fields(models.MODELS[name].Config):
        try:
            models.build(name, {field.name: value}, meta=True)
        except UserError as error:
            assert "\n" not in str(error) and f"{name} cannot be built: " in str(error)


@pytest.mark.parametrize("name, fields, message", [
    ("nothing", {}, "choose from ssn"),
    ("ssn", {"ranks": 1}, "unknown ssn option 'ranks': did you mean rank. choose .*channels"),
    ("unet", {"channels": (10**5, 10**5)}, "more than 1,000,000,000 parameters or"),
    ("unet", {"convs": 10**6}, "or 5,000 tensors")])
def test_what_cannot_be_built_is_refused(name, fields, message):
    with pytest.raises(UserError, match=message):
        models.build(name, fields)


def small_split():
    return data.load("shapes", "train", n=70, size=32)


def drawn(*arguments, **options):
    """[(cases, all their samples)], the chunks of each batch used up before the next."""
    return [(cases, torch.cat(list(chunks)))
            for cases, chunks in models.sample_batches(*arguments, **options)]


def test_batches_of_two_processes_are_those_of_one():
    split = small_split()
    model = models.build("ssn", dict(channels=(4,), convs=1, num_classes=4)).eval()
    alone = drawn(model, split, 2)
    shared = [drawn(model, split, 2, rank=rank, world=2) for rank in (0, 1)]
    assert [len(cases) for cases, _ in alone] == [32, len(split) - 32]
    for i, (cases, samples) in enumerate(alone):
        others, again = shared[i % 2][i // 2]
        assert cases.names == others.names and torch.equal(samples, again)
        assert samples.shape == (2, len(cases), 4, 32, 32)


def test_labels_of_is_argmax():
    scores = torch.randn(3, 4, 5, 6)
    labels = models.labels_of(scores, 1)
    assert labels.dtype == torch.uint8 and torch.equal(labels.long(), scores.argmax(1))


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional")
def test_batch_norm_of_processes_is_batch_norm(tmp_path):
    """Of one process here; that two see the batches of both is a test of training."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        results = []
        for shared in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).double()
            images = torch.randn(6, 2, 4, 4, dtype=torch.float64)
            several = models.distribute(model, images.device) if shared else model
            several(images).pow(3).sum().backward()
            gradients = [p.grad for p in model.parameters()]
            several.eval()
            results.append([*model.state_dict().values(), *gradients, several(images)])
            assert isinstance(model[1], models.GlooBatchNorm) == shared
        for alone, other in zip(*results):
            torch.testing.assert_close(alone, other, rtol=1e-9, atol=1e-9)
    finally:
        torch.distributed.destroy_process_group()
