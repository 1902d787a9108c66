"""On a GPU: the CPU's results, no waiting in a training step, the memory that sampling takes."""

import contextlib
import dataclasses
import json

import pytest
import torch

import data
import evaluate
import metrics
import models
import train
from analysis.instances import rand_error
from helpers import DEEPMEDIC, SWIN, batch, generator, tiny
from sources.warp import Augmentation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
METHODS = ("ssn", "prob_unet", "phiseg", "hpunet", "vae_unet")
CASES = {name: (name, {}) for name in models.MODELS}
CASES |= {"ssn-3d": ("ssn", dict(dims=3) | DEEPMEDIC), "vae_unet-swin": ("vae_unet", SWIN)}
every_case = pytest.mark.parametrize("name, fields", CASES.values(), ids=CASES)
TRAINED = CASES | {"hpunet-geco": ("hpunet", dict(objective="geco", kappa=0.1, top_k=0.1)),
                   "vae_unet-image": ("vae_unet", dict(latents="image")),
                   "vae_unet-swin-image": ("vae_unet", SWIN | dict(latents="image"))}
every_loss = pytest.mark.parametrize("name, fields", TRAINED.values(), ids=TRAINED)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def no_waiting():
    """Inside, whatever makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_results_are_those_of_the_cpu(name, fields):
    """The same weights and the same generator of the CPU: the same samples and probabilities."""
    model, (image, label) = tiny(name, **fields).eval(), batch(size=(13,) * fields.get("dims", 2))
    expected = [model.sample(image, 4, generator()), model.predict(image)]
    if hasattr(model, "reconstruct"):
        expected.append(model.reconstruct(image, label))
    model, image, label = model.cuda(), image.cuda(), label.cuda()
    results = [model.sample(image, 4, generator()), model.predict(image)]
    if hasattr(model, "reconstruct"):
        results.append(model.reconstruct(image, label))
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@every_loss
def test_a_training_step_never_waits(name, fields, precision):
    """Drawing a batch, augmenting it, the step, and the running means that the log reports."""
    dims = fields.get("dims", 2)
    split = data.load("lesions3d" if dims == 3 else "shapes", size=32, n=20).to("cuda")
    fields = fields | dict(in_channels=1, num_classes=split.num_classes)
    model = tiny(name, **fields).cuda()
    optimizer = train.make_optimizer(model, model.TRAINING)
    everything = Augmentation(flip=(-1,), quarter_turns=True, rotation=20, shear=0.1, scale=0.1,
                              translation=2, elastic=2)
    stream = data.batches(split, 4, 0, augmentation=everything, size=16)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")
    terms = train.Terms()
    for step in range(5):
        with no_waiting() if step > 1 else contextlib.nullcontext():  # libraries set up at first
            terms.add(step, train.train_step(model, optimizer, *next(stream), 1e-3, autocast))
    assert terms.failed() is None


def test_batches_of_a_set_with_instances_never_wait():
    stream = data.batches(data.load("cells", size=32, n=10).to("cuda"), 4, 0)
    next(stream)
    with no_waiting():
        image, label = next(stream)
    assert image.is_cuda and label.is_cuda


def test_batches_are_those_of_the_cpu():
    split, options = data.load("shapes", size=32, n=20), dict(
        augmentation=Augmentation(flip=(-1,), rotation=20, elastic=2))
    for a, b in zip(next(data.batches(split, 8, 0, **options)),
                    next(data.batches(split.to("cuda"), 8, 0, **options))):
        assert (a - b.cpu()).abs().gt(1e-4).float().mean() < 0.01  # labels at a tie may differ


@pytest.mark.parametrize("name", METHODS)
def test_sampling_needs_little_more_than_its_output(name):
    """100 samples of the paper's model: at most 1.3 times the output, what one sample takes, and a
    gigabyte for the chunk that is computed together."""
    model = models.build(name, {}).cuda().eval()
    image, n = torch.randn(2, 1, 128, 128, device="cuda"), 100
    model.sample(image, 1)
    peaks = []
    for count in (1, n):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        samples = model.sample(image, count)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    output = samples.numel() * 4
    print(f"{name}: {peaks[1] / output:.2f} of the output's {output / 1e6:.0f} MB, "
          f"one sample {peaks[0] / 1e6:.0f} MB")
    assert peaks[1] < 1.3 * output + peaks[0] + 2**30


def test_metrics_are_those_of_the_cpu():
    logits = torch.randn(12, 3, 4, 24, 24, generator=generator())
    labels = torch.randint(4, (3, 5, 24, 24), generator=generator(1))
    labels[0, 1], labels[1, :, :5] = 255, 255
    results = []
    for device in ("cpu", "cuda"):
        probs, y = logits.softmax(2).to(device), labels.to(device)
        scores = metrics.Pairs(probs.argmax(2), y, 4).sample_scores((4, 12))
        scores |= dict(ncc=metrics.ncc(probs, y), dice=metrics.dice(probs[0].argmax(1), y, 4),
                       rand=rand_error(probs[0].argmax(1), y[:, 0] % 255))
        results.append({name: value.cpu().double() for name, value in scores.items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.skipif(bool(models.lacks_compiler(torch.device("cuda"))), reason="no compiler")
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_step_is_the_eager_one(name):
    model, (image, label) = tiny(name).cuda().eval(), batch(size=(16, 16))
    image, label, losses = image.cuda(), label.cuda(), []
    for loss_of in (model, models.compiled(model)):
        torch.manual_seed(0)
        losses.append(loss_of(image, label)[0])
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@every_loss
def test_cuda_graphs_change_nothing(name, fields, precision):
    """Three steps on three batches: the weights of a model that was not recorded."""
    results = []
    for record in (False, True):
        model, size = tiny(name, **fields).cuda(), (16,) * fields.get("dims", 2)
        optimizer = train.make_optimizer(model, dict(optimizer="adam", lr=1e-3))
        loss_of, autocast = model, torch.autocast(
            "cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
        for step in range(3):
            image, label = (x.cuda() for x in batch(size=size, seed=step))
            if record and step == 0:
                loss_of = train.Recorded(model, image, label, autocast)
            torch.manual_seed(step)
            terms = train.train_step(loss_of, optimizer, image, label, 1e-3, autocast)
        weights = model.state_dict().values() if precision == "fp32" else ()
        results.append([*terms.values(), *weights])  # the loss's, and the gradient's norm
    for a, b in zip(*results, strict=True):
        # the backward pass of up-sampling adds in any order, in bf16 with visible rounding
        torch.testing.assert_close(a, b, rtol=1e-3 if precision == "fp32" else 5e-2, atol=1e-4)


def test_a_run_trains_judges_and_resumes(tmp_path):
    """In bfloat16; the samples of the finished run can be drawn anew on the CPU."""
    folder = str(tmp_path / "run")
    first = ["--model", "ssn", "--data", "shapes", "--data-args", "n=40", "size=32", "--quick",
             "--precision", "bf16", "--steps", "60", "--device", "cuda", "--cuda-graphs",
             "--out", folder]
    assert train.main(first) == 0
    assert train.main(["--resume", folder, "--steps", "90", "--device", "cuda"]) == 0
    summary = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < summary["ged_16"]["mean"] < 1.5
    model = models.load(folder)
    assert model.sample(torch.rand(1, 1, 32, 32), 2).shape == (2, 1, 4, 32, 32)
    assert dataclasses.asdict(model.config)["num_classes"] == 4
    assert evaluate.report(folder, samples=(4,), device=torch.device("cuda"))["ged_4"]["n"] > 0
