"""DeepMedic."""

import math

import torch
import torch.nn.functional as F
from torch import nn


from common import BATCH_NORM, IGNORE, center_crop, reflect_index, reflect_pad, valid_label


class DeepMedic(nn.Module):
    """Three views of a volume at 1/1, 1/3 and 1/5, side by side (Kamnitsas et al. 2017).

    Each pathway is eight unpadded 3^3 convolutions, pre-activated: at scale s they eat 8 s voxels
    on each side, so an input of side o + 2 * margin, margin = 8 * 5, gives features of side o:
    110 -> 30, 140 -> 60. o is a multiple of every scale.
    """

    def __init__(self, c):
        super().__init__()
        self.scales, self.multiple = c.scales, math.lcm(*c.scales)
        self.layers = len(c.pathway)
        self.margin = self.layers * max(c.scales)
        if c.dims != 3 or c.patch % self.multiple:
            raise ValueError(f"deepmedic with dims={c.dims}, patch={c.patch}: dims is 3 and patch "
                             f"a multiple of {self.multiple}, the scales' common multiple")

        def layer(i, before, after, kernel):
            activate = [] if i == 0 else [BATCH_NORM[3](before), nn.ReLU(inplace=True)]
            return activate + [nn.Conv3d(before, after, kernel)]

        widths = list(zip((c.in_channels, *c.pathway), c.pathway))
        self.pathways = nn.ModuleList(
            nn.Sequential(*[m for i, w in enumerate(widths) for m in layer(i, *w, 3)])
            for _ in c.scales)
        joined = len(c.scales) * c.pathway[-1]
        self.join = nn.Sequential()
        for before, after in zip((joined, *c.hidden), c.hidden):
            self.join.extend([*layer(1, before, after, 1)[:2], nn.Dropout(0.5),
                              nn.Conv3d(before, after, 1)])
        self.join.extend([BATCH_NORM[3](c.hidden[-1]), nn.ReLU(inplace=True)])
        self.out_channels = c.hidden[-1]

    def forward(self, volume):
        """(B, C, D, H, W), every side o + 2 * margin -> features (B, F, *o)."""
        size = [side - 2 * self.margin for side in volume.shape[2:]]
        views = []
        for scale, pathway in zip(self.scales, self.pathways):
            view = center_crop(volume, [o + 2 * scale * self.layers for o in size])
            view = pathway(F.avg_pool3d(view, scale) if scale > 1 else view)
            views.append(F.interpolate(view, scale_factor=scale) if scale > 1 else view)
        return self.join(torch.cat(views, 1))

    def stitch(self, volume, tile, head):
        """`head` of the features of a whole volume (B, C, *S), computed tile by tile.

        Tiles start at multiples of every scale, so the result is the same whatever side they have.
        """
        size, tile = volume.shape[2:], tile - tile % self.multiple
        up = [-s % self.multiple for s in size]
        volume = reflect_pad(volume, [(self.margin, self.margin + u) for u in up])
        padded = [s + u for s, u in zip(size, up)]
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
                place = [slice(a, a + b) for a, b in zip(corner, m.shape[2:])]
                target[:, :, place[0], place[1], place[2]] = m
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


TILE = 60  # voxels a side that DeepMedic computes at once at test time: bounds memory, else nothing
