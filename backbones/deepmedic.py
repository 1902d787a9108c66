"""DeepMedic (Kamnitsas et al. 2017), the SSN paper's network for volumes.

Three pathways process the volume at 1/1, 1/3 and 1/5 of its resolution, which combines fine detail
with wide context. Their outputs are upsampled and concatenated, and 1^3 convolutions follow. A
pathway has eight 3^3 convolutions without padding, so at scale s it loses 8 s voxels on each side.
An input of side o + 2 * margin, margin = 8 * 5, gives features of side o: 110 -> 30, 140 -> 60.

Differences from the SSN paper's experiment with BraTS, which models.RECIPES otherwise follows
  1. The coarse pathways average over 3^3 and 5^3 voxels; the authors take every third or fifth
     voxel. Beyond the volume, the image is reflected; theirs repeats its border.
  2. As in theirs, a batch has 10 patches, of 10 volumes. Because reading is slow, they read 50
     volumes at a time and use each in 20 batches; here all volumes are in memory and take turns.
  3. Augmentation turns the axial plane by quarter turns like theirs and also mirrors it (their flip
     is of both axes, which is a half turn). It deforms neither the volume nor the histogram.
  4. Air and voxels beyond the volume have no loss here, whereas the authors' net learns that they
     are background. Samples are arbitrary there, and analysis/predict.py masks them.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import IGNORE, center_crop, dropout, reflect_index, reflect_pad, uniform

TILE = 60  # voxels per side of a tile at test time, which sets the memory but not the result


@dataclass(frozen=True)
class DeepMedicConfig:
    """Defaults are the SSN paper's BraTS model, as its published code has it."""

    pathway: tuple[int, ...] = (30, 30, 40, 40, 40, 40, 50, 50)  # widths of the layers of a pathway
    scales: tuple[int, ...] = (1, 3, 5)  # one pathway per scale, on the volume at 1/scale
    hidden: tuple[int, ...] = (250, 250, 50)  # widths of the 1^3 layers that join the pathways
    dropout: float = 0.5  # probability, in these layers except the first
    patch: int = 30  # side of the label patch in training, a multiple of every scale


class DeepMedic(nn.Module):
    """Volume (B, C, D, H, W) with sides o + 2 * margin -> features (B, out_channels, *o), where o
    is a multiple of every scale.

    If `num_classes` is given, the last layer returns logits instead of features; this is the
    deterministic network.
    """

    QUICK = dict(pathway=(8, 8, 12, 16), scales=(1, 3), hidden=(32, 16), patch=18)  # small

    def __init__(self, in_channels: int, config: DeepMedicConfig = DeepMedicConfig(),
                 num_classes: int | None = None):
        super().__init__()
        self.config, self.num_classes, c = config, num_classes, config
        self.multiple = math.lcm(*c.scales)
        self.margin = len(c.pathway) * max(c.scales)
        if c.patch < 1 or c.patch % self.multiple:
            raise ValueError(f"deepmedic: patch={c.patch} is no multiple of {self.multiple}, that "
                             "is, of every scale")
        self.pathways, self.join = nn.ModuleList(), nn.Sequential()
        for _ in c.scales:
            first = nn.Conv3d(in_channels, c.pathway[0], 3, bias=False)
            others = [Layer(a, b, 3) for a, b in zip(c.pathway, c.pathway[1:])]
            self.pathways.append(nn.Sequential(first, *others))
        widths = [len(c.scales) * c.pathway[-1], *c.hidden[:-1], num_classes or c.hidden[-1]]
        for before, after in zip(widths, widths[1:]):
            self.join.append(Layer(before, after, 1, c.dropout if len(self.join) else 0.0))
        self.out_channels = widths[-1]

    def forward(self, volume: Tensor) -> Tensor:
        c = self.config
        size = [side - 2 * self.margin for side in volume.shape[2:]]
        views = []
        for scale, pathway in zip(c.scales, self.pathways):
            view = center_crop(volume, [side + 2 * scale * len(c.pathway) for side in size])
            view = pathway(F.avg_pool3d(view, scale) if scale > 1 else view)
            views.append(F.interpolate(view, scale_factor=scale) if scale > 1 else view)
        x = self.join(torch.cat(views, 1))
        return F.relu(x) if self.num_classes is None else x

    def stitch(self, volume: Tensor, head, tile: int = TILE) -> list[Tensor]:
        """Apply the network and then `head` (features -> list of maps) to a whole volume
        (B, C, *S), tile by tile. Tiles start at multiples of every scale, so the maps (B, ., *S) do
        not depend on the tile's size.
        """
        size, tile, whole = volume.shape[2:], tile - tile % self.multiple, None
        padded = [side + -side % self.multiple for side in size]
        volume = reflect_pad(volume, [(self.margin, self.margin + p - side)
                                      for p, side in zip(padded, size)])
        for corner in itertools.product(*[range(0, p, tile) for p in padded]):
            # slices end with the volume, so the last tiles may be smaller
            window = [slice(first, first + tile + 2 * self.margin) for first in corner]
            maps = head(self(volume[(..., *window)]))
            if whole is None:
                whole = [m.new_empty(*m.shape[:2], *padded) for m in maps]
            for target, m in zip(whole, maps):
                target[(..., *(slice(first, first + tile) for first in corner))] = m
        return [m[(..., *map(slice, size))] for m in whole]

    def random_patches(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """One training patch per case, centred on its `random_voxel`: (images, labels).

        Labels are (B, patch, patch, patch); images are larger by `margin` on each side, which the
        network loses. Beyond the volume, the image is reflected and the label is 255.
        """
        side, patches = self.config.patch, []
        inner = torch.arange(side, device=label.device)
        outer = torch.arange(-self.margin, side + self.margin, device=label.device)
        for x, y, random in zip(image, label, uniform((len(label), 2), image)):
            center = random_voxel(y, random)
            corner = [position - side // 2 for position in center]
            padded = F.pad(y, [side // 2] * 6, value=IGNORE)  # so the patch starts at `center`
            patches.append((cut(x, corner, outer), cut(padded, center, inner)))
        images, labels = zip(*patches)
        return torch.stack(images), torch.stack(labels)


def random_voxel(label: Tensor, random: Tensor) -> list[Tensor]:
    """Position of a random voxel of label (D, H, W): in a lesion half of the time, else in the
    background. Ignored voxels (255, such as the air around a brain) are never chosen.

    random (2,), in [0, 1), decides between lesion and background, and on the voxel. The position
    stays on the device, so the CPU does not wait for a GPU.
    """
    lesion, background = (label > 0) & (label != IGNORE), label == 0
    marked = torch.where(background.any(), random[0] < 0.5, True) & lesion.any()
    wanted = torch.where(marked, lesion, background).flatten()
    number = wanted.cumsum(0)  # 1 at the first wanted voxel, 2 from the second on, ...
    target = (random[1] * number[-1]).long() + 1
    index = torch.searchsorted(number, target.minimum(number[-1]))
    _, height, width = label.shape
    return [index // (height * width), index // width % height, index % width]


def cut(volume: Tensor, corner: list[Tensor], offsets: Tensor) -> Tensor:
    """volume (..., D, H, W) at corner + offsets (L,) of each axis, reflected at its faces."""
    for axis, first in zip((-3, -2, -1), corner):
        index = reflect_index(first + offsets, volume.shape[axis])
        volume = volume.index_select(axis, index)
    return volume


class Layer(nn.Module):
    """Batch norm, PReLU, dropout and an unpadded convolution; residual if the widths agree."""

    def __init__(self, before: int, after: int, kernel: int, p: float = 0.0):
        super().__init__()
        self.norm, self.activation = nn.BatchNorm3d(before), nn.PReLU()
        self.conv = nn.Conv3d(before, after, kernel, bias=False)
        self.p, self.shortcut = p, before == after

    def forward(self, x):
        inner = self.activation(self.norm(x))
        if self.training and self.p:
            inner = dropout(inner, self.p)
        out = self.conv(inner)
        return out + center_crop(x, out.shape[2:]) if self.shortcut else out
