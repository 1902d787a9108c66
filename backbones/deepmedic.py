"""DeepMedic (Kamnitsas et al. 2017), the SSN paper's network for volumes.

    pathway at 1/1   \\
    pathway at 1/3    >  upsampled, concatenated -> 1^3 layers -> features
    pathway at 1/5   /

Each pathway is eight unpadded 3^3 convolutions, so at scale s it loses 8 s voxels on each side. An
input of side o + 2 * margin, margin = 8 * 5, gives features of side o: 110 -> 30, 140 -> 60.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import BATCH_NORM, IGNORE, center_crop, reflect_index, reflect_pad, valid_label

TILE = 60  # voxels a side computed at once at test time; bounds memory and changes nothing else


@dataclass(frozen=True)
class DeepMedicConfig:
    """Defaults are the SSN paper's BraTS model."""

    pathway: tuple[int, ...] = (30, 30, 40, 40, 40, 40, 50, 50)  # widths of a pathway's layers
    scales: tuple[int, ...] = (1, 3, 5)  # a pathway takes the volume at 1/scale
    hidden: tuple[int, ...] = (250, 250)  # widths of the 1^3 layers that join the pathways
    patch: int = 30  # side of the label patch in training, a multiple of every scale


class DeepMedic(nn.Module):
    """Volume (B, C, D, H, W), sides o + 2 * margin -> features (B, out_channels, *o).

    o must be a multiple of every scale.
    """

    def __init__(self, in_channels: int, config: DeepMedicConfig = DeepMedicConfig()):
        super().__init__()
        self.config = c = config
        self.multiple = math.lcm(*c.scales)
        self.margin = len(c.pathway) * max(c.scales)
        if c.patch < 1 or c.patch % self.multiple:
            raise ValueError(f"deepmedic: patch={c.patch} is no multiple of {self.multiple}, the "
                             "least common multiple of the scales")
        self.pathways = nn.ModuleList(build_pathway(in_channels, c.pathway) for _ in c.scales)
        self.join = nn.Sequential()
        width = len(c.scales) * c.pathway[-1]
        for after in c.hidden:
            self.join.extend([*activation(width), nn.Dropout(0.5), nn.Conv3d(width, after, 1)])
            width = after
        self.join.extend(activation(width))
        self.out_channels = width

    def forward(self, volume: Tensor) -> Tensor:
        c = self.config
        size = [side - 2 * self.margin for side in volume.shape[2:]]
        views = []
        for scale, pathway in zip(c.scales, self.pathways):
            view = center_crop(volume, [side + 2 * scale * len(c.pathway) for side in size])
            view = pathway(F.avg_pool3d(view, scale) if scale > 1 else view)
            views.append(F.interpolate(view, scale_factor=scale) if scale > 1 else view)
        return self.join(torch.cat(views, 1))

    def stitch(self, volume: Tensor, head, tile: int = TILE) -> list[Tensor]:
        """`head` (features -> list of maps) of a whole volume (B, C, *S), computed tile by tile.

        Tiles start at multiples of every scale, so their side does not change the result.
        """
        size, tile = volume.shape[2:], tile - tile % self.multiple
        extra = [-s % self.multiple for s in size]
        volume = reflect_pad(volume, [(self.margin, self.margin + e) for e in extra])
        padded = [s + e for s, e in zip(size, extra)]
        whole = None
        for corner in torch.cartesian_prod(*[torch.arange(0, s, tile) for s in padded]).tolist():
            part = volume
            for axis, (start, side) in enumerate(zip(corner, padded), 2):
                stop = min(start + tile, side)
                part = part.narrow(axis, start, stop - start + 2 * self.margin)
            maps = head(self(part))
            if whole is None:
                whole = [m.new_empty(*m.shape[:2], *padded) for m in maps]
            for target, m in zip(whole, maps):
                d, h, w = (slice(a, a + side) for a, side in zip(corner, m.shape[2:]))
                target[:, :, d, h, w] = m
        return [w[:, :, : size[0], : size[1], : size[2]] for w in whole]

    def random_patch(self, image, label, mask, side):
        """One window of side^3 labels a case, its image wider by the margin the network eats.

        Centred on a labelled voxel half of the time, anywhere otherwise. What lies beyond the
        volume: image by reflection, label 255, mask false.
        """
        label = valid_label(label, mask)
        images, labels, masks = [], [], []
        for case, (x, y) in enumerate(zip(image, label)):
            center = torch.stack([torch.randint(s, ()) for s in y.shape])
            labelled = torch.nonzero((y > 0) & (y != IGNORE))
            if len(labelled) and torch.rand(()) < 0.5:
                center = labelled[torch.randint(len(labelled), ())]
            start = [min(max(middle - side // 2, 0), max(size - side, 0))
                     for middle, size in zip(center.tolist(), y.shape)]
            for axis, a in enumerate(start, 1):
                index = torch.arange(a - self.margin, a + side + self.margin, device=x.device)
                x = x.index_select(axis, reflect_index(index, x.shape[axis]))
            images.append(x)
            window = tuple(slice(a, a + side) for a in start)
            missing = [p for s in y.shape[::-1] for p in (0, max(side - s, 0))]
            labels.append(F.pad(y[window], missing, value=IGNORE))
            if mask is not None:
                masks.append(F.pad(mask[case][window], missing, value=False))
        return torch.stack(images), torch.stack(labels), torch.stack(masks) if masks else None


def build_pathway(in_channels: int, widths: tuple[int, ...]) -> nn.Sequential:
    """Unpadded 3^3 convolutions, each but the first after batch norm and ReLU."""
    layers = [nn.Conv3d(in_channels, widths[0], 3)]
    for before, after in zip(widths, widths[1:]):
        layers += [*activation(before), nn.Conv3d(before, after, 3)]
    return nn.Sequential(*layers)


def activation(width: int) -> list[nn.Module]:
    """What stands before a convolution."""
    return [BATCH_NORM[3](width), nn.ReLU(inplace=True)]
