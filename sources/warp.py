"""Augmentation: for every row one affine map and one smooth shift, in one resampling, and a change
of colour."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import IGNORE, reflect_index
from sources.base import spline
from sources.files import DataError


@dataclass(frozen=True)
class Augmentation:
    """What may be done to an image and its label map, drawn anew for every row of a batch."""

    flip: tuple[int, ...] = ()  # axes (-1 is left-right) mirrored with probability 1/2
    quarter_turns: bool = False  # in the last two axes; half turns only, where these differ in size
    rotation: float = 0.0  # degrees, uniform in +-rotation, in every plane
    shear: float = 0.0  # off-diagonal terms of the map, uniform in +-shear
    scale: float = 0.0  # magnification, log-uniform between 1/(1 + scale) and 1 + scale
    translation: float = 0.0  # pixels, uniform in +-translation, along every axis
    elastic: float = 0.0  # pixels, standard deviation of the control points' shifts
    elastic_spacing: float = 24.0  # pixels between control points of the cubic B-spline
    # Of RGB pictures in 0..1. Brightness changes by up to +-color and the hue by up to +-color
    # radians; contrast and saturation are multiplied by log-uniform factors as `scale` is.
    color: float = 0.0

    @property
    def resamples(self) -> bool:
        """Whether pixels land between pixels; if not, they are only moved, bit for bit."""
        return any((self.rotation, self.shear, self.scale, self.translation, self.elastic))


class Warp(NamedTuple):
    """Output pixel o of row b shows the source at  centre + matrix (start + o - centre) + shift."""

    matrix: Tensor  # (B, d, d)
    start: Tensor  # (B, d) corner of the output window
    knots: Tensor | None  # (B, d, *k) control points of the shift, in pixels
    color: Tensor | None = None  # (B, 4) brightness, contrast, saturation, hue: see `recolor`


def draw_warp(augmentation: Augmentation, count: int, shape: Sequence[int], size: Sequence[int],
              generator: torch.Generator) -> Warp:
    """Draws what `augmentation` does to `count` images of `shape`, seen in a window of `size`.
    Raises DataError where lines (1D) are to be turned or deformed."""
    dims = len(shape)
    # A volume of few, thick slices is moved less along and about them.
    thin = torch.ones(dims)
    if dims == 3:
        thin[0] = min(shape[0] / max(shape[1:]), 1)
    if dims == 1 and (augmentation.resamples or augmentation.quarter_turns):
        raise DataError("1D images cannot be turned or deformed: give Augmentation(flip=(-1,))")

    def uniform(bound: float, *more: int) -> Tensor:  # (count, *more) in +-bound
        return bound * (2 * torch.rand(count, *more, generator=generator) - 1)

    def whole(high: int) -> Tensor:  # (count,) in 0..high-1
        return torch.randint(high, (count,), generator=generator)

    def turn(cos: Tensor, sin: Tensor, i: int, j: int) -> Tensor:  # in the plane of axes i and j
        matrix = torch.eye(dims).repeat(count, 1, 1)
        matrix[:, i, i], matrix[:, j, j], matrix[:, i, j], matrix[:, j, i] = cos, cos, -sin, sin
        return matrix

    matrix = torch.eye(dims).repeat(count, 1, 1)
    for axis in augmentation.flip:
        matrix[:, axis, axis] = 1.0 - 2 * whole(2)
    if augmentation.quarter_turns:
        quarter = whole(4) if shape[-2] == shape[-1] else 2 * whole(2)
        circle = torch.tensor([0.0, 1.0, 0.0, -1.0])
        matrix = matrix @ turn(circle[(quarter + 1) % 4], circle[quarter], -2, -1)
    if augmentation.rotation:
        for i, j in itertools.combinations(range(dims), 2):
            angle = uniform(math.radians(augmentation.rotation)) * thin[i] * thin[j]
            matrix = matrix @ turn(angle.cos(), angle.sin(), i, j)
    if augmentation.shear:
        matrix = matrix @ (torch.eye(dims) + (1 - torch.eye(dims))
                           * uniform(augmentation.shear, dims, dims) * thin[:, None])
    if augmentation.scale:
        matrix = matrix * uniform(math.log1p(augmentation.scale)).exp()[:, None, None]

    start = torch.stack([whole(have - want + 1) if have > want else
                         torch.full((count,), -((want - have) // 2))
                         for have, want in zip(shape, size)], 1).float()
    if augmentation.translation:
        start = start + uniform(augmentation.translation, dims) * thin
    knots = None
    if augmentation.elastic:
        # A cubic spline over m intervals has m + 3 control points.
        counts = [max(round(want / augmentation.elastic_spacing), 1) + 3 for want in size]
        knots = augmentation.elastic * torch.randn(count, dims, *counts, generator=generator)
        knots = knots * thin.view(-1, *[1] * dims)
    color = None
    if augmentation.color:
        shift, factor = augmentation.color, math.log1p(augmentation.color)
        color = torch.stack([uniform(shift), uniform(factor).exp(), uniform(factor).exp(),
                             uniform(shift)], 1)
    return Warp(matrix, start, knots, color)


def apply_warp(images: Tensor, labels: Tensor, warp: Warp, size, resamples: bool):
    """Moves images (B, C, *S) and label maps (B, *S) through the warp, into a window of `size`.

    Images are interpolated linearly and reflected past their border; labels take the nearest
    pixel, and 255 past it. Where the warp has colours, the first three channels are an RGB picture.
    """
    shape, (count, channels) = images.shape[2:], images.shape[:2]

    def spread(values: Tensor, axis: int | None = None) -> Tensor:  # (B,) or (B, size[axis])
        return values.view(count, *[-1 if i == axis else 1 for i in range(len(size))])

    lines = [spread(torch.arange(want, device=images.device) + warp.start[:, i, None]
                    - (have - 1) / 2, i) for i, (have, want) in enumerate(zip(shape, size))]
    # Sums, not a matrix product, whose TF32 mode would move whole pixels between pixels.
    where = [sum(spread(warp.matrix[:, i, j]) * line for j, line in enumerate(lines))
             + (have - 1) / 2 for i, have in enumerate(shape)]  # d of (B, *size), source pixels
    if warp.knots is not None:
        where = [axis + shift for axis, shift in zip(where, spline(warp.knots, size).unbind(1))]

    flat, outside = 0, False
    for axis, have in zip(where, shape):
        index = axis.round().long()
        outside = outside | (index < 0) | (index >= have)
        flat = flat * have + reflect_index(index, have)
    flat = flat.flatten(1)  # (B, pixels of the output)
    labels = labels.flatten(1).gather(1, flat).view(count, *size).masked_fill(outside, IGNORE)
    if resamples:
        # align_corners counts -1..1 from the first pixel's centre to the last's, and mirrors there.
        grid = [2 * axis / max(have - 1, 1) - 1 for axis, have in zip(where, shape)]
        images = F.grid_sample(images, torch.stack(grid[::-1], -1), "bilinear",
                               padding_mode="reflection", align_corners=True)
    else:
        flat = flat[:, None].expand(-1, channels, -1)
        images = images.flatten(2).gather(2, flat).view(count, channels, *size)
    if warp.color is not None:
        images = torch.cat([recolor(images[:, :3], warp.color), images[:, 3:]], 1)
    return images, labels


def recolor(picture: Tensor, color: Tensor) -> Tensor:
    """Gives RGB (B, 3, H, W) new colours. color (B, 4): brightness (0 changes nothing), contrast
    about middle grey (1), saturation (1) and hue in radians (0; 2 pi / 3 makes red green).

    A colour is its grey value and what it differs from grey by; saturation scales the latter and
    hue turns it about the grey axis.
    """
    brightness, contrast, saturation, hue = color.T[:, :, None, None, None]  # (B, 1, 1, 1) each
    grey = picture.mean(1, keepdim=True)
    chroma = picture - grey
    across = (chroma.roll(1, 1) - chroma.roll(-1, 1)) / math.sqrt(3)  # chroma turned by 90 degrees
    chroma = saturation * (hue.cos() * chroma + hue.sin() * across)
    return contrast * (grey - 0.5 + chroma) + 0.5 + brightness
