"""Every data set: made ones whose distribution of label maps is known, and real ones from files.

    train, val = data.load("shapes", ("train", "val"))           # two `Split`s: tensors in memory
    stream = data.batches(train.to("cuda"), 12, seed=0, augmentation=data.AUGMENTATION["shapes"])
    image, label = next(stream)                                  # (B, C, *S) float32, (B, *S) int64

A `Split` is moved to the device whole. Batches are drawn, cropped and augmented there, so training
never waits for a worker or a copy. Batch number `step` is a pure function of (seed, step): a run
that stops at step s goes on exactly with `start=s`, and several processes see what one would see.

Shapes: N cases, B batch, C channels, K classes, A annotators, *S space. 255 means ignore.
"""

import functools
import itertools
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

IGNORE = 255
SPLITS = ("train", "val", "test")


class DataError(ValueError):
    """A mistake in a data file or in what was asked of it, told in one line."""


@dataclass
class Split:
    """Cases in memory, images and all their annotations, on one device."""

    images: Tensor  # (N, C, *S) float32
    labels: Tensor  # (N, A, *S) uint8, 255 = ignore
    weights: Tensor | None  # (N, A) float32, rows sum to 1: odds of each label map; None = uniform
    groups: list[str]  # patient, series or scene of each case: no split cuts through one
    num_classes: int
    names: list[str]  # key or file of each case
    # Instance ids (N, *S) int32, 0 = membrane, -1 = ignore. Where given, every batch maps the ids
    # anew to random classes 1..K-1; `labels` holds a few such maps, fixed, for evaluation.
    instances: Tensor | None = None
    exact: bool = False  # whether labels and weights are the whole distribution of label maps

    def __len__(self) -> int:
        return len(self.images)

    @property
    def odds(self) -> Tensor:
        """(N, A) float32, rows sum to 1: `weights`, or uniform over the readers that are there."""
        there = (self.labels != IGNORE).flatten(2).any(2)
        odds = there * (1.0 if self.weights is None else self.weights)
        return odds / odds.sum(1, keepdim=True)

    def _map(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {key: change(value) for key, value in vars(self).items() if torch.is_tensor(value)}

    def to(self, device) -> "Split":
        return replace(self, **self._map(lambda tensor: tensor.to(device)))

    def subset(self, indices: Sequence[int]) -> "Split":
        rows = torch.as_tensor(indices, dtype=torch.long, device=self.images.device)
        groups, names = ([kept[i] for i in indices] for kept in (self.groups, self.names))
        return replace(self, **self._map(lambda tensor: tensor[rows]), groups=groups, names=names)


def load(name: str, split: str | Sequence[str] = "train", path=None, **options):
    """The `split` ("train", "val", "test" or "all") of the data set `name`, as a `Split`.

    A sequence of splits gives a list and reads the source once. `path` is the file or folder of a
    real set; without it, datasets/<name> in the working folder. `DATASETS` lists names and options.
    Raises DataError for anything the user can mend.
    """
    source = DATASETS[_known("data set", name, DATASETS)]
    wanted = [_known("split", part, (*SPLITS, "all"))
              for part in ([split] if isinstance(split, str) else split)]
    values = {key: default for key, (default, _) in source.options.items()}
    for key, value in options.items():
        least = source.options[_known(f"{name} option", key, source.options)][1]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise DataError(f"{name} option {key}={value!r}: give a whole number >= {least}")
        values[key] = value
    if source.suffixes:
        whole, parts = source.read(_locate(name, path, source), wanted, **values)
    elif path is None:
        whole, parts = source.read(**values)
    else:
        raise DataError(f"{name} is made, not read from {path}: leave the path out")

    for part in wanted:
        if part != "all" and not parts[part]:
            raise DataError(f"{name}: no case is left for {part!r}: {len(set(whole.groups))} groups"
                            " (patients, scenes) are too few to split; give more, or use 'all'")
    splits = [whole if part == "all" else whole.subset(parts[part]) for part in wanted]
    return splits[0] if isinstance(split, str) else splits


def _known(what: str, name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise DataError(f"unknown {what} {name!r}: choose from {', '.join(names) or '(none)'}")
    return name


def split_groups(groups: Sequence[str], val: float) -> dict[str, list[int]]:
    """Case indices of train, val and test, no group on two sides.

    The distinct groups, sorted, are shuffled by RandomState(0); the first ceil(n / 5) are test. The
    other m, in that order, are shuffled by a fresh RandomState(0); the first ceil(val m) are val.
    With val = 0.2 this is the 64/16/20 split of the LIDC pickle that recent papers share (two calls
    of scikit-learn's train_test_split); with val = 0.25 it is 60/20/20.
    """
    rest, members = np.unique(groups), {}
    for part, share in (("test", 0.2), ("val", val)):
        rest = rest[np.random.RandomState(0).permutation(len(rest))]
        taken, rest = np.split(rest, [math.ceil(share * len(rest))])
        members[part] = set(taken)
    members["train"] = set(rest)
    return {part: [i for i, group in enumerate(groups) if group in members[part]]
            for part in SPLITS}


def center(split: Split, size: int | Sequence[int]) -> Split:
    """Centre crop or pad to `size`: images by reflection, labels with 255, instances with -1."""
    shape = split.images.shape[2:]
    lines = [torch.arange(want, device=split.images.device) + _center_start(have, want)
             for have, want in zip(shape, _as_size(size, shape))]

    def cut(tensor: Tensor, fill: int | None = None) -> Tensor:
        for axis, (line, have) in enumerate(zip(lines, shape), start=-len(shape)):
            tensor = tensor.index_select(axis, _reflect(line, have))
            if fill is not None:
                outside = (line < 0) | (line >= have)
                tensor = tensor.masked_fill(outside.view(-1, *[1] * (-axis - 1)), fill)
        return tensor

    instances = None if split.instances is None else cut(split.instances, -1)
    return replace(split, images=cut(split.images), labels=cut(split.labels, IGNORE),
                   instances=instances)


def _center_start(have: int, want: int) -> int:
    """Where a central window of `want` pixels starts; padding and cropping back are inverse."""
    return (have - want) // 2 if have >= want else -((want - have) // 2)


def _as_size(size: int | Sequence[int] | None, shape: Sequence[int]) -> tuple[int, ...]:
    if size is None:
        return tuple(shape)
    sizes = (size,) * len(shape) if isinstance(size, int) else tuple(size)
    if len(sizes) != len(shape) or min(sizes) < 1:
        raise DataError(f"size {size} for images of {_times(shape)}: give one number from 1 up, or "
                        f"{len(shape)} of them")
    return sizes


def _reflect(index: Tensor, length: int) -> Tensor:
    """Indices of any value folded into 0..length-1, mirrored about the first and last pixel."""
    period = max(2 * (length - 1), 1)
    index = index.remainder(period)
    return torch.minimum(index, period - index)


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one value"


# ---------------------------------------------------------------------------------- augmentation


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

    @property
    def resamples(self) -> bool:
        """Whether pixels land between pixels; if not, they are only moved, bit for bit."""
        return any((self.rotation, self.shear, self.scale, self.translation, self.elastic))


# The papers name these transformations and give no magnitudes: the numbers are ours. Where odds
# hang on a width or a shape (shapes, lesions3d) nothing is resampled, so that they stay exact.
_FULL = Augmentation(flip=(-2, -1), quarter_turns=True, rotation=30, shear=0.1, scale=0.15,
                     translation=2, elastic=3)
_MILD = Augmentation(rotation=10, shear=0.05, scale=0.1, translation=4, elastic=2)
AUGMENTATION: dict[str, Augmentation] = {
    "toy1d": Augmentation(),
    "shapes": Augmentation(flip=(-2, -1), quarter_turns=True),
    "modes": Augmentation(flip=(-1,)),
    "cells": _FULL,
    "organs": _MILD,
    "lesions3d": Augmentation(flip=(-3, -2, -1), quarter_turns=True),
    "lidc": _FULL,
    "npz": _MILD,
}


class _Warp(NamedTuple):
    """Output pixel o of row b shows the source at  centre + matrix (start + o - centre) + shift."""

    matrix: Tensor  # (B, d, d)
    start: Tensor  # (B, d) corner of the output window
    knots: Tensor | None  # (B, d, *k) control points of the shift, in pixels


def augment(images: Tensor, labels: Tensor, augmentation: Augmentation,
            generator: torch.Generator, size: int | Sequence[int] | None = None,
            ) -> tuple[Tensor, Tensor]:
    """Augments a batch in one resampling: images (B, C, *S), label maps (B, *S) -> the same kinds.

    `size` is the output window: at a random place where it is smaller than the image, centred and
    padded where it is larger. Images are interpolated linearly and reflected past their border;
    labels take the nearest pixel, and 255 past it. 2D and 3D; 1D images can only be flipped or
    cropped (DataError).
    """
    size = _as_size(size, images.shape[2:])
    warp = _draw_warp(augmentation, len(images), images.shape[2:], size, generator)
    warp = _Warp(*(part if part is None else part.to(images.device) for part in warp))
    return _apply_warp(images, labels, warp, size, augmentation.resamples)


def _draw_warp(augmentation: Augmentation, count: int, shape, size, generator) -> _Warp:
    dims, device = len(shape), generator.device
    if dims == 1 and (augmentation.resamples or augmentation.quarter_turns):
        raise DataError("1D images cannot be turned or deformed: give Augmentation(flip=(-1,))")

    def uniform(bound: float, *more: int) -> Tensor:  # (count, *more) in +-bound
        return bound * (2 * torch.rand(count, *more, generator=generator, device=device) - 1)

    def whole(high: int) -> Tensor:  # (count,) in 0..high-1
        return torch.randint(high, (count,), generator=generator, device=device)

    def turn(cos: Tensor, sin: Tensor, i: int, j: int) -> Tensor:  # in the plane of axes i and j
        matrix = torch.eye(dims, device=device).repeat(count, 1, 1)
        matrix[:, i, i], matrix[:, j, j], matrix[:, i, j], matrix[:, j, i] = cos, cos, -sin, sin
        return matrix

    matrix = torch.eye(dims, device=device).repeat(count, 1, 1)
    for axis in augmentation.flip:
        matrix[:, axis, axis] = 1.0 - 2 * whole(2)
    if augmentation.quarter_turns:
        quarter = whole(4) if shape[-2] == shape[-1] else 2 * whole(2)
        circle = torch.tensor([0.0, 1.0, 0.0, -1.0], device=device)
        matrix = matrix @ turn(circle[(quarter + 1) % 4], circle[quarter], -2, -1)
    if augmentation.rotation:
        for i, j in itertools.combinations(range(dims), 2):
            angle = uniform(math.radians(augmentation.rotation))
            matrix = matrix @ turn(angle.cos(), angle.sin(), i, j)
    if augmentation.shear:
        diagonal = torch.eye(dims, device=device)
        matrix = matrix @ (diagonal + (1 - diagonal) * uniform(augmentation.shear, dims, dims))
    if augmentation.scale:
        matrix = matrix * uniform(math.log1p(augmentation.scale)).exp()[:, None, None]

    start = torch.stack([whole(have - want + 1) if have > want else
                         torch.full((count,), _center_start(have, want), device=device)
                         for have, want in zip(shape, size)], 1).float()
    if augmentation.translation:
        start = start + uniform(augmentation.translation, dims)
    knots = None
    if augmentation.elastic:
        # A cubic spline over m intervals has m + 3 control points.
        counts = [max(round(want / augmentation.elastic_spacing), 1) + 3 for want in size]
        knots = augmentation.elastic * torch.randn(count, dims, *counts, generator=generator,
                                                   device=device)
    return _Warp(matrix, start, knots)


def _apply_warp(images: Tensor, labels: Tensor, warp: _Warp, size, resamples: bool):
    shape, (count, channels) = images.shape[2:], images.shape[:2]

    def spread(values: Tensor, axis: int | None = None) -> Tensor:  # (B,) or (B, size[axis])
        return values.view(count, *[-1 if i == axis else 1 for i in range(len(size))])

    lines = [spread(torch.arange(want, device=images.device) + warp.start[:, i, None]
                    - (have - 1) / 2, i) for i, (have, want) in enumerate(zip(shape, size))]
    # Sums, not a matrix product, whose TF32 mode would move whole pixels between pixels.
    where = [sum(spread(warp.matrix[:, i, j]) * line for j, line in enumerate(lines))
             + (have - 1) / 2 for i, have in enumerate(shape)]  # d of (B, *size), source pixels
    if warp.knots is not None:
        where = [axis + shift for axis, shift in zip(where, _spline(warp.knots, size).unbind(1))]

    flat, outside = 0, False
    for axis, have in zip(where, shape):
        index = axis.round().long()
        outside = outside | (index < 0) | (index >= have)
        flat = flat * have + _reflect(index, have)
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
    return images, labels


def _spline(knots: Tensor, shape: Sequence[int]) -> Tensor:
    """The uniform cubic B-spline with control values `knots` (B, C, *k) -> (B, C, *shape)."""
    for want in shape:
        count = knots.shape[2]
        at = torch.linspace(1, count - 2, want, device=knots.device)
        gap = (at[:, None] - torch.arange(count, device=knots.device)).abs()
        basis = torch.where(gap < 1, 2 / 3 - gap**2 + gap**3 / 2, (2 - gap).clamp(min=0) ** 3 / 6)
        knots = torch.tensordot(knots, basis, ([2], [1]))  # the axis done goes to the end
    return knots


# --------------------------------------------------------------------------------------- batches


def batches(split: Split, batch_size: int, seed: int, *, start: int = 0,
            annotators: Sequence[int] | None = None, augmentation: Augmentation | None = None,
            size: int | Sequence[int] | None = None, rank: int = 0, world: int = 1,
            ) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches: images (B, C, *S) float32 and label maps (B, *S) int64.

    Cases come in seeded permutations chained end to end. Each draws one reader by `weights`, among
    `annotators` (reader indices) where given; a set with instances draws new labels for them. Batch
    `step` depends on (seed, step) alone, and the stream begins at `start`. `batch_size` counts the
    rows of all `world` processes; this one gets the rows of `rank`. All choices are drawn on the
    host, so they are the same on every device, and sent ahead without waiting.
    Raises DataError where a batch cannot be cut evenly, or a case has none of the annotators.
    """
    if batch_size < 1 or batch_size % world:
        raise DataError(f"batch size {batch_size} cannot be cut evenly over {world} processes: "
                        f"give a multiple of {world}")
    if len(split) == 0 or seed < 0 or start < 0:
        raise DataError(f"{len(split)} cases, seed {seed}, start {start}: give at least one case, "
                        "and seed and start from 0 up")
    augmentation = augmentation or Augmentation()
    device, shape = split.images.device, split.images.shape[2:]
    size = _as_size(size, shape)
    odds = _reader_odds(split, annotators)
    ids = 0 if split.instances is None else int(split.instances.max()) + 1
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)

    def ship(tensor: Tensor | None) -> Tensor | None:
        """My rows, to the device; only from pinned memory does the copy not make the host wait."""
        if tensor is None:
            return None
        tensor = tensor[mine].pin_memory() if device.type == "cuda" else tensor[mine]
        return tensor.to(device, non_blocking=True)

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> Tensor:
        return torch.randperm(len(split), generator=_generator(seed, 0, epoch))

    def draw(step: int) -> tuple[Tensor, Tensor]:
        first, offset = divmod(step * batch_size, len(split))
        last = ((step + 1) * batch_size - 1) // len(split)
        order = torch.cat([permutation(epoch) for epoch in range(first, last + 1)])
        rows = order[offset:offset + batch_size]
        # Drawn for the whole batch whatever the rank: `ship` cuts afterwards.
        generator = _generator(seed, 1, step)
        if split.instances is None:
            # A race of exponential clocks of rates `odds` (in logarithms): a rate of 0 never wins,
            # and there is no cumulative sum to round past the last reader.
            chances = torch.rand(odds[rows].shape, generator=generator, dtype=torch.float64)
            reader = (chances.log() / odds[rows]).argmax(1)
            case = ship(rows)
            labels = split.labels[case, ship(reader)]
        else:
            table = _random_classes(batch_size, ids, split.num_classes, generator)
            case = ship(rows)
            labels = _relabel(split.instances[case], ship(table))
        warp = _Warp(*map(ship, _draw_warp(augmentation, batch_size, shape, size, generator)))
        images, labels = _apply_warp(split.images[case], labels, warp, size, augmentation.resamples)
        return images, labels.long()

    return map(draw, itertools.count(start))


def _reader_odds(split: Split, annotators: Sequence[int] | None) -> Tensor:
    """(N, A) float64 odds of the readers, on the host, those outside `annotators` at 0."""
    count = split.labels.shape[1]
    odds = torch.ones(len(split), count) if split.weights is None else split.weights.cpu()
    if annotators is None:
        return odds.double()
    if split.instances is not None:
        raise DataError("annotators: this set draws its labels from instances and has no readers")
    if not set(annotators) or not set(annotators) <= set(range(count)):
        raise DataError(f"annotators {list(annotators)}: choose from 0 to {count - 1}")
    odds = odds.double() * torch.tensor([float(a in annotators) for a in range(count)])
    unread = (odds.sum(1) == 0).nonzero().flatten().tolist()
    if unread:
        raise DataError(f"annotators {list(annotators)}: none of them read {len(unread)} of the "
                        f"cases ({split.names[unread[0]]!r} is one); name more readers")
    return odds


def _random_classes(count: int, ids: int, num_classes: int, generator) -> Tensor:
    """A random class 1..K-1 for every instance id; id 0 stays class 0. (count, ids) uint8."""
    table = torch.randint(1, num_classes, (count, ids), generator=generator, dtype=torch.uint8)
    table[:, 0] = 0
    return table


def _relabel(instances: Tensor, table: Tensor) -> Tensor:
    """Instance ids (B, *S) through a class table (B, ids) -> (B, *S) uint8."""
    labels = table.gather(1, instances.flatten(1).clamp(min=0).long()).view(instances.shape)
    return labels.masked_fill(instances < 0, IGNORE)


def _generator(*words: int) -> torch.Generator:
    """A generator seeded by a hash of `words`: neighbouring steps share nothing."""
    seed = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


# ------------------------------------------------------------------------------------- made sets


def _toy1d():
    """SSN's toy (arXiv:2006.06015, Sec. 5.1): one constant image of 21 pixels, two label maps.

    The first third is on, the last third off, the middle third on or off as a whole, at odds 1/2.
    """
    labels = torch.zeros(1, 2, 21, dtype=torch.uint8)
    labels[:, :, :7] = 1
    labels[:, 1, 7:14] = 1
    whole = Split(torch.ones(1, 1, 21), labels, None, ["line"], 2, ["line"], exact=True)
    return whole, dict.fromkeys(SPLITS, [0])  # one case, to train and to test on


def _shapes(n: int, size: int, seed: int):
    """Two objects, three independent ambiguities, 12 label maps a case in a fixed order.

    s, u, v are uniform in [0, 1] for each case, and all can be seen in the image.
      class     the main object |x/a|^p + |y/b|^p < 1 has p = 2 * 4^s, between ellipse (class 1,
                p = 2) and box (class 2, p = 8):                P(class 2) = 0.1 + 0.8 s
      style     every border is a halo, sigmoid(-distance / h), h = 0.4 + 2 u pixels at size 64.
                Readers draw tight (-3 px), middle or loose (+3 px), the same way round both
                objects, and with q = 0.1 + 0.8 u:              P = (1 - q)^2, 2 q (1 - q), q^2
      presence  a second, faint ellipse (class 3) of contrast 0.1 + 0.3 v (the main object has
                0.45 to 0.65, the noise 0.04) is drawn or not:  P(drawn) = 0.1 + 0.8 v
    Label map number (class * 3 + style) * 2 + drawn has the product of the three odds.
    """
    uniform, normal = _draws(n, seed)
    s = uniform(0, 1)
    images, inner, outer, weights = _two_objects(uniform, normal, size, 2, exponent=2 * 4**s)
    kind = torch.tensor([1, 2], dtype=torch.uint8).view(2, 1, 1, 1, 1)
    drawn = torch.tensor([0, 3], dtype=torch.uint8).view(2, 1, 1)
    labels = torch.where(inner[:, None, :, None], kind, outer[:, None, :, None] * drawn)
    weights = _either(s)[:, :, None] * weights[:, None]  # (n, 2, 6)
    return _made("shape", images, labels.flatten(1, 3), weights.flatten(1), 4)


def _lesions3d(n: int, size: int, seed: int):
    """`_shapes` in 3D with one class: a sure and a faint lesion, 6 label maps a case.

    Label map number style * 2 + drawn; the style moves borders by 3 voxels at size 64. Odds as in
    `_shapes`, a function of the halo and of the faint lesion's contrast.
    """
    images, inner, outer, weights = _two_objects(*_draws(n, seed), size, 3)
    labels = torch.stack([inner, inner | outer], 2).to(torch.uint8)
    return _made("volume", images, labels.flatten(1, 2), weights, 2)


def _two_objects(uniform: Callable, normal: Callable, size: int, dims: int, exponent=None):
    """What `_shapes` describes, but for the class: images (n, 1, *S), each object as drawn in the
    three styles (n, 3, *S) bool, and the odds (n, 6) of style * 2 + drawn."""
    unit, u, v = size / 64, uniform(0, 1), uniform(0, 1)
    axis = F.normalize(normal(dims), dim=1)  # the objects stand on either side of the centre
    middle = size / 2 - 0.5 + unit * uniform(-2, 2, dims)
    main = _distance(size, middle - 11 * unit * axis, unit * uniform(9, 13, dims),
                     uniform(0, math.pi), exponent)
    faint = _distance(size, middle + 19 * unit * axis, unit * uniform(6, 8, dims),
                      uniform(0, math.pi))
    halo = _meet(unit * (0.4 + 2 * u), dims)
    images = (0.2 + 0.06 * _texture(normal, size, 6, dims) + 0.04 * normal(*[size] * dims)
              + _meet(uniform(0.45, 0.65), dims) * torch.sigmoid(-main / halo)
              + _meet(0.1 + 0.3 * v, dims) * torch.sigmoid(-faint / halo))
    shift = _meet(unit * torch.tensor([-3.0, 0.0, 3.0]), dims)
    inner, outer = main[:, None] < shift, faint[:, None] < shift  # (n, 3, *S)
    no, yes = _either(u).unbind(1)
    styles = torch.stack([no**2, 2 * no * yes, yes**2], 1)  # (n, 3)
    return images[:, None], inner, outer, (styles[:, :, None] * _either(v)[:, None]).flatten(1)


_STREET = ("sky", "building", "road", "sidewalk", "vegetation", "car", "person")
# Prob. U-Net's Cityscapes experiment (arXiv:1806.05034, Sec. 4.2): these flip to a twin class.
_FLIPS = {"sidewalk": 8 / 17, "person": 7 / 17, "car": 6 / 17, "vegetation": 5 / 17, "road": 4 / 17}


def _modes(n: int, size: int, seed: int):
    """Street scenes, five of whose classes each become their twin class by chance: 32 label maps.

    Classes 0..6 are `_STREET`, 7..11 the twins in the order of `_FLIPS`. In label map number m
    class j of `_FLIPS` is flipped where bit j of m is set; its odds are the product over the five.
    """
    uniform, normal = _draws(n, seed)
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    scene, images = torch.zeros(n, size, size, dtype=torch.long), torch.zeros(n, 3, size, size)

    def one(low: float, high: float) -> Tensor:  # a number for each scene, ready to meet x and y
        return _meet(uniform(low, high), 2)

    def ellipse(row, column, high, wide) -> Tensor:
        return ((y - row) / high) ** 2 + ((x - column) / wide) ** 2 < 1

    def paint(where: Tensor, name: str, *colour: float, vary: float = 0.06):
        scene.masked_fill_(where, _STREET.index(name))
        tone = torch.tensor(colour) + vary * uniform(-1, 1, 3)
        torch.where(where[:, None], tone[:, :, None, None], images, out=images)

    side = torch.where(one(0, 1) < 0.5, 1.0, -1.0)  # the tree's side; the person has the other
    horizon, vanish = one(0.48, 0.56), 0.5 + side * one(-0.05, 0.05)
    paint(torch.ones_like(scene, dtype=torch.bool), "sky", 0.65, 0.8, 0.95)
    house = (4 * x + one(0, 1)).long()  # five fronts of different height
    roofs = uniform(0.08, 0.3, 5).gather(1, house.flatten(1)).view(n, size, size)
    for number in range(5):
        paint((house == number) & (y > roofs), "building", 0.55, 0.5, 0.45, vary=0.12)
    windows = (scene == 1) & (x * 16 % 1 > 0.5) & (y * 12 % 1 > 0.5)
    paint(windows, "building", 0.35, 0.38, 0.45)
    paint(y > horizon, "sidewalk", 0.62, 0.58, 0.6)
    road = (x - vanish).abs() < 0.07 + 0.75 * (y - horizon)
    paint((y > horizon) & road, "road", 0.36, 0.36, 0.4)

    crown, trunk = one(0.28, 0.36), 0.5 + side * one(0.3, 0.4)
    stem = ((x - trunk).abs() < 0.02) & (y > crown) & (y < horizon + 0.06)
    paint(stem, "vegetation", 0.35, 0.27, 0.18)
    paint(ellipse(crown, trunk, one(0.13, 0.2), one(0.09, 0.14)), "vegetation", 0.2, 0.45, 0.2)
    row, column, high, wide = one(0.7, 0.8), 0.5 + one(-0.1, 0.1), one(0.045, 0.06), one(0.11, 0.15)
    body = ((x - column).abs() < wide) & ((y - row).abs() < high)
    roof = ((x - column).abs() < 0.6 * wide) & ((y - row + 1.8 * high).abs() < high)
    paint(body | roof, "car", 0.7, 0.15, 0.15, vary=0.15)
    paint(roof & (y - row < -high) & (y - row > -2.3 * high), "car", 0.25, 0.3, 0.38)
    for wheel in (-0.6, 0.6):
        paint(ellipse(row + high, column + wheel * wide, 0.03, 0.03), "car", 0.08, 0.08, 0.08)
    row, column = one(0.58, 0.66), 0.5 - side * one(0.3, 0.4)
    paint(ellipse(row, column, 0.12, 0.035), "person", 0.2, 0.25, 0.6, vary=0.15)
    paint(ellipse(row - 0.13, column, 0.035, 0.03), "person", 0.85, 0.65, 0.5)
    images *= 1 + 0.12 * _texture(normal, size, 8)[:, None]
    images = (images + 0.04 * normal(3, size, size)).clamp(0, 1)

    flipped = torch.arange(32)[:, None] >> torch.arange(len(_FLIPS)) & 1  # (32, 5)
    table = torch.arange(len(_STREET), dtype=torch.uint8).repeat(32, 1)  # class in each label map
    for j, name in enumerate(_FLIPS):
        table[flipped[:, j] == 1, _STREET.index(name)] = len(_STREET) + j
    labels = table[:, scene].transpose(0, 1).contiguous()
    odds = torch.tensor(list(_FLIPS.values()), dtype=torch.float64)
    weights = torch.where(flipped == 1, odds, 1 - odds).prod(1).repeat(n, 1)
    return _made("scene", images, labels, weights, len(_STREET) + len(_FLIPS))


def _cells(n: int, size: int, seed: int):
    """Cells of a warped Voronoi diagram with dark membranes, like neurites in electron microscopy.

    Each cell's class is drawn afresh from 1..15, independently and uniformly; the membrane is class
    0 (HPU-Net's SNEMI3D task, arXiv:1905.13077, Sec. 3.3). `instances` holds the ids, `labels` four
    such maps for evaluation.
    """
    (uniform, normal), across = _draws(n, seed), 4  # cells along the side
    axis = (torch.arange(size) + 0.5) / size * across  # in cells
    y, x = axis[:, None] + 0.2 * _texture(normal, size, 4), axis + 0.2 * _texture(normal, size, 4)
    nearest, second = torch.full((2, n, size, size), math.inf)
    instances = torch.zeros(n, size, size, dtype=torch.int32)
    corners = list(itertools.product(range(-1, across + 1), repeat=2))
    for label, (row, column) in enumerate(corners, start=1):
        place = uniform(0.1, 0.9, 2)
        distance = torch.hypot(y - row - _meet(place[:, 0], 2), x - column - _meet(place[:, 1], 2))
        instances.masked_fill_(distance < nearest, label)
        second = torch.minimum(second, torch.maximum(nearest, distance))
        nearest = torch.minimum(nearest, distance)
    to_wall = (second - nearest) / 2 * size / across  # about the pixels to the border
    width = _meet(uniform(0.6, 1.1), 2) * size / 64
    shade = uniform(-0.08, 0.08, len(corners) + 1)
    shade = shade.gather(1, instances.flatten(1).long()).view(instances.shape)
    images = (0.65 + shade + 0.08 * _texture(normal, size, 24) + 0.06 * normal(size, size)
              - 0.45 * torch.sigmoid(3 * (1.2 * width - to_wall) / width)).clamp(0, 1)
    instances.masked_fill_(to_wall < width, 0)
    tables = [_random_classes(n, len(corners) + 1, 16, _generator(seed, k)) for k in range(4)]
    labels = torch.stack([_relabel(instances, table) for table in tables], 1)
    return _made("section", images[:, None], labels, None, 16, instances=instances)


# Organs as a picture of the belly shows them, in shares of its side: row, column, radii, contrast.
_ORGANS = torch.tensor([[0.45, 0.28, 0.20, 0.17, 0.32],  # 1 liver
                        [0.38, 0.70, 0.12, 0.14, 0.20],  # 2 stomach
                        [0.72, 0.28, 0.09, 0.06, 0.42],  # 3 right kidney
                        [0.70, 0.72, 0.09, 0.06, 0.42],  # 4 left kidney
                        [0.62, 0.50, 0.06, 0.06, 0.55]])  # 5 aorta


def _organs(n: int, size: int, seed: int):
    """Five organs with blurred borders, four slices a patient, three readers of known weight.

    Organ k covers sigmoid(-distance / h) of a pixel, h between 0.4 and 2.4 px at size 96, sharp or
    blurred for each organ of each patient. A reader draws an organ where it covers more than 0.2,
    0.5 or 0.8, at odds 1/4, 1/2, 1/4: all organs loose, middle or tight together, by +-1.39 h.
    """
    (uniform, normal), unit, count = _draws(n, seed), size / 96, len(_ORGANS)
    patient = torch.arange(n) // 4
    blur = unit * uniform(0.4, 2.4, count)[patient]
    turn = uniform(-0.4, 0.4, count)[patient]
    places = _ORGANS[:, :2] + uniform(-0.03, 0.03, count, 2)[patient] + uniform(-0.01, 0.01, 1, 2)
    radii = _ORGANS[:, 2:4] * uniform(0.8, 1.1, 1, 2)[patient] * uniform(0.95, 1.05, count, 2)
    belly = _distance(size, torch.full((n, 2), size / 2), size * torch.tensor([[0.4, 0.46]]))
    cover = torch.stack([torch.sigmoid(-_distance(size, size * places[:, k], size * radii[:, k],
                                                  turn[:, k]) / _meet(blur[:, k], 2))
                         for k in range(count)], 1)  # (n, 5, H, W)
    cover = cover / cover.sum(1, keepdim=True).clamp(min=1)
    images = (0.05 + torch.sigmoid(-belly / unit) * (0.3 + 0.04 * _texture(normal, size, 10))
              + torch.einsum("nkhw,k->nhw", cover, _ORGANS[:, 4]) + 0.03 * normal(size, size))
    most, organ = cover.max(1)
    labels = torch.stack([(organ + 1) * (most > threshold) for threshold in (0.2, 0.5, 0.8)], 1)
    weights = torch.tensor([0.25, 0.5, 0.25]).repeat(n, 1)
    groups = [f"patient-{number:04d}" for number in patient.tolist()]
    return _made("slice", images[:, None], labels.to(torch.uint8), weights, 6, groups)


def _draws(n: int, seed: int):
    """Seeded draws for n cases: uniform(low, high, *more) and normal(*more), each (n, *more)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *more, generator=generator)

    def normal(*more: int) -> Tensor:
        return torch.randn(n, *more, generator=generator)

    return uniform, normal


def _either(visible: Tensor) -> Tensor:
    """Odds (n, 2) of no and yes: P(yes) = 0.1 + 0.8 visible."""
    return torch.stack([0.9 - 0.8 * visible, 0.1 + 0.8 * visible], 1)


def _meet(values: Tensor, dims: int) -> Tensor:
    """(n,) -> (n, 1, ...), ready to meet maps of `dims` axes."""
    return values.view(-1, *[1] * dims)


def _distance(size: int, centre: Tensor, radii: Tensor, turn=None, exponent=None) -> Tensor:
    """About the signed distance, in pixels, to a superellipse: (n, d), (n, d) -> (n, *[size] * d).

    (f - 1) times the mean radius, with f = (sum_i |x_i / r_i|^p)^(1/p). `turn` (n,), radians, is in
    the last two axes; `exponent` p (n,) is 2 where not given.
    """
    dims = centre.shape[1]
    grid = [torch.arange(size).view(*[-1 if i == axis else 1 for i in range(dims)])
            - _meet(centre[:, axis], dims) for axis in range(dims)]
    if turn is not None:
        cos, sin = _meet(turn.cos(), dims), _meet(turn.sin(), dims)
        grid[-2:] = [cos * grid[-2] - sin * grid[-1], sin * grid[-2] + cos * grid[-1]]
    parts = [(line / _meet(radii[:, axis], dims)).abs() for axis, line in enumerate(grid)]
    if exponent is None:
        f = sum(part**2 for part in parts).sqrt()
    else:
        power = _meet(exponent, dims)
        f = sum(part**power for part in parts) ** (1 / power)
    return (f - 1) * _meet(radii.log().mean(1).exp(), dims)


def _texture(normal: Callable, size: int, bumps: int, dims: int = 2) -> Tensor:
    """Smooth noise (n, *[size] * dims), mean 0, spread about 1, so many `bumps` along a side."""
    knots = normal(1, *[bumps + 3] * dims)
    return _spline(knots, [size] * dims)[:, 0] / 0.69**dims  # 0.69: rms of a cubic B-spline


def _made(kind, images, labels, weights, num_classes, groups=None, instances=None):
    names = [f"{kind}-{i:04d}" for i in range(len(images))]
    weights = None if weights is None else weights.float()
    groups = names if groups is None else groups
    whole = Split(images, labels, weights, groups, num_classes, names, instances,
                  exact=instances is None)
    return whole, split_groups(groups, val=0.25)


# ------------------------------------------------------------------------------------- real sets


class _ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays and plain containers; refuses any other global before it is imported.

    The functions are taken from this NumPy, under the names old and new pickles know them by.
    """

    NUMPY = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0],
             "_frombuffer": np.empty(1).__reduce_ex__(5)[0]}
    PLAIN = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
             ("collections", "OrderedDict"): OrderedDict,
             # How protocols 0 to 2 spell bytes; NumPy asks for no other codec.
             ("_codecs", "encode"): lambda text, codec: text.encode("latin1")}

    def find_class(self, module, name):
        internal = module.startswith(("numpy.core.", "numpy._core."))
        found = self.NUMPY.get(name) if internal else self.PLAIN.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it calls for {module}.{name}, which no array needs and "
                                         "which could run anything; it was not run")
        return found


# A case, as the three readers yield it: name, group, image (C, *S), {reader: label map (*S)}.
_Case = tuple[str, str, np.ndarray, dict[int, np.ndarray]]


def _pickle_cases(path: Path) -> Iterator[_Case]:
    """The layout of the widely shared LIDC pickle: {key: {image, masks, series_uid}}."""
    try:
        with open(path, "rb") as file:
            table = _ArraysOnly(file).load()
    except Exception as error:  # damaged bytes can raise nearly anything
        raise DataError(f"{path}: not a whole pickle of arrays: {_line(error)}") from error
    if not isinstance(table, dict):
        raise DataError(f"{path}: holds a {type(table).__name__}; give a dict "
                        "{key: {image, masks, series_uid}}")
    for key in list(table):
        record = table.pop(key)  # frees it: the real file has 15,096 cases of float64
        missing = {"image", "masks", "series_uid"} - set(record if isinstance(record, dict) else ())
        if missing:
            raise DataError(f"{path}: {key!r}: no {', '.join(sorted(missing))}; each case is a "
                            "dict of image, masks and series_uid")
        image, masks = record["image"], record["masks"]
        if not isinstance(image, np.ndarray) or not isinstance(masks, (list, tuple, np.ndarray)):
            raise DataError(f"{path}: {key!r}: image is a {type(image).__name__} and masks a "
                            f"{type(masks).__name__}; give an array and a list of arrays")
        yield str(key), str(record["series_uid"]), image[None], dict(enumerate(masks))


def _png_cases(root: Path, parts: Sequence[str]) -> Iterator[_Case]:
    """The HPU-Net release: <part>/images/<patient>/<name>.png and gt/<patient>/<name>_l<r>.png."""
    def read(file: Path) -> np.ndarray:
        try:
            return np.asarray(Image.open(file))
        except Exception as error:
            raise DataError(f"{file}: not a readable PNG: {_line(error)}") from error

    for part in parts:
        files = sorted((root / part / "images").glob("*/*.png"))
        if not files:
            raise DataError(f"{root}: no {part}/images/<patient>/*.png: that split is not there")
        for file in files:
            patient, name = file.parent.name, file.stem
            drawn = (root / part / "gt" / patient).glob(f"{name}_l[0-9].png")
            # Foreground is 1 in some copies, 255 in others, where it would read as "ignore".
            masks = {int(mask.stem[-1]): read(mask) > 0 for mask in drawn}
            yield f"{part}/{patient}/{name}", patient, read(file)[None], masks


def _npz_split(path: Path, num_classes: int) -> Split:
    """A user's own .npz.

      images   (N, H, W), (N, C, H, W) or (N, C, D, H, W): float, or uint8 scaled to [0, 1]
      labels   (N, A, H, W) or (N, A, D, H, W), always with the reader axis: 0..K-1, 255 = ignore
    and if wanted: weights (N, A), normalised row by row; groups (N,), such as the patient of each
    case; names (N,); num_classes, else the largest label + 1. Images with one axis fewer than the
    labels have one channel and no axis for it. A reader's map of nothing but 255 is a missing one.
    """
    optional = ("weights", "groups", "names", "num_classes")
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            given = set(file.files)
            arrays = {key: file[key] for key in ("images", "labels", *optional) if key in given}
    except Exception as error:  # a damaged archive can raise nearly anything
        raise DataError(f"{path}: not a readable .npz of plain arrays: {_line(error)}") from error
    if not {"images", "labels"} <= given <= {"images", "labels", *optional}:
        raise DataError(f"{path}: has the keys {', '.join(sorted(given)) or '(none)'}; images and "
                        f"labels are needed, {', '.join(optional)} allowed")
    images, labels = arrays["images"], arrays["labels"]
    shape = labels.shape
    images = images[:, None] if images.ndim == labels.ndim - 1 else images
    if len(shape) not in (4, 5) or images.shape[:1] + images.shape[2:] != shape[:1] + shape[2:]:
        raise DataError(f"{path}: labels is {_times(shape)} and images "
                        f"{_times(arrays['images'].shape)}; (N, A, H, W) must meet (N, H, W) or "
                        "(N, C, H, W) (of a single reader? store labels[:, None])")
    sizes = {"weights": shape[:2], "groups": shape[:1], "names": shape[:1], "num_classes": ()}
    for key in given & set(optional):
        number = arrays[key].dtype.kind in "buif" or key in ("groups", "names")
        if arrays[key].shape != sizes[key] or not number:
            raise DataError(f"{path}: {key} is {_times(arrays[key].shape)} of {arrays[key].dtype}; "
                            f"{_times(sizes[key])} is needed")
    num_classes = num_classes or int(arrays.get("num_classes", 0))
    if num_classes and not 2 <= num_classes <= IGNORE:
        raise DataError(f"{path}: num_classes is {num_classes}; 2 to {IGNORE} can be")
    names = [str(name) for name in arrays.get("names", range(len(labels)))]
    groups = [str(group) for group in arrays.get("groups", names)]
    cases = ((name, group, image, dict(enumerate(drawn)))
             for name, group, image, drawn in zip(names, groups, images, labels))
    return _collect(path, cases, num_classes, arrays.get("weights"))


def _read_lidc(path: Path, wanted: Sequence[str]):
    """LIDC-IDRI in any of three layouts; the PNG tree has its own split, and only that is read."""
    if path.suffix == ".npz":
        whole = _npz_split(path, num_classes=2)
    elif not path.is_dir():
        whole = _collect(path, _pickle_cases(path), num_classes=2)
    else:
        parts = [part for part in SPLITS if part in wanted or "all" in wanted]
        whole = _collect(path, _png_cases(path, parts), num_classes=2)
        return whole, {part: [i for i, name in enumerate(whole.names)
                              if name.startswith(part + "/")] for part in parts}
    return whole, split_groups(whole.groups, val=0.2)


def _read_npz(path: Path, wanted: Sequence[str], num_classes: int):
    whole = _npz_split(path, num_classes)
    return whole, split_groups(whole.groups, val=0.25)


def _collect(path: Path, cases: Iterable[_Case], num_classes: int, weights=None) -> Split:
    """Checks and stacks the cases; a reader a case lacks is 255 all over and has weight 0."""
    names, groups, images, masks = [], [], [], []
    for name, group, image, drawn in cases:
        where = f"{path}: {name!r}"
        image = _as_image(image, f"{where}: image")
        if image.ndim not in (3, 4) or images and image.shape != images[0].shape:
            raise DataError(f"{where}: image is {_times(image.shape[1:])}; (H, W) is needed, the "
                            "same in all cases: crop or pad them first")
        drawn = {reader: _as_label(mask, num_classes or IGNORE, f"{where}: mask {reader}")
                 for reader, mask in drawn.items()}
        for reader, mask in drawn.items():
            if mask.shape != image.shape[1:]:
                raise DataError(f"{where}: mask {reader} is {_times(mask.shape)} and its image "
                                f"{_times(image.shape[1:])}; they must be of one size")
        names.append(name)
        groups.append(group)
        images.append(image)
        masks.append(drawn)
    if not images:
        raise DataError(f"{path}: holds no cases")

    readers = 1 + max((reader for drawn in masks for reader in drawn), default=0)
    labels = np.full((len(images), readers, *images[0].shape[1:]), IGNORE, np.uint8)
    for row, drawn in zip(labels, masks):
        for reader, mask in drawn.items():
            row[reader] = mask
    highest = labels[labels != IGNORE].max(initial=0)
    if highest == 0:
        raise DataError(f"{path}: no label between 0 and {IGNORE} in it: foreground is 1 and up, "
                        f"{IGNORE} means ignore")
    odds = (labels != IGNORE).any(axis=tuple(range(2, labels.ndim)))  # (N, A): who read what
    uniform = weights is None and odds.all()
    if weights is not None:
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise DataError(f"{path}: weights: some are negative or not finite")
        odds = odds * weights
    total = odds.sum(1, keepdims=True)
    if not total.all():
        raise DataError(f"{path}: {names[int(total.argmin())]!r}: no mask of any reader (or only of"
                        " weight 0); give one, or leave the case out")
    return Split(torch.from_numpy(np.stack(images)), torch.from_numpy(labels),
                 None if uniform else torch.from_numpy(odds / total).float(), groups,
                 num_classes or int(highest) + 1, names)


def _as_image(image: np.ndarray, where: str) -> np.ndarray:
    if image.dtype == np.uint8:
        return image / np.float32(255)
    if image.dtype.kind != "f":
        raise DataError(f"{where} is of {image.dtype}; give floats, or uint8 (scaled to [0, 1])")
    with np.errstate(over="ignore"):
        image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise DataError(f"{where} has pixels that are not finite; replace them first")
    return image


def _as_label(label: np.ndarray, num_classes: int, where: str) -> np.ndarray:
    if not isinstance(label, np.ndarray) or label.dtype.kind not in "buif":
        kind = getattr(label, "dtype", type(label).__name__)
        raise DataError(f"{where} is of {kind}; give an array of whole numbers")
    with np.errstate(invalid="ignore"):  # NaN: what it becomes differs from it all the same
        small = label.astype(np.uint8)
    good = (small == label) & ((small < num_classes) | (small == IGNORE))
    if not good.all():
        raise DataError(f"{where} has the value {label[~good][0]}; 0 to {num_classes - 1} are "
                        f"classes, {IGNORE} is ignored")
    return small


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _locate(name: str, path, source: "Source") -> Path:
    """The file (or tree of PNGs) meant by `path`, or by datasets/<name> where that is None."""
    place = Path("datasets", name) if path is None else Path(path)
    if source.tree and any((place / part / "images").is_dir() for part in SPLITS):
        return place
    if place.is_dir():
        found = [file for file in sorted(place.iterdir()) if file.suffix in source.suffixes]
    elif path is None:
        found = [file for file in map(place.with_suffix, source.suffixes) if file.is_file()]
    else:
        found = [place] if place.is_file() and place.suffix in source.suffixes else []
    if len(found) > 1:
        raise DataError(f"{name}: several files at {place}: give the path of one, "
                        f"{' or '.join(file.name for file in found)}")
    if not found:
        raise DataError(f"{name}: nothing to read at {place}: put there, or give the path of, "
                        f"{source.layout}")
    return found[0]


# ----------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Source:
    """One line of the table below."""

    read: Callable  # (**options), or (path, splits, **options), -> whole Split, {split: indices}
    doc: str
    options: dict[str, tuple[int, int]]  # name: (default, smallest allowed)
    suffixes: tuple[str, ...] = ()  # of its files; none for a made set
    layout: str = ""  # what to put where, told when nothing is found
    tree: bool = False  # a folder of PNGs will do as well


DATASETS: dict[str, Source] = {
    "toy1d": Source(_toy1d, "made: 21 pixels, two label maps", {}),
    "shapes": Source(_shapes, "made: ambiguous class, border and presence; 12 maps of known odds",
                     {"n": (1000, 3), "size": (64, 32), "seed": (0, 0)}),
    "modes": Source(_modes, "made: street scenes, five classes flip; 32 maps of known odds",
                    {"n": (500, 3), "size": (64, 48), "seed": (0, 0)}),
    "cells": Source(_cells, "made: cells and membranes, each cell one of 15 classes at random",
                    {"n": (500, 3), "size": (64, 32), "seed": (0, 0)}),
    "organs": Source(_organs, "made: five organs with blurred borders, three readers",
                     {"n": (400, 12), "size": (96, 48), "seed": (0, 0)}),
    "lesions3d": Source(_lesions3d, "made: a sure and a faint lesion in 3D; 6 maps of known odds",
                        {"n": (60, 3), "size": (48, 32), "seed": (0, 0)}),
    "lidc": Source(_read_lidc, "LIDC-IDRI lung nodules, or other sets in its layouts", {},
                   (".pickle", ".pkl", ".npz"),
                   "a pickle {key: {image, masks, series_uid}} (data_lidc.pickle, linked from "
                   "github.com/stefanknegt/Probabilistic-Unet-Pytorch), the PNG tree "
                   "{train,val,test}/{images,gt}/<patient>/ (gs://hpunet-data/lidc_crops), an .npz "
                   "as for the data set npz", tree=True),
    "npz": Source(_read_npz, "your own: images (N, H, W) and labels (N, A, H, W), or in 3D",
                  {"num_classes": (0, 0)}, (".npz",),
                  "an .npz with images (N, H, W), (N, C, H, W) or (N, C, D, H, W) and labels "
                  "(N, A, H, W) or (N, A, D, H, W), and if wanted weights, groups, names, "
                  "num_classes"),
}
