"""The one contract, for every model of models.MODELS and every number of axes it knows.

What makes a method itself is tested in the method's own file.
"""

import inspect
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import models
from common import center_crop, pad_to_multiple
from helpers import DEEPMEDIC, SWIN, batch, generator, seeded, tiny

NOT_RANDOM = "unet", "ensemble", "m_heads"
SIZES = {1: (13,), 2: (13, 18), 3: (5, 6, 7)}  # multiples of nothing
CASES = {f"{name}-{dims}d": (name, dict(dims=dims)) for name in models.MODELS for dims in SIZES}
CASES["ssn-3d"][1].update(DEEPMEDIC)
CASES["ssn-unet-3d"] = "ssn", dict(dims=3, backbone="unet")
CASES["vae_unet-swin"] = "vae_unet", SWIN | dict(dims=2)
CASES["vae_unet-image"] = "vae_unet", dict(dims=2, latents="image")
CASES["vae_unet-swin-image"] = "vae_unet", SWIN | dict(dims=2, latents="image")

every_case = pytest.mark.parametrize("name, fields", CASES.values(), ids=CASES)
every_model = pytest.mark.parametrize("name", models.MODELS)


def case_of(fields, **options):
    """A batch with as many axes as the model of these fields has."""
    return batch(size=SIZES[fields["dims"]], **options)


def same_noise(seed=0):
    torch.manual_seed(seed)


# ------------------------------------------------------------------------ shapes, types, seeds


@every_case
def test_shapes_and_types(name, fields):
    """At an odd size, without autograd; probabilities sum to one; log-likelihoods are at most 0."""
    model, (image, label) = tiny(name, **fields).eval(), case_of(fields)
    shape = (2, 3, *label.shape[1:])
    results = [model.sample(image, 4), model.predict(image), model.log_likelihood(image, label, 3)]
    shapes = [(4, *shape), shape, (2,)]
    if hasattr(model, "reconstruct"):
        results.append(model.reconstruct(image, label))
        shapes.append(shape)
    assert [tuple(r.shape) for r in results] == shapes
    for result in results:
        assert result.dtype == torch.float32 and not result.requires_grad
        assert result.isfinite().all()
    torch.testing.assert_close(results[1].sum(1), torch.ones(label.shape), rtol=1e-5, atol=0)
    assert (results[2] <= 0).all()
    loss, terms = model(image, label)
    assert loss.shape == () and loss.isfinite() and terms
    for term in terms.values():
        assert term.shape == () and term.dtype == torch.float32 and not term.requires_grad


def test_conditional_vaes_reconstruct():
    missing = {name for name, Model in models.MODELS.items() if not hasattr(Model, "reconstruct")}
    assert missing <= {"ssn", "vae_unet", *NOT_RANDOM, "dropout_unet"}


@every_case
def test_same_seed_same_samples(name, fields):
    """Whatever state the global generator is in; another seed, other samples."""
    model, (image, label) = tiny(name, **fields).eval(), case_of(fields)
    first = model.sample(image, 3, generator(0))
    same_noise(7)
    assert torch.equal(first, model.sample(image, 3, generator(0)))
    assert torch.equal(first, model.sample(image, 3, generator(1))) == (name in NOT_RANDOM)
    bound = model.log_likelihood(image, label, 3, generator=generator(0))
    assert torch.equal(bound, model.log_likelihood(image, label, 3, generator=generator(0)))
    other = model.log_likelihood(image, label, 3, generator=generator(1))
    assert torch.equal(bound, other) == (name in NOT_RANDOM)


@every_model
def test_chunks_of_samples_are_all_samples(name, monkeypatch):
    """One sample at a time gives the samples and the likelihood of all at once. (SSN's noise is as
    large as its samples, so its likelihood draws it anew for every chunk.)"""
    model, (image, label), results = tiny(name).eval(), batch(), []
    for chunk in (1, 2**40):
        monkeypatch.setattr("common.CHUNK_CPU", chunk)
        same_noise()
        bound = model.log_likelihood(image, label, 5) if name != "ssn" else torch.zeros(2)
        results.append((model.sample(image, 5, generator()), bound))
    for one, all_at_once in zip(*results):
        torch.testing.assert_close(one, all_at_once, rtol=1e-5, atol=1e-5)


@every_case
def test_weights_survive_a_file(name, fields):
    """A state dict, read without executing anything, makes another model draw the same samples."""
    model, (image, label) = tiny(name, **fields), case_of(fields)
    model(image, label)  # moves what is no parameter: batch norm's averages, GECO's lambda
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    again = tiny(name, seed=1, **fields)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    results = [m.eval().sample(image, 2, generator()) for m in (model, again)]
    assert torch.equal(*results)


# ----------------------------------------------------------------------------- image and label


@every_model
def test_it_does_not_matter_who_pads(name):
    """Padding by reflection to the next multiple before the call changes nothing inside."""
    model, (image, label) = tiny(name).eval(), batch(size=(13, 18))
    size, padded = (13, 18), pad_to_multiple(image, 4)
    assert padded.shape[2:] == (16, 20)
    padded_label = torch.full((2, 16, 20), 255)
    center_crop(padded_label, size).copy_(label)

    def results(image, label):
        same_noise()
        maps = [model.predict(image)]
        numbers = []
        if name != "ssn":  # its noise has the size of the image
            maps.append(model.sample(image, 2, generator()))
            same_noise()
            numbers = [model(image, label)[0], model.log_likelihood(image, label, 2)]
        if hasattr(model, "reconstruct"):
            maps.append(model.reconstruct(image, label))
        return [center_crop(m, size) for m in maps] + numbers

    for a, b in zip(results(image, label), results(padded, padded_label)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_case
def test_mask_and_255_are_one(name, fields):
    """Neither loss nor likelihood depends on the label where the mask is false."""
    model, (image, label) = tiny(name, **fields).eval(), case_of(fields)
    mask = seeded(*label.shape, seed=5) > 0

    def results(label, mask):
        same_noise()
        loss = model(image, label, mask)[0]
        return torch.stack([loss, model.log_likelihood(image, label, 3, mask).sum()]).detach()

    expected = results(label, mask)
    assert torch.equal(results(torch.where(mask, label, (label + 1) % 3), mask), expected)
    assert torch.equal(results(label.masked_fill(~mask, 255), None), expected)
    assert not torch.isclose(results(label, None), expected).any()
    assert results(torch.full_like(label, 255), None).isfinite().all()


# ------------------------------------------------------------------------------------ training


@every_case
def test_gradient_reaches_every_parameter(name, fields):
    model, (image, label) = tiny(name, **fields), case_of(fields, count=4)
    same_noise()
    model(image, label)[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_model
def test_a_tiny_batch_overfits(name):
    """Two images with random labels of 36 pixels are known by heart within 150 steps."""
    few = {"dropout_unet": dict(p=0.05), "ensemble": dict(members=1), "ssn": dict(rank=0)}
    model = tiny(name, **dict(channels=(12, 16, 16)) | few.get(name, {}))
    image, label = batch(size=(6, 6), ignored=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    steps = 0
    while (model.predict(image).argmax(1) == label).float().mean() <= 0.98:
        assert (steps := steps + 10) <= 150
        for _ in range(10):
            optimizer.zero_grad()
            model(image, label)[0].backward()
            optimizer.step()


@every_case
def test_bfloat16_leaves_the_loss_standing(name, fields):
    """Under autocast all terms are float32 and the loss is near that without."""
    model, (image, label) = tiny(name, **fields).eval(), case_of(fields)
    same_noise()
    loss = model(image, label)[0]
    same_noise()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, terms = model(image, label)
        bound, samples = model.log_likelihood(image, label, 2), model.sample(image, 2)
    rounded.backward()
    assert {t.dtype for t in (rounded, bound, *terms.values())} == {torch.float32}
    assert samples.isfinite().all() and bound.isfinite().all()
    torch.testing.assert_close(rounded, loss, rtol=0.05, atol=0)


class NoFloat64(TorchDispatchMode):
    """Fails at the first operation whose result is float64, which Apple's GPUs do not have."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        assert getattr(result, "dtype", None) != torch.float64, function
        return result


@every_case
def test_nothing_is_float64(name, fields):
    model, (image, label) = tiny(name, **fields), case_of(fields)
    with NoFloat64():
        model(image, label)[0].backward()
        model.sample(image, 2)
        model.predict(image)
        model.log_likelihood(image, label, 2)


@pytest.mark.parametrize("case", [*models.MODELS, "ssn-3d", "vae_unet-swin"])
def test_a_training_step_is_one_graph(case):
    """torch.compile finds no place where it must fall back to Python, compiles once for 30 steps,
    and changes nothing."""
    name, fields = CASES[case if case in CASES else f"{case}-2d"]
    if name != "hpunet" and "dims" in fields and fields["dims"] == 2:
        fields = dict(channels=(4, 6)) | fields  # every level is traced anew
    torch._dynamo.reset()
    model, eager = tiny(name, **fields), tiny(name, **fields)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(30):
            image, label = case_of(fields, seed=step)
            same_noise(step)
            loss = compiled(image, label)[0]
    same_noise(step)
    torch.testing.assert_close(loss, eager(image, label)[0], rtol=1e-6, atol=0)


@every_model
def test_signatures(name):
    """Every model is called alike."""
    Model = models.MODELS[name]
    arguments = {method: list(inspect.signature(getattr(Model, method)).parameters)
                 for method in ("forward", "sample", "predict", "log_likelihood")}
    assert arguments["forward"] == ["self", "image", "label", "mask"]
    assert arguments["sample"][:4] == ["self", "image", "n", "generator"]
    assert arguments["predict"] == ["self", "image"]
    assert arguments["log_likelihood"] == ["self", "image", "label", "n", "mask",
                                           "generator"]
    assert {"optimizer", "lr", "batch_size", "steps"} <= Model.TRAINING.keys()
    for dims in (2, 3) if name == "ssn" else (2,):  # 3: on another network
        models.build(name, Model.QUICK_CONFIG | dict(dims=dims))
