"""The ten models by name; build, save and load them, and draw samples for a whole split.

    model = models.load("runs/ssn-shapes-0")         # its best.pt, in eval mode
    samples = model.sample(image, 16)                # (16, B, K, H, W) logits
"""

import dataclasses
import hashlib
import io
import json
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
from sources.files import write_atomically
from ssn import SSN
from vae_unet import VAEUNet

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
LARGEST = 10**9  # parameters; the largest default model, the ensemble, has 1.9e8
MOST_TENSORS = 20_000  # of parameters; the ensemble has 896


def build(name: str, fields: dict, device="cpu") -> nn.Module:
    """The model `name` with these fields of its config, the others at their defaults.

    Built on the device "meta" first, which takes no memory. Raises UserError where the fields are
    not the model's, do not fit, or make a model too large to be meant.
    """
    if name not in MODELS:
        raise UserError(f"--model {name}: choose one of {', '.join(MODELS)}")
    Model = MODELS[name]
    known = {f.name for f in dataclasses.fields(Model.Config)}
    if unknown := sorted(fields.keys() - known):
        raise UserError(f"--model-args {unknown[0]}: {name} knows {', '.join(sorted(known))}")
    count = tensors = 0

    def limit(module, parameter_name, parameter):
        nonlocal count, tensors
        count, tensors = count + (0 if parameter is None else parameter.numel()), tensors + 1
        if count > LARGEST or tensors > MOST_TENSORS:
            raise ValueError(f"more than {LARGEST:,} parameters or {MOST_TENSORS:,} tensors of them")

    hook = register_module_parameter_registration_hook(limit)
    try:
        config = Model.Config(**fields)
        with torch.device("meta"):
            model = Model(config)
    except Exception as error:  # constructors given nonsense raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name} cannot be built: {reason}") from error
    finally:
        hook.remove()
    return model if device == "meta" else Model(config)


# -------------------------------------------------------------------------------- checkpoints

DIGEST = b"sha256:"  # and 64 hexadecimal digits: a checkpoint's zip comment
MOMENTS = {torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
           torch.optim.SGD: ("momentum_buffer",),
           torch.optim.RMSprop: ("step", "square_avg", "momentum_buffer")}


def save(path, name, model, optimizer, step, best) -> None:
    """One checkpoint, whole or not at all; OSError where there is no room for it.

    A file that torch.load reads. Its zip comment is the SHA-256 of all bytes before the comment.
    """
    content = dict(model=name, config=dataclasses.asdict(model.config), state=model.state_dict(),
                   optimizer=optimizer.state_dict(), step=step, best=best)
    buffer = io.BytesIO()  # torch.save to a full disk raises many kinds of errors
    torch.save(content, buffer)
    buffer.seek(-2, io.SEEK_END)  # a zip file ends with the length of its comment and the comment
    buffer.write((len(DIGEST) + 64).to_bytes(2, "little"))
    buffer.write(DIGEST + hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(buffer.getbuffer()))


def load_checkpoint(path) -> dict:
    """What `save` wrote, checked against its digest; nothing in the file is executed.

    Checkpoints from before there were digests have none to check.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train one with train.py")
    raw = Path(path).read_bytes()
    body, mark, digest = raw[:-64 - len(DIGEST)], raw[-64 - len(DIGEST):-64], raw[-64:]
    if mark == DIGEST and hashlib.sha256(body).hexdigest().encode() != digest:
        raise UserError(f"{path}: damaged, its bytes are not those that were saved; use another "
                        "checkpoint, or train again")
    try:
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        for key, kind in dict(model=str, config=dict, state=dict, optimizer=dict, step=int,
                              best=float).items():
            if not isinstance(content[key], kind):
                raise TypeError(f"{key} is a {type(content[key]).__name__}")
        return content
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise UserError(f"{path}: not a checkpoint of train.py ({reason})") from error


def load(path, device="cpu") -> nn.Module:
    """The trained model of a run's folder (its best.pt) or of a checkpoint file, in eval mode."""
    path = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    content = load_checkpoint(path)
    check_state(path, build(content["model"], content["config"], "meta"), content["state"])
    model = build(content["model"], content["config"])
    model.load_state_dict(content["state"])
    return place(model, device).eval()


def check_state(path, model, state: dict) -> None:
    """UserError unless `state` has the model's names, with their shapes and dtypes."""
    expected = model.state_dict()
    for name in [*expected, *state]:
        if name not in expected or not same_kind(state.get(name), expected[name]):
            raise UserError(f"{path}: its weights do not fit the model of its config; the first "
                            f"that differs is {str(name)[:80]}")


def same_kind(found, expected: torch.Tensor) -> bool:
    """Whether `found` is an ordinary tensor of the shape and dtype of `expected`."""
    return (isinstance(found, torch.Tensor) and found.layout == torch.strided
            and found.shape == expected.shape and found.dtype == expected.dtype)


def restore_optimizer(path, optimizer, saved: dict) -> None:
    """Load the moments of `saved`; UserError unless they fit the optimiser's parameters.

    Options such as the learning rate come from the run's settings, not from the file.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for name in MOMENTS[type(optimizer)]
             if name != "momentum_buffer" or optimizer.defaults["momentum"]]
    try:
        for index, values in saved["state"].items():
            for name in names:
                expected = torch.tensor(0.0) if name == "step" else parameters[index]
                if not same_kind(values[name], expected):
                    raise ValueError(f"{name} has another shape or dtype than its parameter")
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: its optimiser state does not fit the model ({error}); begin "
                        "another run with --out") from error


# ------------------------------------------------------------------------------- use of a model


def place(model, device) -> nn.Module:
    """To the device; 2D convolutions run faster with the channels innermost in memory."""
    if model.config.dims == 2:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def sample_batches(model, split, n, seed=0, rank=0, world=1):
    """Yield (some cases of `split` as a Split, n samples of each: logits (n, B, K, *S)).

    All cases; under torchrun, every world-th batch. Draws depend on (seed, batch) alone. As many
    cases at once as keep the logits under 128 MiB.
    """
    size = max(1, min(32, 2**25 // (n * split.num_classes * split.labels[0, 0].numel())))
    for start in range(rank * size, len(split), world * size):
        batch = split.subset(range(start, min(start + size, len(split)))).all_maps()
        generator = torch.Generator(batch.images.device).manual_seed(seed * 1_000_003 + start)
        torch.manual_seed(seed * 1_000_003 + start)  # for log_likelihood, which takes no generator
        yield batch, model.sample(batch.images, n, generator).float()


def labels_of(scores, axis: int):
    """The class of the highest score, uint8. (argmax is 30 times slower on a CPU.)"""
    return scores.max(axis).indices.byte()


# What decides a run's result, in config.json's "settings": (types, default).
SETTINGS = dict(
    model=(str, "ssn"), data=(str, "shapes"), path=(str | None, None), steps=(int | None, None),
    batch_size=(int | None, None), lr=(float | int | None, None), lr_drops=(list | None, None),
    seed=(int, 0), precision=(str, "fp32"), image_size=(int | None, None), annotators=(str, "all"),
    augment=(bool, True), quick=(bool, False), model_args=(dict, {}), data_args=(dict, {}))


def read_config(folder: Path) -> dict:
    """The run's config.json, with every setting; UserError unless train.py could have written it."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config["settings"] = {"lr_drops": None} | config["settings"]  # older runs have none
        for name, (kinds, _) in SETTINGS.items():
            if not isinstance(config["settings"][name], kinds):
                raise TypeError(name)
        return config
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder}: no run there (config.json is missing or broken); give a folder "
                        "that train.py wrote") from None


class GlooBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all CPU processes (nn.SyncBatchNorm runs on GPUs only)."""

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps)
        axes = [0, *range(2, x.dim())]
        moments = torch.stack([x.mean(axes), x.square().mean(axes)])
        mean, square = dist_nn.all_reduce(moments) / dist.get_world_size()
        var = square - mean.square()
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        shape = (-1, *[1] * (x.dim() - 2))
        return x * scale.view(shape) + (self.bias - mean * scale).view(shape)


def distribute(model, device):
    """DistributedDataParallel whose batch norms see the global batch."""
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.__class__ = GlooBatchNorm
    return nn.parallel.DistributedDataParallel(model)
