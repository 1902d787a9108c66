"""Does the code keep to its device, and does training ever wait for it? Without a GPU.

"fakegpu" is a backend that PyTorch lets Python register, and FakeTensorMode gives its tensors a
shape and no values. A tensor of the CPU among them raises at once, and so does whatever needs a
value on the host (.item(), nonzero, a boolean index), for which a GPU would make the host wait.
`test_gpu.py` does the same with real values where there is a GPU.
"""

import contextlib

import pytest
import torch
import torch.utils.backend_registration as registration
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import data
import models
import train
from helpers import DEEPMEDIC, SWIN, generator, tiny
from sources.base import Split
from sources.warp import Augmentation


if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this version of torch has no backends in Python", allow_module_level=True)


if torch.cuda.is_available():  # a registered backend would take the GPU's place in this process
    pytest.skip("test_gpu.py does this on the GPU", allow_module_level=True)


class Backend(registration._DummyBackendModule):
    """What autocast asks a backend."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


registration._setup_privateuseone_for_python_backend("fakegpu", backend_module=Backend())
DEVICE = torch.device("fakegpu:0")
METHODS = ("ssn", "prob_unet", "phiseg", "hpunet", "vae_unet")
CASES = {name: (name, {}) for name in models.MODELS}
CASES |= {f"{name}-3d": (name, dict(dims=3) | (DEEPMEDIC if name == "ssn" else {}))
          for name in METHODS}
CASES["ssn-unet-3d"] = "ssn", dict(dims=3, backbone="unet")
CASES["vae_unet-swin"] = "vae_unet", SWIN
every_case = pytest.mark.parametrize("name, fields", CASES.values(), ids=CASES)


@pytest.fixture
def mode():
    return FakeTensorMode(allow_non_fake_inputs=False)


def fake(mode, tensor):
    """A tensor of the same shape and type on the device, without values."""
    return FakeTensor(mode, tensor.detach().to("meta"), DEVICE)


def moved(mode, model):
    """The model with its parameters and buffers on the device."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(fake(mode, value))
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = fake(mode, value)
    return model


def batch(mode, fields, size=13, count=3):
    """Images, labels and a mask on the device."""
    shape = (size,) * fields.get("dims", 2)
    return (fake(mode, torch.zeros(count, 2, *shape)),
            fake(mode, torch.zeros(count, *shape, dtype=torch.long)),
            fake(mode, torch.zeros(count, *shape, dtype=torch.bool)))


@every_case
def test_a_whole_training_step_stays_on_the_device(name, fields, mode):
    """Loss, backward, the optimiser and the running means that the log reports."""
    model = moved(mode, tiny(name, **fields))
    image, label, _ = batch(mode, fields)
    with mode:
        optimizer = train.make_optimizer(model, dict(optimizer="adam", lr=1e-3, weight_decay=1e-5))
        terms = train.train_step(model, optimizer, image, label, 1e-3, contextlib.nullcontext())
        running = train.Terms()
        running.add(1, terms)
        running.add(2, terms)
        assert {t.device for t in (*terms.values(), running.sum, running.bad)} == {DEVICE}
        assert {t.dtype for t in terms.values()} == {torch.float32}


@pytest.mark.parametrize("name", [*models.MODELS, "ssn-3d", "vae_unet-swin"])
def test_what_is_asked_of_a_model_stays_on_the_device(name, mode):
    """With a mask, with a generator of the CPU (one seed, one result everywhere) and without."""
    name, fields = CASES[name]
    model = moved(mode, tiny(name, **fields)).eval()
    image, label, mask = batch(mode, fields)
    with mode:
        results = [model(image, label, mask)[0], model.sample(image, 3),
                   model.sample(image, 3, generator()), model.predict(image),
                   model.log_likelihood(image, label, 3, mask)]
        if hasattr(model, "reconstruct"):
            results.append(model.reconstruct(image, label))
        assert {result.device for result in results} == {DEVICE}


@pytest.mark.parametrize("name", METHODS)
def test_the_papers_models_stay_on_the_device(name, mode):
    with torch.device("meta"):
        model = models.MODELS[name]()
    model = moved(mode, model)
    image = fake(mode, torch.zeros(2, 1, 128, 128))
    label = fake(mode, torch.zeros(2, 128, 128, dtype=torch.long))
    with mode:
        assert model(image, label)[0].device == model.sample(image, 2).device == DEVICE


ALL = dict(rotation=30, shear=0.1, scale=0.1, translation=2, elastic=2)
AUGMENTATIONS = {"none": {}, "moves": dict(flip=(-1,), quarter_turns=True), "all": ALL}


@pytest.mark.parametrize("kind", ["labels", "flips"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_batches_are_made_on_the_device(kind, dims, augmentation):
    """Drawn on the host and sent, cropped and augmented there."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the host's own tensors have values
    size = (12,) * dims
    split = Split(fake(mode, torch.zeros(5, 1, *size)),
                  fake(mode, torch.zeros(5, 2, *size, dtype=torch.uint8)), None, list("abcde"), 4,
                  list("abcde"))
    if kind == "flips":
        split.flips = fake(mode, torch.zeros(5, 3, 256, dtype=torch.uint8))
        split.weights = torch.full((5, 3), 1 / 3)
    with mode:
        images, labels = next(data.batches(split, 4, 0, size=8,
                                           augmentation=Augmentation(**augmentation)))
    assert images.device == labels.device == DEVICE
    assert images.shape == (4, 1, *(8,) * dims) and labels.shape == (4, *(8,) * dims)
