"""What several test files share: seeded tensors, small batches, a tiny model of every kind."""

import multiprocessing

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image

import models

LEVELS = dict(channels=(4, 6, 8), convs=1)  # three resolution levels: sizes are padded to 4
TINY = {
    "ssn": LEVELS | dict(rank=2, mc_samples=4),
    "prob_unet": LEVELS | dict(latent_dim=3),
    "phiseg": LEVELS | dict(latent_levels=2),
    "hpunet": LEVELS | dict(blocks=1, latents=(2, 1), objective="elbo", top_k=1),
    "vae_unet": LEVELS,
    "image2image_vae": LEVELS | dict(latent_dim=3),
    "unet": LEVELS,
    "dropout_unet": LEVELS | dict(dropout_blocks=1),
    "ensemble": LEVELS | dict(members=3),
    "m_heads": LEVELS | dict(heads=3),
}
DEEPMEDIC = dict(deepmedic=dict(pathway=(4, 4), scales=(1, 3), hidden=(6, 5), patch=6))
SWIN = dict(backbone="swin", width=4, depths=(2, 2, 1), heads=(1, 2, 4), patch=2, window=3)


def seeded(*shape, seed=0, dtype=torch.float32):
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(count=2, size=(8, 12), classes=3, channels=2, seed=0, ignored=0.1):
    """Images (count, channels, *size) and labels, a share of whose pixels is ignored (255)."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (count, *size), generator=generator)
    label[torch.rand(label.shape, generator=generator) < ignored] = 255
    return seeded(count, channels, *size, seed=seed), label


def tiny(name, seed=0, **fields):
    """The model `name` with two input channels, three classes and hardly any weights."""
    fields = dict(in_channels=2, num_classes=3) | TINY[name] | fields
    torch.manual_seed(seed)
    return models.build(name, fields)


def generator(seed=0):
    """A CPU generator of its own."""
    return torch.Generator().manual_seed(seed)


def count_parameters(model):
    """How many numbers an optimiser changes."""
    return sum(p.numel() for p in model.parameters())


def undraw(patch):
    """Let every picture be one grey pixel: drawing takes most of the time of a small run."""
    patch.setattr(Figure, "savefig",
                  lambda figure, path, **_: Image.new("L", (1, 1)).save(path, "PNG"))


# New processes, forked from one that has imported what takes seconds to import.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["pytest", "train", "torch._dynamo"])


def run_two(function, folder, group=True):
    """Call function(rank, folder) in two processes that form a `group` on the CPU, or not yet."""
    processes = [FORKSERVER.Process(target=_member, args=(function, rank, folder, group))
                 for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()  # it may wait for another that has failed
    assert [process.exitcode for process in processes] == [0, 0]


def _member(function, rank, folder, group):
    torch.set_num_threads(1)
    if group:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                world_size=2)
    function(rank, folder)
    if group:
        dist.destroy_process_group()
