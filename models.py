"""The ten models by name and how each is trained: build and load one, draw samples of a split.

    model = models.load("runs/ssn-shapes-0")         # its best.pt, in eval mode
    samples = model.sample(image, 16)                # (16, B, K, H, W) logits
"""

import dataclasses
import importlib.util
import os
import shutil
import sysconfig
import typing
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from baselines import DeterministicUNet, DropoutUNet, EnsembleUNet, MHeads
from common import UserError
from hpunet import HPUNet
from phiseg import PHiSeg
from prob_unet import Image2ImageVAE, ProbUNet
from sources.base import check_known
from sources.runs import check_state, load_checkpoint
from ssn import SSN
from vae_unet import VAEUNet

CHUNK = 2**28  # logits that `sample_chunks` computes at once (1 GiB)
KINDS = {bool: (bool,), int: (int,), float: (int, float), str: (str,), tuple: (tuple, list),
         dict: (dict,)}  # what a field of a Config may be, by its annotation
LARGEST, MOST_TENSORS = 10**9, 5_000  # limits on parameters; the ensemble has 1.9e8 in 896 tensors

# To add a method, write a class with
#   Config          a frozen dataclass with the fields in_channels, num_classes and dims, and as
#                   many others as you like, all with defaults; __init__(self, config=Config())
#                   keeps it as self.config
#   TRAINING        dict(optimizer="adam", lr=1e-4, batch_size=8, steps=10_000); weight_decay,
#                   lr_drops and others as in the methods
#   QUICK_CONFIG, QUICK_TRAINING    dicts of what --quick changes, may be empty; optional:
#   QUICK_INSTANCES                 fields that it changes, too, for sets with instances
#   forward(image, label, mask=None)            -> (loss, {name of a term: its value, detached})
#   sample(image, n, generator=None)            -> logits (n, B, K, *S)
#   predict(image)                              -> probabilities (B, K, *S)
#   log_likelihood(image, label, n, mask=None, generator=None)    -> nats (B,)
# and list it here. image is (B, C, *S), label int64 (B, *S) with 255 for pixels to be ignored, and
# mask (B, *S) is False for further pixels to be ignored. Where the class has them, these are used:
#   reconstruct(image, label)                   -> logits (B, K, *S) of latents that know the label
#   advice(log)                                 -> a line to print after training, or None; log is
#                                                  a list of dicts of the terms
#   count                                       how many outputs `sample` returns in turn
# tests/test_models.py has an example of 30 lines. To have your class tested like the others
# (tests/test_contract.py), give tests/helpers.py a small config of it.
MODELS = {
    "ssn": SSN,
    "prob_unet": ProbUNet,
    "phiseg": PHiSeg,
    "hpunet": HPUNet,
    "vae_unet": VAEUNet,
    "image2image_vae": Image2ImageVAE,
    "unet": DeterministicUNet,
    "dropout_unet": DropoutUNet,
    "ensemble": EnsembleUNet,
    "m_heads": MHeads,
}

# {name in TRAINING: (class, the settings of TRAINING that it uses besides lr)}
OPTIMIZERS = {"adam": (torch.optim.Adam, ("weight_decay",)),
              "sgd": (torch.optim.SGD, ("weight_decay", "momentum")),
              "rmsprop": (torch.optim.RMSprop, ("weight_decay", "momentum", "alpha"))}

SIX_SCALES = (32, 64, 128, 256, 512, 1024)
NINE_SCALES = (32, 64, 128, 256, 256, 256, 256, 256, 256)
CITYSCAPES = dict(batch_size=16, lr_drops=tuple((60_000 * i, 10 ** (-i / 3)) for i in (1, 2, 3)))
BRATS = dict(optimizer="rmsprop", lr=1e-3, momentum=0.6, alpha=0.9, weight_decay=1e-4,
             batch_size=10, steps=120_000,
             lr_drops=((44_000, 1 / 2), (64_000, 1 / 4), (80_000, 1 / 8), (90_000, 1 / 16),
                       (98_000, 1 / 32), (105_000, 1 / 64)))
# A model's Config and TRAINING are those of its paper on one data set, most often LIDC (but for
# the loss of VAE U-Net, see vae_unet.py's differences 1 and 4). RECIPES has the settings that the
# paper changed for another one: {(model, data set): (fields of Config, settings of TRAINING)}.
# Options of train.py override both.
RECIPES = {
    ("ssn", "brats"): ({}, BRATS),
    # weight decay: the authors' loss is a mean over the 30^3 voxels of a patch, ours a sum
    ("unet", "brats"): (dict(backbone="deepmedic"), BRATS | dict(weight_decay=1e-4 * 30**3)),
    ("hpunet", "em"): (dict(channels=NINE_SCALES, kappa=1.2), dict(
        batch_size=24, steps=450_000,
        lr_drops=tuple((75_000 * i, 10 ** (-0.6 * i)) for i in range(1, 6)))),
    # not a paper's set: the recipe of analysis/instances.py, at a width for a GPU
    ("hpunet", "cells"): (dict(channels=(32, 48, 64, 96, 96), blocks=2, convs=2, latents=(8, 4),
                               objective="elbo", top_k=1, beta=30.0), dict(
        lr=1e-3, batch_size=16, steps=20_000, lr_drops=((12_000, 0.3), (17_000, 0.1)))),
    ("hpunet", "cityscapes"): (dict(channels=NINE_SCALES, blocks=2, kappa=0.77), dict(  # task=cars
        batch_size=128, steps=100_000, lr=2e-4, lr_drops=((70_000, 0.5),))),
    # with gradients from z to its distribution, unlike the code: see vae_unet.py, difference 1
    ("vae_unet", "synapse"): (dict(backbone="swin", ce_weight=0.4, dice_weight=0.5, kl_weight=0.1,
                                   kl_scale="mean"), dict(lr=0.05, steps=14_000)),
    ("image2image_vae", "cityscapes"): (dict(channels=SIX_SCALES, beta=1.0), CITYSCAPES),
} | {(model, "cityscapes"): (dict(channels=SIX_SCALES), CITYSCAPES)
     for model in ("prob_unet", "unet", "dropout_unet", "ensemble", "m_heads")}


def check_fields(name: str, fields) -> None:
    """Raise a UserError unless there is a model `name`, whose config has such `fields`."""
    check_known("--model", name, MODELS)
    known = sorted(field.name for field in dataclasses.fields(MODELS[name].Config))
    for field in fields:
        check_known(f"{name} option", field, known)


def build(name: str, fields: dict, *, meta: bool = False) -> nn.Module:
    """Build the model `name` with these fields of its config and defaults for the others; with
    `meta`, without weights.

    Raises a UserError if a field is unknown, its value is not allowed, or the model would be
    absurdly large. To check this, the model is built on the device "meta" first, without memory,
    and given up as soon as its parameters are too many.
    """
    check_fields(name, fields)
    Model, sizes = MODELS[name], []
    for field in dataclasses.fields(Model.Config):
        kind = typing.get_origin(field.type) or field.type
        if field.name in fields and kind in KINDS and type(fields[field.name]) not in KINDS[kind]:
            raise UserError(f"{name} cannot be built: {field.name}={fields[field.name]!r}; give a "
                            f"value like {getattr(Model.Config(), field.name)!r}")

    def limit(module, parameter_name, parameter):
        sizes.append(0 if parameter is None else parameter.numel())
        if sum(sizes) > LARGEST or len(sizes) > MOST_TENSORS:
            raise ValueError(f"it has more than {LARGEST:,} parameters or {MOST_TENSORS:,} tensors")

    hook = register_module_parameter_registration_hook(limit)
    try:
        for value in fields.values():
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(number, int) and number > 10**6 for number in numbers):
                raise ValueError("a number above 1,000,000")  # a constructor might loop forever
        config = Model.Config(**fields)
        if config.in_channels < 1 or config.num_classes < 2:
            raise ValueError(f"in_channels={config.in_channels}, num_classes={config.num_classes}: "
                             "there are at least 1 and 2")
        with torch.device("meta"):
            model = Model(config)
    except Exception as error:  # constructors raise all kinds of errors on bad values
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name} cannot be built: {reason}") from error
    finally:
        hook.remove()
    return model if meta else Model(config)


def load(path, device="cpu") -> nn.Module:
    """Load a trained model in eval mode from a run's folder (its best.pt) or a checkpoint."""
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    content = load_checkpoint(path)
    check_state(path, build(content["model"], content["config"], meta=True), content["state"])
    model = build(content["model"], content["config"])
    model.load_state_dict(content["state"])
    return place(model, device).eval()


def place(model, device) -> nn.Module:
    """Move the model to the device. 2D models become channels_last: faster convolutions."""
    if model.config.dims == 2:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def sample_batches(model, split, n, rank=0, world=1):
    """Yield (batch, its samples) for the whole split or, under torchrun, for every world-th batch.
    A batch is a Split, its samples are `sample_chunks`; use them up before the next batch.

    A batch has at most 32 cases, fewer if their logits would need more than 128 MiB; on a GPU at
    most 128 of 128 x 128 pixels, and 1 GiB. The samples depend on the batch only.
    """
    pixels = split.labels[0, 0].numel()
    most, values = 32, 2**25
    if split.images.device.type != "cpu":  # a GPU starts few, large kernels faster
        most, values = min(128, 2**21 // pixels), 2**28
    batch = max(1, min(most, values // (n * split.num_classes * pixels)))
    for start in range(rank * batch, len(split), world * batch):
        part = split.subset(range(start, min(start + batch, len(split)))).all_maps()
        generator = torch.Generator(part.images.device).manual_seed(start)
        yield part, sample_chunks(model, part.images, n, split.num_classes, generator)


def sample_chunks(model, image, n, num_classes, generator, **options):
    """Yield n samples for images (B, C, *S) as float32 logits (m, B, K, *S), all at once or, for
    large volumes, in chunks of CHUNK values."""
    cycle = getattr(model, "count", 1)  # the baselines' samples are their outputs in turn
    chunk = max(1, CHUNK // (num_classes * image[:, 0].numel() * cycle)) * cycle
    for start in range(0, n, chunk):
        yield model.sample(image, min(chunk, n - start), generator, **options).float()


def labels_of(scores, axis: int):
    """The class with the highest score, or the first of equal ones, as uint8.

    On a CPU and along an axis of few classes, torch.max takes several times as long, and argmax
    tens of times.
    """
    best, *others = scores.unbind(axis)
    label = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for k, score in enumerate(others, 1):
        label = torch.maximum(label, (score > best).byte() * k)
        best = torch.maximum(best, score)
    return label


# ------------------------------------------------------------------------- how they are trained


def published(name: str, data: str) -> tuple[dict, dict]:
    """The entry of RECIPES for a model and a data set; two empty dicts where there is none."""
    return RECIPES.get((name, data), ({}, {}))


def learning_rate(step: int, training: dict) -> float:
    """The learning rate of a step: `lr` times the factor of the last of `lr_drops` (step, factor)
    that is passed (not times the earlier factors), and, where there is a `poly_power`, times
    (1 - step / steps) to that power."""
    factors = [factor for first, factor in training.get("lr_drops", ()) if step >= first]
    lr = training["lr"] * (factors[-1] if factors else 1.0)
    if power := training.get("poly_power"):
        lr *= (1 - step / training["steps"]) ** power
    return lr


def make_optimizer(model, training: dict):
    """The optimiser that `training` names, with those of its settings that `training` has."""
    kind, options = OPTIMIZERS[training["optimizer"]]
    given = {name: training[name] for name in ("lr", *options) if name in training}
    fused = {} if kind is torch.optim.RMSprop else dict(fused=True)  # RMSprop has no fused form
    return kind(model.parameters(), **given, **fused)


# Deprecated, but what torch recommends in its place is private.
warnings.filterwarnings("ignore", r"torch\.distributed\.nn\.functional", FutureWarning)


class GlooBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all CPU processes (nn.SyncBatchNorm needs GPUs): each process
    normalises the whole batch and keeps its own rows."""

    def forward(self, x):
        first, whole = 0, x
        if self.training:
            first, whole = dist.get_rank() * len(x), torch.cat(dist_nn.all_gather(x))
            self.num_batches_tracked += 1
        out = F.batch_norm(whole, self.running_mean, self.running_var, self.weight, self.bias,
                           self.training, self.momentum, self.eps)
        return out[first : first + len(x)]


def distribute(model, device):
    """Wrap the model in DistributedDataParallel, with batch norm over the global batch."""
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.__class__ = GlooBatchNorm
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.broadcast_buffers = False  # they are equal already: batch norm's, and GECO's average
    return wrapped


def compiled(loss_of):
    """torch.compile with eager mode's random numbers: a run with it is the same as one without."""
    return torch.compile(loss_of, options={"fallback_random": True})


def lacks_compiler(device) -> str | None:
    """Say what torch.compile needs that this machine lacks; None if it lacks nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's header files (python3-dev) are not installed"
    name = os.environ.get("CC", "gcc") if device.type == "cuda" else os.environ.get("CXX", "g++")
    return None if shutil.which(name) else f"no compiler ({name}) was found"


class Recorded:
    """The loss of a batch and its gradients as one CUDA graph: the kernels of a step are started
    together instead of one after the other by Python. All batches must have the shape of this one.

    A call returns what the model would, and leaves the gradients in the parameters, from where they
    must not be taken (zero_grad). Both are overwritten by the next call.
    (torch.cuda.make_graphed_callables would record the backward pass under autocast, and have
    Python handle every parameter at every step.)
    """

    def __init__(self, model, image, label, autocast):
        self.image, self.label = image.clone(), label.clone()
        buffers = [*model.buffers()]
        before = [buffer.clone() for buffer in buffers]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng([image.device]), torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their kernels and allocate what they need
                self._run(model, autocast)
            self.graph = torch.cuda.CUDAGraph()
            model.zero_grad()  # their memory is for the graph
            with torch.cuda.graph(self.graph, stream=stream):
                self.result = self._run(model, autocast)
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)

    def _run(self, model, autocast):
        model.zero_grad()  # so that gradients are written anew, not added to
        with autocast:
            loss, terms = model(self.image, self.label)
        loss.backward()
        return loss.detach(), terms

    def __call__(self, image, label):
        self.image.copy_(image)
        self.label.copy_(label)
        self.graph.replay()
        return self.result
