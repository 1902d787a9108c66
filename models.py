"""The ten models by name; build, save and load them."""

import dataclasses
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import nn

from baselines import DeterministicUNet, DropoutUNet, EnsembleUNet, MHeads
from common import UserError
from hpunet import HPUNet
from phiseg import PHiSeg
from prob_unet import Image2ImageVAE, ProbUNet
from sources.files import write_atomically
from ssn import SSN
from vae_unet import VAEUNet

CHUNK = 2**28  # logits of samples at once, 1 GiB

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


def build(name: str, fields: dict) -> nn.Module:
    """The model `name` with these fields of its config, the others at their defaults."""
    if name not in MODELS:
        raise UserError(f"--model {name}: choose one of {', '.join(MODELS)}")
    Model = MODELS[name]
    known = {f.name for f in dataclasses.fields(Model.Config)}
    if unknown := sorted(fields.keys() - known):
        raise UserError(f"--model-args {unknown[0]}: {name} knows {', '.join(sorted(known))}")
    try:
        return Model(Model.Config(**fields))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be built: {error}") from error


def save(path, name, model, optimizer, step, best) -> None:
    """One checkpoint, whole or not at all."""
    content = dict(model=name, config=dataclasses.asdict(model.config), state=model.state_dict(),
                   optimizer=optimizer.state_dict(), step=step, best=best)
    try:
        write_atomically(path, lambda temporary: torch.save(content, temporary))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else str(error)
        if not isinstance(error, OSError) and "write" not in reason:
            raise
        kept = "the checkpoint before it stands" if Path(path).exists() else "none was there before"
        raise UserError(f"cannot save {path} at step {step}: {reason.splitlines()[0]}; {kept}; "
                        "make room and --resume") from error


def load_checkpoint(path) -> dict:
    """What `save` wrote; nothing in the file is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["model"], content["config"], content["state"]
        return content
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train one with train.py") from None
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise UserError(f"{path}: not a checkpoint of train.py ({reason})") from error


def load(path, device="cpu") -> nn.Module:
    """The trained model of a checkpoint, in eval mode.

        model = train.load("runs/ssn-shapes-0/best.pt")
        samples = model.sample(image, 16)                # (16, B, K, H, W) logits
    """
    content = load_checkpoint(path)
    model = build(content["model"], content["config"])
    try:
        model.load_state_dict(content["state"])
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit a {content['model']} of its config: "
                        f"{str(error).splitlines()[1].strip()[:100]}") from error
    return place(model, device).eval()


def place(model, device) -> nn.Module:
    """To the device; 2D convolutions run faster with the channels innermost in memory."""
    if model.config.dims == 2:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def sample_batches(model, split, n, seed=0, rank=0, world=1):
    """Yield (some cases of `split` as a Split, chunks of n samples of each); the whole split, or
    under torchrun every world-th batch.

    As many cases at once as keep their logits under 128 MiB, at most 32. The chunks are those of
    `sample_chunks`, to be used up before the next batch. Draws depend on (seed, batch) alone.
    """
    batch = max(1, min(32, 2**25 // (n * split.num_classes * split.labels[0, 0].numel())))
    for start in range(rank * batch, len(split), world * batch):
        part = split.subset(range(start, min(start + batch, len(split)))).all_maps()
        generator = torch.Generator(part.images.device).manual_seed(seed * 1_000_003 + start)
        torch.manual_seed(seed * 1_000_003 + start)  # for log_likelihood, which takes no generator
        yield part, sample_chunks(model, part.images, n, split.num_classes, generator)


def sample_chunks(model, image, n, num_classes, generator, **options):
    """Yield n samples of images (B, C, *S) as float32 logits (m, B, K, *S): all at once, or, of
    large volumes, as many at a time as CHUNK allows."""
    cycle = getattr(model, "count", 1)  # baselines whose samples are their outputs in turn
    chunk = max(1, CHUNK // (num_classes * image[:, 0].numel() * cycle)) * cycle
    for start in range(0, n, chunk):
        yield model.sample(image, min(chunk, n - start), generator, **options).float()


def labels_of(scores, axis: int):
    """The class of the highest score, uint8. (argmax is 30 times slower on a CPU.)"""
    return scores.max(axis).indices.byte()


def read_config(folder: Path) -> dict:
    """The run's config.json; UserError where it is not one of train.py's."""
    try:
        config = json.loads((folder / "config.json").read_text())
        settings = dict(path=None, data_args={}, image_size=None) | config["settings"]
        return config | {"settings": settings | {"data": settings["data"]}}
    except (OSError, ValueError, KeyError, TypeError):
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
