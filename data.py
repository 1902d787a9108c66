"""Every data set: made ones whose distribution of label maps is known, and real ones from files.

    train, val = data.load("shapes", ("train", "val"))           # two `Split`s: tensors in memory
    stream = data.batches(train.to("cuda"), 12, seed=0, augmentation=data.AUGMENTATION["shapes"])
    image, label = next(stream)                                  # (B, C, *S) float32, (B, *S) int64

    python data.py                                # lists the data sets
    python data.py show --data shapes             # a table, and a PNG with every reader's outlines
    python data.py build-lidc SRC lidc.npz        # LIDC-IDRI from the archive's DICOM and XML

A `Split` is moved to the device whole. Batches are drawn, cropped and augmented there, so training
never waits for a worker or a copy. Batch number `step` is a pure function of (seed, step): a run
that stops at step s goes on exactly with `start=s`, and several processes see what one would see.

Shapes: N cases, B batch, C channels, K classes, A annotators, *S space. 255 means ignore.
"""

import argparse
import contextlib
import csv
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import Tensor

from common import (COLORS, IGNORE, UserError, new_figure, pairs, paint_image, reflect_index,
                    save_figure, write_atomically)

SPLITS = ("train", "val", "test")


class DataError(ValueError):
    """A mistake in a data file or in what was asked of it, told in one line."""


@dataclass
class Split:
    """Cases in memory, images and all their annotations, on one device."""

    images: Tensor  # (N, C, *S) float32
    labels: Tensor  # (N, A, *S) uint8, 255 = ignore; (N, 1, *S) where `flips` tells the others
    weights: Tensor | None  # (N, A) float32, rows sum to 1: odds of each label map; None = uniform
    groups: list[str]  # patient, series or scene of each case: no split cuts through one
    num_classes: int
    names: list[str]  # key or file of each case
    # Instance ids (N, *S) int32, -1 = ignore. Where given, ids below `fixed` are classes, and every
    # batch maps the others anew to random classes fixed..K-1; `labels` holds a few such maps, the
    # same every time, for evaluation.
    instances: Tensor | None = None
    fixed: int = 1
    exact: bool = False  # whether labels and weights are the whole distribution of label maps
    # (N, A, 256) uint8. Where given, label map a of case i is flips[i, a][labels[i, 0]], so that
    # thousands of scenes of 32 maps fit into memory; `all_maps` makes the maps.
    flips: Tensor | None = None
    scored: tuple[int, ...] = ()  # classes whose IoU the set's paper averages; () = 1..K-1
    # {part: names of its cases} of the whole set, as `split_file` takes it.
    parts: dict[str, list[str]] = field(default_factory=dict)

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
        """All of it on `device`."""
        return replace(self, **self._map(lambda tensor: tensor.to(device)))

    def subset(self, indices: Sequence[int]) -> "Split":
        """These cases; of a range, a view without a copy."""
        if isinstance(indices, range) and indices.step > 0:
            rows = slice(indices.start, indices.stop, indices.step)
        else:
            rows = torch.as_tensor(indices, dtype=torch.long, device=self.images.device)
        groups, names = ([kept[i] for i in indices] for kept in (self.groups, self.names))
        return replace(self, **self._map(lambda tensor: tensor[rows]), groups=groups, names=names)

    def all_maps(self) -> "Split":
        """The same with `labels` (N, A, *S) of all label maps. For subsets: this is what is big."""
        if self.flips is None:
            return self
        maps = [_relabel(self.labels[:, 0], table) for table in self.flips.unbind(1)]
        return replace(self, labels=torch.stack(maps, 1), flips=None)


def load(name: str, split: str | Sequence[str] = "train", path=None, **options):
    """The `split` ("train", "val", "test" or "all") of the data set `name`, as a `Split`.

    A sequence of splits gives a list and reads the source once. `path` is the file or folder of a
    real set; without it, datasets/<name> in the working folder. `DATASETS` lists names and options;
    all sets take hide, see `hide`; real ones split_file, a JSON file {"train": [names of cases or
    groups], "val": [...], "test": [...]}, such as `Split.parts` holds. Cases named nowhere in it
    are left out.
    Raises DataError for anything the user can mend.
    """
    source = DATASETS[_known("data set", name, DATASETS)]
    wanted = [_known("split", part, (*SPLITS, "all"))
              for part in ([split] if isinstance(split, str) else split)]
    values = _checked_options(name, source, options)
    percent = values.pop("hide")
    if percent > 99:
        raise DataError(f"{name} option hide={percent}: give per cent of the image, 0 to 99")
    if source.real:
        whole, parts, whole.parts = _gather(name, path, source, wanted, values.pop("split_file"),
                                            values)
    elif path is None:
        whole, parts = source.read(**values)
        whole.parts = {part: [whole.names[i] for i in rows] for part, rows in parts.items()}
    else:
        raise DataError(f"{name} is made, not read from {path}: leave the path out")
    splits = [whole if part == "all" else whole.subset(parts[part]) for part in wanted]
    if percent:
        splits = [hide(part, percent) for part in splits]
    return splits[0] if isinstance(split, str) else splits


def hide(split: Split, percent: int, copies: int = 4) -> Split:
    """The task of HPU-Net's Fig. 5: so much of every image is hidden, from a random side of it, and
    the label map outside is known. A model segments what it sees and makes up what it does not.

    Every case comes `copies` times, each time with another label map, drawn by its odds, and
    another side. Images (N * copies, C + K + 1, *S): image and one-hot known labels, both 0 where
    hidden, and 1 there; labels (N * copies, 1, *S), the whole map.
    """
    size, generator = split.images.shape[2:], _generator(percent, len(split))
    maps = torch.multinomial(split.odds.cpu(), copies, replacement=True, generator=generator)
    rows = torch.arange(len(split)).repeat_interleave(copies)
    labels = torch.stack([split.subset([row]).all_maps().labels[0, number]
                          for row, number in zip(rows.tolist(), maps.flatten().tolist())])
    hidden = torch.zeros(len(rows), 1, *size, dtype=torch.bool)
    for row, side in enumerate(torch.randint(2 * len(size), (len(rows),), generator=generator)):
        axis, end = divmod(side.item(), 2)
        depth = round(size[axis] * percent / 100)
        hidden[row].narrow(1 + axis, end * (size[axis] - depth), depth).fill_(True)
    classes = torch.arange(split.num_classes).view(-1, *[1] * len(size))
    known = torch.cat([split.images[rows], (labels[:, None] == classes).float()], 1)
    images = torch.cat([known.masked_fill(hidden, 0), hidden.float()], 1)
    groups, names = ([kept[row] for row in rows.tolist()] for kept in (split.groups, split.names))
    names = [f"{name}-{i % copies}" for i, name in enumerate(names)]
    return replace(split, images=images, labels=labels[:, None], weights=None, groups=groups,
                   names=names, instances=None, flips=None, exact=False)


def _checked_options(name: str, source: "Source", given: dict) -> dict:
    """The options of a set, those given and the defaults of the others."""
    table = source.options | ({"split_file": ("", str)} if source.real else {}) | {"hide": (0, 0)}
    values = {key: default for key, (default, _) in table.items()}
    for key, value in given.items():
        allowed = table[_known(f"{name} option", key, table)][1]
        if isinstance(allowed, tuple):
            good, hint = value in allowed, f"choose from {', '.join(allowed)}"
        elif allowed is str:
            good, hint = isinstance(value, (str, Path)), "give a text"
        else:
            good = isinstance(value, int) and not isinstance(value, bool) and value >= allowed
            hint = f"give a whole number >= {allowed}"
        if not good:
            raise DataError(f"{name} option {key}={value!r}: {hint}")
        values[key] = value
    return values


def _known(what: str, name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise DataError(f"unknown {what} {name!r}: choose from {', '.join(names) or '(none)'}")
    return name


def split_groups(groups: Sequence[str], val: float, test: float = 0.2) -> dict[str, list[int]]:
    """Case indices of train, val and test, no group on two sides.

    The n distinct groups, sorted, are shuffled by RandomState(0); the first ceil(test n) are test.
    The other m, in that order, are shuffled by a fresh RandomState(0); the first ceil(val m) are
    val. With val = 0.2 this is the 64/16/20 split of the LIDC pickle that recent papers share (two
    calls of scikit-learn's train_test_split); with val = 0.25 it is 60/20/20.
    """
    rest, members = np.unique(groups), {}
    for part, share in (("test", test), ("val", val)):
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
            tensor = tensor.index_select(axis, reflect_index(line, have))
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
    "folder": _MILD,
    "em": _FULL,
    "cityscapes": Augmentation(flip=(-1,), rotation=20, shear=0.05, scale=0.2, translation=8,
                               elastic=3),
    "synapse": _MILD,
    "brats": Augmentation(flip=(-2, -1), quarter_turns=True),  # in the plane; SSN's code does so
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
            case, reader = ship(rows), ship(reader)
            labels = split.labels[case, reader] if split.flips is None else _relabel(
                split.labels[case, 0], split.flips[case, reader])
        else:
            table = _random_classes(batch_size, ids, split.fixed, split.num_classes, generator)
            case = ship(rows)
            labels = _relabel(split.instances[case], ship(table))
        warp = _Warp(*map(ship, _draw_warp(augmentation, batch_size, shape, size, generator)))
        images, labels = _apply_warp(split.images[case], labels, warp, size, augmentation.resamples)
        return images, labels.long()

    return map(draw, itertools.count(start))


def _reader_odds(split: Split, annotators: Sequence[int] | None) -> Tensor:
    """(N, A) float64 odds of the readers, on the host, those outside `annotators` at 0."""
    odds = torch.ones(split.labels.shape[:2]) if split.weights is None else split.weights.cpu()
    count = odds.shape[1]
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


def _random_classes(count: int, ids: int, fixed: int, num_classes: int, generator) -> Tensor:
    """A random class fixed..K-1 for every instance id from `fixed` on. (count, ids) uint8."""
    table = torch.randint(fixed, num_classes, (count, ids), generator=generator, dtype=torch.uint8)
    table[:, :fixed] = torch.arange(fixed)[:ids]
    return table


def _relabel(instances: Tensor, table: Tensor) -> Tensor:
    """Instance ids or classes (B, *S) through a class table (B, ids) -> (B, *S) uint8."""
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

    table, odds = _flip_modes([_STREET.index(name) for name in _FLIPS], len(_STREET))
    labels = table[:, scene].transpose(0, 1).contiguous()
    weights = odds.repeat(n, 1)
    return _made("scene", images, labels, weights, len(_STREET) + len(_FLIPS))


def _flip_modes(values: Sequence[int], twin: int) -> tuple[Tensor, Tensor]:
    """The 32 label maps of `_FLIPS`: class c becomes table[m, c], (32, 256) uint8, at odds[m].

    values: the class of each name of `_FLIPS`; class twin + j is the twin of number j, which is
    flipped where bit j of m is set.
    """
    flipped = torch.arange(32)[:, None] >> torch.arange(len(values)) & 1  # (32, 5)
    table = torch.arange(256, dtype=torch.uint8).repeat(32, 1)
    for j, value in enumerate(values):
        table[flipped[:, j] == 1, value] = twin + j
    odds = torch.tensor(list(_FLIPS.values()), dtype=torch.float64)
    return table, torch.where(flipped == 1, odds, 1 - odds).prod(1)


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
    tables = [_random_classes(n, len(corners) + 1, 1, 16, _generator(seed, k)) for k in range(4)]
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


class _Case(NamedTuple):
    """A case that a reader found; read(*key) is its image (C, *S) and {reader: label map (*S)}."""

    name: str
    group: str
    read: Callable[..., tuple[np.ndarray, dict[int, np.ndarray]]]
    key: tuple


@dataclass
class _Listing:
    """The cases of a set, not read yet, and what makes a Split of them."""

    cases: list[_Case]
    parts: dict[str, list[int]]  # the case indices of train, val and test
    num_classes: int = 0  # 0: the largest label + 1
    own: str = ""  # where files tell the split, parts are read one by one: why `part` may be empty
    weights: np.ndarray | None = None  # (N, A)
    flips: tuple[Tensor, Tensor] | None = None  # (A, 256) and (A,), of every case: `_flip_modes`
    fixed: int | None = None  # given where the label maps are instance ids, as Split tells
    scored: tuple[int, ...] = ()
    pad: str = "reflect"  # how images are filled up to the largest: a mode of numpy.pad


def _gather(name, path, source, wanted, split_file, values) -> tuple[Split, dict, dict]:
    """(the cases read, the rows of each part, the names of each part) of a set read from files."""
    with _readable(path or name, "data set", OSError):  # such as a folder that may not be opened
        place = _locate(name, path, source)
        listing = source.read(place, SPLITS if split_file or "all" in wanted else wanted, **values)
    cases, parts, lack = listing.cases, listing.parts, listing.own
    if not cases:
        raise DataError(f"{place}: holds no cases; it should be {source.layout}")
    twice = [key for key, count in Counter(case.name for case in cases).items() if count > 1]
    if twice:
        raise DataError(f"{place}: two cases are named {twice[0]!r}; rename one")
    if split_file:
        place, parts, lack = split_file, _listed_parts(split_file, cases), "none is listed"
    lack = lack or (f"{len({case.group for case in cases})} groups (patients, scenes) are too few "
                    "to split; give more, or use 'all'")
    home: dict[str, str] = {}
    for part, rows in parts.items():
        for i in rows:
            if home.setdefault(cases[i].group, part) != part:
                raise DataError(f"{place}: {cases[i].group!r} is in {home[cases[i].group]} and in "
                                f"{part}; all cases of a group (a patient, a scene) must be in one")
    for part in wanted:
        if part != "all" and not parts[part]:
            raise DataError(f"{place}: no case is left for {part!r}: {lack.format(part=part)}")

    names = {part: [cases[i].name for i in parts[part]] for part in SPLITS}
    if "all" in wanted:
        return _collect(place, listing, range(len(cases))), parts, names
    rows, runs = [], {}  # each part a run of its own, which `subset` cuts out without a copy
    for part in SPLITS:
        if part in wanted or not listing.own:
            runs[part] = range(len(rows), len(rows) + len(parts[part]))
            rows += parts[part]
    return _collect(place, listing, rows), runs, names


def _listed_parts(file, cases: Sequence[_Case]) -> dict[str, list[int]]:
    """The parts named by a JSON file {"train": [names of cases or groups], "val": ..., "test"}."""
    with _readable(file, "split file (JSON)"):
        listed = json.loads(Path(file).read_text(encoding="utf-8"))
    if (not isinstance(listed, dict) or not set(listed) <= set(SPLITS)
            or not all(isinstance(names, list) for names in listed.values())):
        raise DataError(f'{file}: give {{"train": [names], "val": [names], "test": [names]}}, of '
                        "cases or of groups (patients)")
    known: dict[str, set[int]] = {}
    for i, case in enumerate(cases):
        for key in (case.name, case.group):
            known.setdefault(key, set()).add(i)
    parts = {part: list(map(str, listed.get(part, []))) for part in SPLITS}
    unknown = [name for name in itertools.chain(*parts.values()) if name not in known]
    if unknown:
        raise DataError(f"{file}: no case and no group is named {unknown[0]!r}; the first case "
                        f"is {cases[0].name!r}, of group {cases[0].group!r}")
    return {part: sorted(set().union(*map(known.get, names))) for part, names in parts.items()}


def _collect(path, listing: _Listing, rows: Sequence[int]) -> Split:
    """Reads, checks and stacks cases; a reader a case lacks is 255 all over and has weight 0.

    Cases of different sizes are centred in the largest extent of each axis: images are filled up
    by reflection, labels with 255, which no loss and no metric sees.
    """
    if listing.num_classes and not 2 <= listing.num_classes <= IGNORE:
        raise DataError(f"{path}: num_classes is {listing.num_classes}; 2 to {IGNORE} can be")
    cases, images, masks = [listing.cases[i] for i in rows], [], []
    for case, (image, drawn) in zip(cases, _read_ahead(cases)):
        where = f"{path}: {case.name!r}"
        image = _as_image(image, f"{where}: image")
        if image.ndim not in (3, 4) or not image.size:
            raise DataError(f"{where}: image is {_times(image.shape[1:])}; (H, W) or (D, H, W) is "
                            "needed")
        if images and (image.ndim, len(image)) != (images[0].ndim, len(images[0])):
            raise DataError(f"{where}: image is {_times(image.shape)} (channels first), the first "
                            f"is {_times(images[0].shape)}; give as many channels and axes in all")
        for reader, mask in drawn.items():
            told = f"{where}: mask {reader}"
            drawn[reader] = (_as_label(mask, listing.num_classes or IGNORE, told)
                             if listing.fixed is None else _as_instances(mask, listing.fixed, told))
            if mask.shape != image.shape[1:]:
                raise DataError(f"{told} is {_times(mask.shape)} and its image "
                                f"{_times(image.shape[1:])}; they must be of one size")
        images.append(image)
        masks.append(drawn)

    size = np.max([image.shape[1:] for image in images], 0)
    readers = 1 + max((reader for drawn in masks for reader in drawn), default=0)
    stack = np.empty((len(cases), len(images[0]), *size), np.float32)
    kind = (np.uint8, IGNORE) if listing.fixed is None else (np.int32, -1)
    labels = np.full((len(cases), readers, *size), kind[1], kind[0])
    for i, (image, drawn) in enumerate(zip(images, masks)):
        images[i] = masks[i] = None  # frees them one by one
        stack[i] = _centred(image, size, mode=listing.pad)
        for reader, mask in drawn.items():
            labels[i, reader] = _centred(mask, size, constant_values=kind[1])
    names, groups = [case.name for case in cases], [case.group for case in cases]
    whole = Split(torch.from_numpy(stack), torch.from_numpy(labels), None, groups,
                  listing.num_classes, names, scored=listing.scored)
    if listing.fixed is not None:
        return _colour(replace(whole, instances=whole.labels[:, 0], fixed=listing.fixed))

    highest = labels[labels != IGNORE].max(initial=0)
    if highest == 0:
        raise DataError(f"{path}: no label between 0 and {IGNORE} in it: foreground is 1 and up, "
                        f"{IGNORE} means ignore (black and white masks, 0 and {IGNORE}: the data "
                        "set folder reads them with masks=binary)")
    whole.num_classes = listing.num_classes or int(highest) + 1
    odds = (labels != IGNORE).any(axis=tuple(range(2, labels.ndim)))  # (N, A): who read what
    uniform = listing.weights is None and odds.all()
    if listing.weights is not None:
        if not (np.isfinite(listing.weights) & (listing.weights >= 0)).all():
            raise DataError(f"{path}: weights: some are negative or not finite")
        odds = odds * listing.weights[list(rows)]
    total = odds.sum(1, keepdims=True)
    if not total.all():
        raise DataError(f"{path}: {names[int(total.argmin())]!r}: no mask of any reader (or only of"
                        " weight 0); give one, or leave the case out")
    if listing.flips:
        table, odds = (part.expand(len(whole), *part.shape) for part in listing.flips)
        return replace(whole, flips=table, weights=odds.float(), exact=True)
    return whole if uniform else replace(whole, weights=torch.from_numpy(odds / total).float())


def _read_ahead(cases: Iterable[_Case], threads: int = min(8, os.cpu_count() or 1)) -> Iterator:
    """What `read` of each case gives, in order; threads decode pictures side by side."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque = deque()
        for case in cases:
            ahead.append(pool.submit(case.read, *case.key))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _centred(array: np.ndarray, size: Sequence[int], **how) -> np.ndarray:
    """Fills the last axes up to `size`, as `center` does; `how` is numpy.pad's."""
    lead = array.ndim - len(size)
    low = [(want - have) // 2 for have, want in zip(array.shape[lead:], size)]
    widths = [(a, want - have - a) for a, have, want in zip(low, array.shape[lead:], size)]
    return np.pad(array, [(0, 0)] * lead + widths, **how) if np.any(widths) else array


def _as_image(image: np.ndarray, where: str) -> np.ndarray:
    if image.dtype.kind == "u" and image.dtype.itemsize <= 2:
        return image / np.float32(np.iinfo(image.dtype).max)
    if image.dtype.kind != "f":
        raise DataError(f"{where} is of {image.dtype}; give floats, or uint8 or uint16 (scaled to "
                        "[0, 1])")
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


def _as_instances(ids: np.ndarray, fixed: int, where: str) -> np.ndarray:
    """Ids from `fixed` on are numbered anew without gaps, so that tables of classes stay small."""
    good = ids >= -1 if ids.dtype.kind in "ui" else np.zeros(ids.shape, bool)
    if not good.all():
        raise DataError(f"{where} is of {ids.dtype}, its least {ids.min()}; instance ids are whole "
                        "numbers from 0 up, -1 is ignored")
    found = np.unique(ids[ids >= fixed])
    return np.where(ids < fixed, ids, fixed + np.searchsorted(found, ids)).astype(np.int32)


def _colour(whole: Split, maps: int = 4) -> Split:
    """Gives a Split with instances its fixed label maps, each case's a function of its name."""
    def draw(i: int, number: int) -> Tensor:
        ids = whole.instances[i:i + 1]
        generator = _generator(number, *whole.names[i].encode())
        return _relabel(ids, _random_classes(1, int(ids.max()) + 1, whole.fixed, whole.num_classes,
                                             generator))

    drawn = [torch.cat([draw(i, number) for i in range(len(whole))]) for number in range(maps)]
    return replace(whole, labels=torch.stack(drawn, 1))


# ------------------------------------------------------------------------- what is in one file


@contextlib.contextmanager
def _readable(file, what: str, errors=Exception):
    """Tells whatever goes wrong inside, where damaged bytes can raise nearly anything."""
    try:
        yield
    except DataError:
        raise
    except errors as error:
        raise DataError(f"{file}: not a readable {what}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _extra(module: str, file):
    """The optional package that reads `file`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{file}: {module} reads it: pip install {module}") from error


def _picture(file: Path) -> np.ndarray:
    """A picture (C, H, W), grey or RGB, of 8 or 16 bits or floats."""
    with _readable(file, _kind(file)), Image.open(file) as picture:
        if picture.mode not in ("L", "F", "RGB") and not picture.mode.startswith("I"):
            picture = picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
        array = np.asarray(picture)
    if array.dtype == np.int32 and 0 <= array.min() and array.max() < 2**16:
        array = array.astype(np.uint16)  # what some versions of Pillow make of 16 bits
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _label_picture(file: Path) -> np.ndarray:
    """A label map (H, W): grey levels or palette indices as they are."""
    with _readable(file, _kind(file)), Image.open(file) as picture:
        array = np.asarray(picture)
        if picture.format == "JPEG" or array.ndim != 2:
            raise DataError(f"{file}: a {picture.format} of {picture.mode}; a label map is a PNG or"
                            " TIFF of grey levels or palette indices (JPEG changes labels)")
    return array


def _kind(file: Path) -> str:
    return file.suffix[1:].upper()


def _pages(file: Path) -> np.ndarray:
    """A TIFF of several pages, (N, H, W)."""
    with _readable(file, "TIFF"), Image.open(file) as picture:
        return np.stack([np.asarray(page) for page in ImageSequence.Iterator(picture)])


def _npz(file: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    with _readable(file, ".npz of plain arrays"), open(file, "rb") as raw, \
            np.load(raw, allow_pickle=False) as archive:
        given = set(archive.files)
        arrays = {key: archive[key] for key in (*needed, *optional) if key in given}
    if not set(needed) <= given <= {*needed, *optional}:
        allowed = f", {', '.join(optional)} allowed" if optional else ""
        raise DataError(f"{file}: has the keys {', '.join(sorted(given)) or '(none)'}; "
                        f"{' and '.join(needed)} are needed{allowed}")
    return arrays


def read_nifti(file, dims: int | None = None) -> tuple[np.ndarray, object]:
    """A NIfTI file: (voxels (C, D, H, W), or (C, H, W) of a single slice unless dims=3; the nibabel
    image).

    Axes are turned, in steps of 90 degrees, so that W runs to the patient's left, H to the back and
    D to the head, as in DICOM: files stored in different orders agree. Raises DataError for a
    broken file and for voxels that are not finite real numbers.
    """
    nibabel = _extra("nibabel", file)
    with _readable(file, "NIfTI file"):
        source = nibabel.load(file)
        array = np.asarray(source.dataobj)
        array = array.reshape(*(array.shape + (1, 1, 1))[:3], -1)  # x, y, z, channel
        array = nibabel.apply_orientation(array, _turned(source)[0]).T
    if array.dtype.kind not in "buif":
        raise DataError(f"{file}: voxels of {array.dtype}; one real number each is needed, several "
                        "along the fourth axis")
    if not np.isfinite(array).all():
        raise DataError(f"{file}: some voxels are NaN or infinite; replace them first")
    return array if dims == 3 else array.reshape(_volume_shape(array)), source


def _volume_shape(array: np.ndarray) -> tuple[int, ...]:
    """(C, D, H, W), without the axis of a single slice."""
    thin = [axis for axis in (1, 2, 3) if array.shape[axis] == 1]
    return tuple(np.delete(array.shape, thin)) if len(thin) == 1 else array.shape


def _turned(source) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """The turn that `read_nifti` gives, as nibabel notes it; size (x, y, z) and affine after it."""
    from nibabel import orientations

    turn = orientations.ornt_transform(orientations.io_orientation(source.affine),
                                       orientations.axcodes2ornt("LPS"))
    size = (source.shape + (1, 1, 1))[:3]
    affine = source.affine @ orientations.inv_ornt_aff(turn, size)
    return turn, tuple(size[axis] for axis in turn[:, 0].argsort()), affine


def write_nifti(path, array: np.ndarray, source) -> None:
    """Write (D, H, W) or (n, D, H, W), or of a single slice (H, W) or (n, H, W), voxel for voxel
    over the nibabel image `source` from `read_nifti`: its shape, order of axes and affine. n is
    the file's fourth axis."""
    import nibabel

    size = _turned(source)[1]
    back = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("LPS"),
                                               nibabel.io_orientation(source.affine))
    array = nibabel.apply_orientation(array.reshape(-1, *size[::-1]).T, back)
    image = nibabel.Nifti1Image(array[..., 0] if array.shape[3] == 1 else array, source.affine,
                                source.header)
    image.header.set_data_dtype(array.dtype)
    image.header["cal_min"] = image.header["cal_max"] = 0  # the window of the original's values
    content = gzip.compress(image.to_bytes())
    write_atomically(path, lambda name: Path(name).write_bytes(content))


def _same_grid(source, other, file) -> None:
    """Refuse a file that lies elsewhere than its image, `source`: turned, it could fit wrongly."""
    (_, size, here), (_, _, there) = _turned(source), _turned(other)
    voxel = np.linalg.norm(here[:3, :3], axis=0).min()
    if (abs(here - there) @ [*size, 1]).max() > voxel / 2:
        image = Path(source.get_filename()).name
        raise DataError(f"{file}: its affine is not that of {image}; resample it onto that grid "
                        "or, if only the header is wrong, save it with that affine")


def standardised(volume: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Each channel of (C, *S) at mean 0 and standard deviation 1 inside (*S), and 0 outside."""
    volume = volume.astype(np.float32)
    for channel in volume:
        values = channel[inside].astype(np.float64)
        channel -= values.mean()
        channel /= values.std() or 1
    return volume * inside


def _resample(image: np.ndarray, label: np.ndarray, size: Sequence[int], file: Path):
    """(C, H, W) bilinear over the area that a new pixel covers, and (H, W) nearest, to `size`."""
    if image.shape[1:] != label.shape or min(size) < 1:
        raise DataError(f"{file}: image is {_times(image.shape[1:])} and its label "
                        f"{_times(label.shape)}; they must be of one size, and not be shrunk to 0")
    planes = [Image.fromarray(np.ascontiguousarray(plane)).resize(
        tuple(size)[::-1], Image.Resampling.BILINEAR) for plane in image]
    middles = [((np.arange(want) + 0.5) * have / want).astype(int)
               for want, have in zip(size, label.shape)]
    return np.stack([np.asarray(plane) for plane in planes]), label[np.ix_(*middles)]


# ------------------------------------------------------------------------------------ the readers


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
        """What a pickle may build: arrays and plain containers; UnpicklingError for all else."""
        internal = module.startswith(("numpy.core.", "numpy._core."))
        found = self.NUMPY.get(name) if internal else self.PLAIN.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it calls for {module}.{name}, which no array needs and "
                                         "which could run anything; it was not run")
        return found


def _read_lidc(path: Path, wanted: Sequence[str]) -> _Listing:
    """LIDC-IDRI in any of four layouts; the PNG tree and the HDF5 file have their own split."""
    if path.is_dir():
        return _png_tree(path)
    if path.suffix in _HDF5:
        return _hdf5(path, wanted)
    return _read_npz(path, wanted, 2, 0.2) if path.suffix == ".npz" else _lidc_pickle(path)


def _lidc_pickle(path: Path) -> _Listing:
    """The layout of the widely shared LIDC pickle: {key: {image, masks, series_uid}}."""
    with _readable(path, "pickle of arrays"), open(path, "rb") as file:
        table = _ArraysOnly(file).load()
    if not isinstance(table, dict):
        raise DataError(f"{path}: holds a {type(table).__name__}; give a dict "
                        "{key: {image, masks, series_uid}}")

    def read(key):
        record = table.pop(key)  # frees it: the real file has 15,096 cases of float64
        return record["image"][None], dict(enumerate(record["masks"]))

    cases = []
    for key, record in table.items():
        missing = {"image", "masks", "series_uid"} - set(record if isinstance(record, dict) else ())
        if missing:
            raise DataError(f"{path}: {key!r}: no {', '.join(sorted(missing))}; each case is a "
                            "dict of image, masks and series_uid")
        image, masks = record["image"], record["masks"]
        if not isinstance(image, np.ndarray) or not isinstance(masks, (list, tuple, np.ndarray)):
            raise DataError(f"{path}: {key!r}: image is a {type(image).__name__} and masks a "
                            f"{type(masks).__name__}; give an array and a list of arrays")
        cases.append(_Case(str(key), str(record["series_uid"]), read, (key,)))
    return _Listing(cases, split_groups([case.group for case in cases], val=0.2), 2)


def _png_tree(root: Path) -> _Listing:
    """The HPU-Net release: <part>/images/<patient>/<name>.png and gt/<patient>/<name>_l<r>.png.

    Readers may be numbered from 0 or from 1.
    """
    drawn: dict[Path, dict[int, Path]] = {}
    for file in root.glob("*/gt/*/*.png"):
        if found := re.fullmatch(r"(.+)_l(\d+)", file.stem):
            drawn.setdefault(file.with_name(found[1]), {})[int(found[2])] = file
    numbers = sorted(set().union(*drawn.values()))

    def read(file: Path, masks: dict[int, Path]):
        # Foreground is 1 in some copies, 255 in others, where it would read as "ignore".
        return _picture(file), {numbers.index(number): _label_picture(mask) > 0
                                for number, mask in masks.items()}

    cases, parts = [], {}
    for part in SPLITS:
        files = sorted((root / part / "images").glob("*/*.png"))
        parts[part] = list(range(len(cases), len(cases) + len(files)))
        for file in files:
            patient = file.parent.name
            masks = drawn.get(root / part / "gt" / patient / file.stem, {})
            cases.append(_Case(f"{part}/{patient}/{file.stem}", patient, read, (file, masks)))
    return _Listing(cases, parts, 2, own="no {part}/images/<patient>/*.png")


_HDF5 = (".h5", ".hdf5")


def _hdf5(path: Path, wanted: Sequence[str]) -> _Listing:
    """HDF5 made from the LIDC pickle (by PHiSeg's code, UNet-Zoo and what follows them).

    At the top, or in groups train, val and test: images (N, H, W), floats as they are (PHiSeg's are
    0.5 lower); labels or masks (N, H, W, A), (N, A, H, W) or (N, H, W); uids (N,), the series of
    each, if they are there, else every case is a group of its own. Names may begin with lidc_.
    """
    h5py = _extra("h5py", path)
    cases, parts = [], {part: [] for part in SPLITS}
    with _readable(path, "HDF5 file"), h5py.File(path, "r") as file:
        groups = {part: file[part] for part in SPLITS if part in file}
        for part, group in (groups or {"": file}).items():
            found = {key.removeprefix("lidc_"): group[key] for key in group}
            images, labels = found.get("images"), found.get("labels", found.get("masks"))
            if images is None or labels is None:
                raise DataError(f"{path}: /{part} holds {', '.join(group) or 'nothing'}; images "
                                "and labels (or masks) are needed")
            size, shape = images.shape, labels.shape
            if len(size) != 3 or size not in (shape, shape[:-1], shape[:1] + shape[2:]):
                raise DataError(f"{path}: /{part}: images are {_times(size)} and labels "
                                f"{_times(shape)}; (N, H, W) and (N, H, W, A) are needed")
            if part in wanted or not part:
                images, labels = images[()][:, None], labels[()]
                if len(shape) == 3:
                    labels = labels[:, None]
                elif shape[:3] == size:
                    labels = np.moveaxis(labels, -1, 1)
            names = [f"{part or 'case'}/{i:05d}" for i in range(len(images))]
            uids = found["uids"][()].tolist() if "uids" in found else names
            for i, (name, uid) in enumerate(zip(names, uids, strict=True)):
                parts.setdefault(part, []).append(len(cases))
                group = uid.decode() if isinstance(uid, bytes) else str(uid)
                cases.append(_Case(name, group, _row, (images, labels, i)))
    if parts.pop("", None):
        return _Listing(cases, split_groups([case.group for case in cases], val=0.2), 2)
    return _Listing(cases, parts, 2, own="the file has no such group")


def _row(images: np.ndarray, labels: np.ndarray, i: int):
    return images[i], dict(enumerate(labels[i]))


def _read_npz(path: Path, wanted: Sequence[str], num_classes: int, val: float = 0.25) -> _Listing:
    """A user's own .npz.

      images   (N, H, W), (N, C, H, W) or (N, C, D, H, W): float, or uint8 or uint16 scaled to
               [0, 1]
      labels   (N, A, H, W) or (N, A, D, H, W), always with the reader axis: 0..K-1, 255 = ignore
    and if wanted: weights (N, A), normalised row by row; groups (N,), such as the patient of each
    case; names (N,); num_classes, else the largest label + 1. Images with one axis fewer than the
    labels have one channel and no axis for it. A reader's map of nothing but 255 is a missing one.
    """
    optional = ("weights", "groups", "names", "num_classes")
    arrays = _npz(path, ("images", "labels"), optional)
    images, labels = arrays["images"], arrays["labels"]
    shape = labels.shape
    images = images[:, None] if images.ndim == labels.ndim - 1 else images
    if len(shape) not in (4, 5) or images.shape[:1] + images.shape[2:] != shape[:1] + shape[2:]:
        raise DataError(f"{path}: labels is {_times(shape)} and images "
                        f"{_times(arrays['images'].shape)}; (N, A, H, W) must meet (N, H, W) or "
                        "(N, C, H, W) (of a single reader? store labels[:, None])")
    sizes = {"weights": shape[:2], "groups": shape[:1], "names": shape[:1], "num_classes": ()}
    for key in arrays.keys() & set(optional):
        number = arrays[key].dtype.kind in "buif" or key in ("groups", "names")
        if arrays[key].shape != sizes[key] or not number:
            raise DataError(f"{path}: {key} is {_times(arrays[key].shape)} of {arrays[key].dtype}; "
                            f"{_times(sizes[key])} is needed")
    num_classes = num_classes or int(arrays.get("num_classes", 0))
    names = [str(name) for name in arrays.get("names", range(len(labels)))]
    groups = [str(group) for group in arrays.get("groups", names)]
    cases = [_Case(name, group, _row, (images, labels, i))
             for i, (name, group) in enumerate(zip(names, groups))]
    return _Listing(cases, split_groups(groups, val), num_classes, weights=arrays.get("weights"))


_FOLDER = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".nii", ".nii.gz")


def is_nifti(file: Path) -> bool:
    """By its name."""
    return file.name.lower().endswith(_FOLDER[-2:])


def _read_folder(path: Path, wanted: Sequence[str], num_classes: int, masks: str) -> _Listing:
    """Anyone's own images: images/NAME.png and labels/READER/NAME.png, a folder for each reader.

    Pictures of any kind in `_FOLDER`; their labels are PNG or TIFF, grey levels or palette indices
    from 0 to K - 1, with 255 to ignore. With masks=binary whatever is not 0 is class 1. Or volumes:
    .nii.gz (or .nii) on both sides, channels brought to mean 0 and deviation 1; one of a single
    slice is 2D. A reader may lack some of the images. groups.csv, lines of NAME,GROUP, tells which
    cases are of one patient.
    """
    def by_name(folder: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for file in sorted(folder.iterdir()):
            if file.name.startswith(".") or file.is_dir():
                continue
            end = [suffix for suffix in _FOLDER if file.name.lower().endswith(suffix)]
            if not end:
                raise DataError(f"{file}: not one of {', '.join(_FOLDER)}; convert or remove it")
            other = found.setdefault(file.name[:-len(end[0])], file)
            if other is not file:
                raise DataError(f"{file}: {other.name} beside it has the same name; rename one")
        return found

    def read(name: str):
        drawn = {reader: files[name] for reader, files in enumerate(readers) if name in files}
        if is_nifti(images[name]):
            image, source = read_nifti(images[name])
            image = standardised(image, np.ones(image.shape[1:], bool))
            for reader, file in drawn.items():
                label, other = read_nifti(file)
                _same_grid(source, other, file)
                drawn[reader] = label[0] if len(label) == 1 else label
        else:
            image = _picture(images[name])
            drawn = {reader: _label_picture(file) for reader, file in drawn.items()}
        if masks == "binary":
            drawn = {reader: label != 0 for reader, label in drawn.items()}
        return image, drawn

    images = by_name(path / "images")
    readers = [by_name(folder) for folder in sorted((path / "labels").iterdir())
               if folder.is_dir()]
    for files in readers:
        for name in files.keys() - images.keys():
            raise DataError(f"{files[name]}: images/ holds none of that name")
    groups = dict.fromkeys(images)
    if (path / "groups.csv").exists():
        with _readable(path / "groups.csv", "table of name,group"):
            lines = (path / "groups.csv").read_text(encoding="utf-8-sig").splitlines()
            table = {name: group for name, group in csv.reader(filter(None, lines))}
        table.pop("name", None)  # the heading
        if odd := sorted(table.keys() ^ images.keys()):
            raise DataError(f"{path / 'groups.csv'}: {odd[0]!r} is there or in images/, not in "
                            "both; list every image once")
        groups = table
    cases = [_Case(name, groups[name] or name, read, (name,)) for name in images]
    return _Listing(cases, split_groups([case.group for case in cases], val=0.25), num_classes)


def _read_em(path: Path, wanted: Sequence[str], tile: int) -> _Listing:
    """Sections of electron microscopy with instances, 0 = membrane (HPU-Net's SNEMI3D task).

    An .npz of images and instances (N, H, W), or the SNEMI3D stacks train-input.tif and
    train-labels.tif in a folder. Cases are the tiles of `tile` pixels a side that fit into a
    section, whole sections with tile=0. The last tenth of the sections (rounded up) is test, the
    tenth before it validation: the paper's 80 / 10 / 10 of 100 sections, 1280 / 160 / 160 tiles.
    """
    if path.is_dir():
        images, ids = (_pages(path / f"train-{kind}.tif") for kind in ("input", "labels"))
    else:
        images, ids = _npz(path, ("images", "instances")).values()
    if images.shape != ids.shape or images.ndim != 3 or min(images.shape[1:]) < tile:
        raise DataError(f"{path}: images are {_times(images.shape)} and instances "
                        f"{_times(ids.shape)}; both must be (N, H, W), H and W from {tile} up (or "
                        "give another tile)")

    def read(i: int, y: int, x: int):
        cut = (i, slice(y, y + tile), slice(x, x + tile)) if tile else i
        return images[cut][None], {0: ids[cut]}

    count, *size = images.shape
    steps = [range(0, side - tile + 1, tile) if tile else (0,) for side in size]
    corners = list(itertools.product(range(count), *steps))
    cases = [_Case(f"section-{i:04d}" + (f"/y{y:04d}-x{x:04d}" if tile else ""),
                   f"section-{i:04d}", read, (i, y, x)) for i, y, x in corners]
    tenth = math.ceil(count / 10)
    ends = {"train": (0, count - 2 * tenth), "val": (count - 2 * tenth, count - tenth),
            "test": (count - tenth, count)}
    parts = {part: [k for k, (i, *_) in enumerate(corners) if low <= i < high]
             for part, (low, high) in ends.items()}
    return _Listing(cases, parts, 16, fixed=1)


# The ids of the 19 classes in Cityscapes' files, in the order of their train ids.
_CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITY_FLIPS = (1, 11, 13, 8, 0)  # train ids of `_FLIPS`
_CITY_CAR = 26
_CITY_VAL = ("darmstadt", "monchengladbach", "ulm")


def _read_cityscapes(path: Path, wanted: Sequence[str], task: str, factor: int) -> _Listing:
    """Cityscapes as published: leftImg8bit/{train,val}/<city>/ and gtFine/ beside it.

    Test is the published val; validation is Darmstadt, Moenchengladbach and Ulm of train, as both
    papers have it. Void classes are 255. Images are `factor` times smaller.
      task=modes  the Probabilistic U-Net's: 19 classes by train id, five of which flip to the
                  classes 19 to 23, as `_FLIPS` says; factor 4. IoU is scored on these ten.
      task=cars   HPU-Net's (App. C, D.3): the 18 other classes in their order, then five labels,
                  one of which every car has at random; factor 2. IoU is scored on these five. Cars
                  that were outlined as one group are ignored.
    """
    factor = factor or {"modes": 4, "cars": 2}[task]
    classes = [i for i in _CITY_IDS if task == "modes" or i != _CITY_CAR]
    table = np.full(256, -1, np.int32)
    table[classes] = range(len(classes))

    def read(file: Path, truth: Path):
        image, ids = _picture(file), _label_picture(truth)
        image, ids = _resample(image, ids.astype(np.int32), [side // factor for side in ids.shape],
                               file)
        # A numbered instance is 1000 * class + number; the rest is told by its class alone.
        label = table[np.minimum(np.where(ids < 1000, ids, ids // 1000), IGNORE)]
        if task == "cars":
            return image, {0: np.where(ids // 1000 == _CITY_CAR, len(classes) + ids % 1000, label)}
        return image, {0: np.where(label < 0, IGNORE, label)}

    cases, parts = [], {part: [] for part in SPLITS}
    kind = "instanceIds" if task == "cars" else "labelIds"
    for half in ("train", "val"):
        for file in sorted((path / "leftImg8bit" / half).glob("*/*_leftImg8bit.png")):
            city, name = file.parent.name, file.stem.removesuffix("_leftImg8bit")
            truth = path / "gtFine" / half / city / f"{name}_gtFine_{kind}.png"
            part = "test" if half == "val" else "val" if city in _CITY_VAL else "train"
            parts[part].append(len(cases))
            cases.append(_Case(name, city, read, (file, truth)))
    own, twins = "leftImg8bit/ holds none of its cities", range(len(classes), len(classes) + 5)
    if task == "cars":
        return _Listing(cases, parts, twins.stop, own, fixed=twins.start, scored=tuple(twins))
    return _Listing(cases, parts, twins.stop, own, flips=_flip_modes(_CITY_FLIPS, twins.start),
                    scored=(*sorted(_CITY_FLIPS), *twins))


def _read_synapse(path: Path, wanted: Sequence[str], size: int) -> _Listing:
    """Synapse's abdominal CT as TransUNet's authors share it: eight organs, slice by slice.

    train_npz/caseXXXX_sliceYYY.npz of image and label (H, W); test_vol_h5/caseXXXX.npy.h5 of the
    same (D, H, W), taken slice by slice. A fifth of the training volumes is validation. Slices are
    resampled to `size` pixels a side (the paper's 224), or not at all with size=0.
    """
    def read(file: Path, i: int | None = None):
        if i is None:
            image, label = _npz(file, ("image", "label")).values()
        else:
            with _readable(file, "HDF5 file"), h5py.File(file, "r") as volume:
                image, label = volume["image"][i], volume["label"][i]
        image = np.asarray(image, np.float32)[None]
        if size:
            image, label = _resample(image, label, (size, size), file)
        return image, {0: label}

    files = sorted((path / "train_npz").glob("case????_slice*.npz"))
    cases = [_Case(file.stem, file.stem[:8], read, (file,)) for file in files]
    parts = split_groups([case.group for case in cases], val=0.2, test=0)
    volumes = sorted((path / "test_vol_h5").glob("case????.npy.h5"))
    if volumes and ("test" in wanted or importlib.util.find_spec("h5py")):
        h5py = _extra("h5py", volumes[0])
        for file in volumes:
            with _readable(file, "HDF5 file"), h5py.File(file, "r") as volume:
                cases += [_Case(f"{file.name[:8]}_slice{i:03d}", file.name[:8], read, (file, i))
                          for i in range(len(volume["image"]))]
    parts["test"] = list(range(len(files), len(cases)))
    return _Listing(cases, parts, 9, own="train_npz/ (train, val) or test_vol_h5/ (test) is empty")


BRATS = ("flair", "t1", "t1ce", "t2")


def read_brats(folder: Path) -> tuple[np.ndarray, np.ndarray, object]:
    """A patient of BraTS: (channels (4, D, H, W); the brain (D, H, W), where any of them is not 0;
    the nibabel image of the first)."""
    files = {kind: _only(folder, kind) for kind in BRATS}
    volumes = {kind: read_nifti(file, 3) for kind, file in files.items()}
    if len({array.shape for array, _ in volumes.values()}) > 1:
        sizes = (f"{kind} {_times(array.shape[1:])}" for kind, (array, _) in volumes.items())
        raise DataError(f"{folder}: the volumes are not of one size: {', '.join(sizes)}")
    source = volumes[BRATS[0]][1]
    for kind in BRATS[1:]:
        _same_grid(source, volumes[kind][1], files[kind])
    image = np.concatenate([array for array, _ in volumes.values()])
    brain = (image != 0).any(0)
    if not brain.any():
        raise DataError(f"{folder}: all channels are 0 everywhere")
    return image, brain, source


def _only(folder: Path, kind: str) -> Path:
    """The patient's file of that kind."""
    files = list(folder.glob(f"*_{kind}.nii*"))
    if len(files) != 1:
        raise DataError(f"{folder}: {len(files)} files *_{kind}.nii.gz; give one")
    return files[0]


def bounding_box(inside: np.ndarray) -> tuple[slice, ...]:
    """The tightest box round what is true."""
    return tuple(slice(line.min(), line.max() + 1) for line in np.nonzero(inside))


def _read_brats(path: Path, wanted: Sequence[str]) -> _Listing:
    """BraTS: a folder a patient with *_flair, *_t1, *_t1ce, *_t2 and *_seg.nii.gz (SSN, Sec. 5.3).

    Four channels in that order, each at mean 0 and deviation 1 inside the brain, where any of them
    is not 0. Air is 0, and 255 in the labels, as SSN masks it out. Labels 0, 1, 2, 4 become 0 to 3.
    Volumes are cut to the brain (about 80 MB a patient) and filled up with air to the largest.
    60 / 10 / 30 % of the patients are train, val and test; `split_file` takes published lists.
    """
    def read(folder: Path):
        image, brain, source = read_brats(folder)
        file = _only(folder, "seg")
        seg, other = read_nifti(file, 3)
        if seg.shape != (1, *brain.shape):
            raise DataError(f"{folder}: the volumes are not of one size: seg {_times(seg.shape)}, "
                            f"flair {_times((1, *brain.shape))}")
        _same_grid(source, other, file)
        seg = seg[0]
        if not np.isin(seg, (0, 1, 2, 4)).all():
            raise DataError(f"{folder}: seg has other labels than 0, 1, 2 and 4")
        label = np.where(brain, np.where(seg == 4, 3, seg), IGNORE)
        box = bounding_box(brain)
        return standardised(image[(slice(None), *box)], brain[box]), {0: label[box]}

    # Patients in folders of their own, or in HGG/ and LGG/; a link that leads back counts once.
    found = {os.path.realpath(file.parent): file.parent for depth in ("*/", "*/*/")
             for file in sorted(path.glob(f"{depth}*_seg.nii*"))}
    cases = [_Case(folder.name, folder.name, read, (folder,)) for folder in found.values()]
    parts = split_groups([case.group for case in cases], val=1 / 7, test=0.3)
    return _Listing(cases, parts, 4, own="too few patients", pad="constant")


def _locate(name: str, path, source: "Source") -> Path:
    """The file, or the folder in a known layout, meant by `path`, or by datasets/<name>."""
    place = Path("datasets", name) if path is None else Path(path)
    if place.is_dir() and any(True for mark in source.marks for _ in place.glob(mark)):
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

    read: Callable  # (**options) -> whole Split, {split: indices}; real: (path, splits, **options)
    doc: str
    options: dict[str, tuple]  # name: (default, smallest number, choices or str)
    suffixes: tuple[str, ...] = ()  # of files that are the set
    layout: str = ""  # what to put where, told when nothing is found
    marks: tuple[str, ...] = ()  # what a folder holds that is the set (patterns)

    @property
    def real(self) -> bool:
        """Whether it is read from files; made sets are not."""
        return bool(self.layout)


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
                   (".pickle", ".pkl", ".npz", *_HDF5),
                   "a pickle {key: {image, masks, series_uid}} (data_lidc.pickle, linked from "
                   "github.com/stefanknegt/Probabilistic-Unet-Pytorch), the PNG tree "
                   "{train,val,test}/{images,gt}/<patient>/ (gs://hpunet-data/lidc_crops), an .npz "
                   "as for the data set npz (python data.py build-lidc makes it of the archive's "
                   "DICOM and XML), HDF5 of groups train, val, test with images and labels",
                   tuple(f"{part}/images" for part in SPLITS)),
    "npz": Source(_read_npz, "your own: images (N, H, W) and labels (N, A, H, W), or in 3D",
                  {"num_classes": (0, 0)}, (".npz",),
                  "an .npz with images (N, H, W), (N, C, H, W) or (N, C, D, H, W) and labels "
                  "(N, A, H, W) or (N, A, D, H, W), and if wanted weights, groups, names, "
                  "num_classes"),
    "folder": Source(_read_folder, "your own: pictures or NIfTI volumes, a folder for each reader",
                     {"num_classes": (0, 0), "masks": ("classes", ("classes", "binary"))}, (),
                     "a folder with images/NAME.png, labels/READER/NAME.png and, if wanted, "
                     "groups.csv of lines NAME,GROUP; also .tif, .jpg (images), .nii.gz",
                     ("images",)),
    "em": Source(_read_em, "sections of electron microscopy, each cell one of 15 classes at random",
                 {"tile": (256, 0)}, (".npz",),
                 "an .npz of images and instances (N, H, W), 0 = membrane, or a folder with "
                 "train-input.tif and train-labels.tif (snemi3d.grand-challenge.org)",
                 ("train-input.tif",)),
    "cityscapes": Source(_read_cityscapes, "street scenes; five classes flip, or cars are coloured",
                         {"task": ("modes", ("modes", "cars")), "factor": (0, 0)}, (),
                         "a folder with leftImg8bit/{train,val}/<city>/ and gtFine/{train,val}/"
                         "<city>/ (leftImg8bit_trainvaltest and gtFine_trainvaltest of "
                         "cityscapes-dataset.com)", ("leftImg8bit",)),
    "synapse": Source(_read_synapse, "abdominal CT, slice by slice, eight organs",
                      {"size": (224, 0)}, (),
                      "a folder with train_npz/caseXXXX_sliceYYY.npz and test_vol_h5/"
                      "caseXXXX.npy.h5 (github.com/Beckschen/TransUNet, datasets/README.md)",
                      ("train_npz", "test_vol_h5")),
    "brats": Source(_read_brats, "brain tumours in 3D, four channels of MR, three classes", {}, (),
                    "a folder of folders, one a patient, with *_flair, *_t1, *_t1ce, *_t2 and "
                    "*_seg.nii.gz (the training data of BraTS 2017 to 2021)",
                    ("*/*_seg.nii*", "*/*/*_seg.nii*")),
}


# ---------------------------------------------------------- LIDC-IDRI from the archive's own files
#
# build-lidc goes the papers' way (Prob. U-Net, arXiv:1806.05034, Sec. 4.1 and App. H.1; HPU-Net,
# arXiv:1905.13077, App. C), a function a step. What they leave open is settled like this:
#
#   readings  of the second, unblinded round. A nodule >= 3 mm is one with outlines; those of a
#             single point, smaller, and non-nodules are left out. Readers are numbered as in the
#             XML, where their order means nothing. Fewer than four: the others' maps are 255.
#   masks     LIDC's outlines run over the first pixels *outside* the nodule. Inside are the pixel
#             centres strictly inside the polygon, by the even-odd rule, in whole numbers. A hole
#             (inclusion FALSE) takes away its inside and its outline.
#   lesions   are found in the scan, not slice by slice: nodules of different readers whose boxes
#             (rows, columns, slices) share a voxel are one, and so on from nodule to nodule. A crop
#             shows the masks of its own lesion only.
#   slices    are dropped where |SliceLocation| and |ImagePositionPatient[-1]| differ by more than
#             0.01 mm; a slice without SliceLocation stays.
#   crops     The slice, from its corner on, is cut into pixels of 0.5 mm; at their centres images
#             are interpolated linearly, and masks take the nearest pixel. The middle of the box
#             round all the lesion's masks lies in the crop's pixel (size // 2, size // 2). Outside
#             the slice there is air. A slice on which no mask has a pixel left is no case.
#   window    -1000 to 400 HU become 0 to 1, stored as the nearest of 256 steps of 5.5 HU.

LIDC_READERS = 4
LIDC_PIXEL = 0.5  # mm
LIDC_WINDOW = (-1000.0, 400.0)  # HU


class CTSlice(NamedTuple):
    """What `read_dicom` takes from a file."""

    uid: str  # SOPInstanceUID
    series: str  # SeriesInstanceUID
    patient: str
    modality: str
    shape: tuple[int, ...]  # rows, columns
    spacing: tuple[float, ...]  # mm between rows, mm between columns
    z: float | None  # ImagePositionPatient[-1], mm
    location: float | None  # SliceLocation, mm
    hu: np.ndarray | None  # (H, W) float32, Hounsfield units


def read_dicom(path, pixels: bool = False) -> CTSlice | None:
    """The slice in a DICOM file, its pixels only where asked for; None for any other file.

    The one place that needs pydicom (ImportError says how to get it). A damaged file raises what
    pydicom raises.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ImportError("reading DICOM files takes pydicom: pip install pydicom") from error
    with warnings.catch_warnings():  # remarks on values that nobody reads here
        warnings.simplefilter("ignore")
        try:
            file = pydicom.dcmread(path, stop_before_pixels=not pixels)
        except pydicom.errors.InvalidDicomError:
            return None
        if "SOPInstanceUID" not in file or "SeriesInstanceUID" not in file:
            return None  # a DICOMDIR

        def numbers(name: str) -> tuple[float, ...]:
            value = file.get(name)
            return tuple(np.array([] if value is None else value, float).ravel().tolist())

        hu = None
        if pixels:
            stored = file.pixel_array.astype(np.float32)
            hu = stored * np.float32(file.RescaleSlope) + np.float32(file.RescaleIntercept)
        return CTSlice(str(file.SOPInstanceUID), str(file.SeriesInstanceUID),
                       str(file.get("PatientID", "")), str(file.get("Modality", "")),
                       (int(file.get("Rows", 0)), int(file.get("Columns", 0))),
                       numbers("PixelSpacing"), *(numbers("ImagePositionPatient")[-1:] or [None]),
                       *(numbers("SliceLocation") or [None]), hu)


def _reading(raw: bytes):
    """A reader's XML -> (series UID, sessions), or None where it is no reading of a CT scan.

    sessions[reader][nodule] = {slice UID: [(part of the nodule, not a hole; [(x, y), ...]), ...]}.
    Names count, whatever their namespace.
    """
    def refuse(*_):
        raise DataError("declares a document type: no reading needs one, and entities can explode")

    guard = expat.ParserCreate()
    guard.StartDoctypeDeclHandler = refuse  # comes before any entity
    guard.Parse(raw, True)
    root = ElementTree.fromstring(raw)
    if root.tag.rpartition("}")[2] != "LidcReadMessage":
        return None  # of a chest X-ray (IdriReadMessage), or something else altogether
    series = [field.text.strip() for field in root.findall("{*}ResponseHeader/*") if field.text
              and field.tag.rpartition("}")[2].lower() == "seriesinstanceuid"]
    if not series:
        raise DataError("names no SeriesInstanceUid")
    try:
        sessions = [[_outlines(nodule) for nodule in session.findall("{*}unblindedReadNodule")]
                    for session in root.findall("{*}readingSession")]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError("a roi is not as LIDC writes it (imageSOP_UID, inclusion TRUE or FALSE, "
                        "edgeMaps of whole xCoord and yCoord)") from error
    return series[0], [[nodule for nodule in drawn if nodule] for drawn in sessions]


def _outlines(nodule: ElementTree.Element) -> dict[str, list]:
    """{slice UID: [(part of the nodule, points)]} of a nodule >= 3 mm; {} for a smaller one."""
    outlines = {}
    for roi in nodule.findall("{*}roi"):
        points = [(int(edge.findtext("{*}xCoord")), int(edge.findtext("{*}yCoord")))
                  for edge in roi.findall("{*}edgeMap")]
        part = {"TRUE": True, "FALSE": False}[roi.findtext("{*}inclusion").strip().upper()]
        if len(points) > 1:
            outlines.setdefault(roi.findtext("{*}imageSOP_UID").strip(), []).append((part, points))
    return outlines


def _fill(points: list[tuple[int, int]], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The closed polygon of `points` (x, y): pixel centres inside it and on it, both (H, W) bool.

    Exact. A centre is inside if the ray to its right crosses the polygon an odd number of times.
    """
    if any(not (0 <= x < shape[1] and 0 <= y < shape[0]) for x, y in points):
        raise DataError(f"an outline leaves its slice of {_times(shape)} pixels")
    inside, outline = np.zeros((2, *shape), bool)
    x = np.arange(shape[1])
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        low, high = sorted((y0, y1))
        y = np.arange(low, high + 1)[:, None]
        side = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)  # 0 on the edge's line
        outline[low:high + 1] |= (side == 0) & (x >= min(x0, x1)) & (x <= max(x0, x1))
        inside[low:high] ^= (side * (y1 - y0) > 0)[:-1]  # row `high` belongs to the next edge
    return inside & ~outline, outline


class _Nodule(NamedTuple):
    """What one reader drew of one lesion."""

    reader: int
    pixels: dict[float, np.ndarray]  # z in mm: (P, 2) rows and columns

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest (z, row, column)."""
        ends = [(z, *end) for z, at in self.pixels.items() for end in (at.min(0), at.max(0))]
        return np.min(ends, 0), np.max(ends, 0)


def _nodule(reader: int, outlines: dict[str, list], slices: dict[str, CTSlice]) -> _Nodule:
    """The masks of a nodule in those of its slices that there are."""
    pixels = {}
    for uid in outlines.keys() & slices.keys():
        mask, hole = np.zeros((2, *slices[uid].shape), bool)
        for part, points in outlines[uid]:
            inside, outline = _fill(points, slices[uid].shape)
            if part:
                mask |= inside
            else:
                hole |= inside | outline
        drawn = np.argwhere(mask & ~hole)
        if len(drawn):
            pixels[slices[uid].z] = np.concatenate([drawn, pixels.get(slices[uid].z, drawn[:0])])
    return _Nodule(reader, pixels)


def _lesions(nodules: list[_Nodule]) -> list[list[_Nodule]]:
    """Nodules of different readers are one lesion where their tightest boxes overlap."""
    boxes, lesion = [nodule.box() for nodule in nodules], list(range(len(nodules)))
    for i, j in itertools.combinations(range(len(nodules)), 2):
        overlap = np.maximum(boxes[i][0], boxes[j][0]) <= np.minimum(boxes[i][1], boxes[j][1])
        if nodules[i].reader != nodules[j].reader and overlap.all():
            lesion = [lesion[i] if number == lesion[j] else number for number in lesion]
    return [[nodule for nodule, number in zip(nodules, lesion) if number == wanted]
            for wanted in dict.fromkeys(lesion)]


def _crop_lines(lesion: list[_Nodule], spacing: Sequence[float], size: int) -> list[np.ndarray]:
    """Where the crop's rows and columns lie in the slice: two (size,), in pixels of the slice."""
    lows, highs = zip(*[nodule.box() for nodule in lesion])
    lines = []
    for low, high, mm in zip(np.min(lows, 0)[1:], np.max(highs, 0)[1:], spacing):
        step = LIDC_PIXEL / mm
        middle = math.floor((low + high + 1) / 2 / step)  # pixel k covers k to k + 1 steps
        lines.append((middle - size // 2 + np.arange(size) + 0.5) * step - 0.5)
    return lines


def _crop(image: np.ndarray, lines: list[np.ndarray], outside: float, linear: bool) -> np.ndarray:
    """`image` (H, W) at the crossings of `lines`, to the nearest pixel or linear between pixels."""
    there = [(line >= -0.5) & (line < length - 0.5) for line, length in zip(lines, image.shape)]
    for axis, line in enumerate(lines):
        last = image.shape[axis] - 1
        if linear:
            low = np.floor(line.clip(0, last)).astype(int)
            share = np.expand_dims(line.clip(0, last) - low, 1 - axis).astype(image.dtype)
            image = (image.take(low, axis) * (1 - share)
                     + image.take((low + 1).clip(max=last), axis) * share)
        else:
            image = image.take(np.rint(line).astype(int).clip(0, last), axis)
    return np.where(np.outer(*there), image, outside).astype(image.dtype)


class _Series(NamedTuple):
    """A scan to be cut."""

    uid: str
    patient: str
    reading: str  # XML file
    files: dict[str, list[str]]  # outlined slice UID: its DICOM files, more than one if copied


def _cut(task: _Series, size: int, window: tuple[float, float], read: Callable):
    """One series -> arrays of its n cases and `dropped`, the number of outlined slices left out."""
    sessions = _reading(Path(task.reading).read_bytes())[1]
    if len(sessions) > LIDC_READERS:
        raise DataError(f"{task.reading} has {len(sessions)} readingSessions; a scan has "
                        f"{LIDC_READERS} readers")
    outlined = {uid for nodules in sessions for nodule in nodules for uid in nodule}
    slices = {uid: read(files[0]) for uid, files in sorted(task.files.items())}
    slices = {uid: found._replace(z=round(found.z, 3)) for uid, found in slices.items()
              if _agrees(found)}
    if outlined and not slices:
        raise DataError("its outlined slices are not there, or in all of them SliceLocation and "
                        "ImagePositionPatient disagree")
    if len({(found.shape, found.spacing) for found in slices.values()}) > 1:
        raise DataError("its slices differ in size or PixelSpacing")

    nodules = [_nodule(reader, nodule, slices)
               for reader, drawn in enumerate(sessions) for nodule in drawn]
    lesions = _lesions([nodule for nodule in nodules if nodule.pixels])
    lines = [_crop_lines(lesion, next(iter(slices.values())).spacing, size) for lesion in lesions]
    images, labels, where = [], [], []
    for z in sorted({z for nodule in nodules for z in nodule.pixels}):
        hu = _pixels([file for uid, found in slices.items() if found.z == z
                      for file in task.files[uid]], read)
        for number, lesion in enumerate(lesions):
            masks = _masks(lesion, z, hu.shape, lines[number])
            if masks.any():
                masks[len(sessions):] = IGNORE
                images.append(_grey(_crop(hu, lines[number], window[0], linear=True), window))
                labels.append(masks)
                where.append((z, number))
    count = len(where)
    return dict(images=np.array(images, np.uint8).reshape(count, size, size),
                labels=np.array(labels, np.uint8).reshape(count, LIDC_READERS, size, size),
                z=np.array([z for z, _ in where]), dropped=len(outlined - slices.keys()),
                lesion=np.array([number for _, number in where], int))


def _masks(lesion: list[_Nodule], z: float, shape, lines: list[np.ndarray]) -> np.ndarray:
    """The readers' crops of a lesion at z, (A, size, size); empty for those who drew nothing."""
    masks = np.zeros((LIDC_READERS, *map(len, lines)), np.uint8)
    for nodule in lesion:
        if z in nodule.pixels:
            mask = np.zeros(shape, np.uint8)
            mask[tuple(nodule.pixels[z].T)] = 1
            masks[nodule.reader] |= _crop(mask, lines, 0, linear=False)
    return masks


def _grey(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Hounsfield units -> uint8, the window's ends to 0 and 255."""
    share = (hu - window[0]) / (window[1] - window[0])
    return np.rint(255 * share.clip(0, 1)).astype(np.uint8)


def _agrees(found: CTSlice) -> bool:
    """Whether the slice's two places agree; DataError where it has no place or no scale."""
    if found.z is None or not math.isfinite(found.z):
        raise DataError(f"slice {found.uid} has no ImagePositionPatient")
    if len(found.spacing) != 2 or not all(0.1 <= mm <= 5 for mm in found.spacing):
        raise DataError(f"slice {found.uid} has the PixelSpacing {found.spacing}; two numbers of "
                        "0.1 to 5 mm can be")
    return found.location is None or abs(abs(found.location) - abs(found.z)) <= 0.01


def _pixels(files: list[str], read: Callable) -> np.ndarray:
    """The Hounsfield units at one place of the scan, in `files` that must not contradict."""
    first, *others = [read(file, pixels=True).hu for file in files]
    if first.ndim != 2 or not np.isfinite(first).all():
        raise DataError(f"{files[0]}: its pixels are {_times(first.shape)}, or not all are finite")
    if not all(np.array_equal(first, other) for other in others):
        raise DataError(f"several slices at one place, and not the same: {', '.join(files)}")
    return first


# So much for one series; from here on: all files, processes, resuming, writing.


def build_lidc(src, dst, *, size: int = 180, window: tuple[float, float] = LIDC_WINDOW, png=None,
               workers: int = 1, read: Callable = read_dicom) -> None:
    """LIDC-IDRI as the archive serves it, in `src` -> `dst`, an .npz for `load("lidc")`.

    Folders may nest in any way; a series and its XML are matched by their UIDs. `png` names a
    folder for the same crops as PNGs, in the layout of the HPU-Net release. `dst` and `png` appear
    whole or not at all. What is done is kept in `dst`.work, so a run that was stopped goes on
    there; it may be deleted once `dst` is there. A bad file or series is told and left out.

    `read` is what reads a file. Raises DataError for what the user can mend.
    """
    src, dst, png = Path(src), Path(dst), png and Path(png)
    if not src.is_dir() or dst.suffix != ".npz":
        raise DataError(f"{src} -> {dst}: give a folder, and a file name that ends in .npz")
    if size < 2 or not -math.inf < window[0] < window[1] < math.inf or workers < 1:
        raise DataError(f"size {size}, window {window}, {workers} workers: give at least 2 pixels, "
                        "a lower and a higher number of HU, and at least 1 worker")
    work, settings = dst.with_name(dst.name + ".work"), [str(src.resolve()), size, *window]
    report = work / "report.json"
    known = json.loads(report.read_text()) if report.exists() else {"settings": None}
    there = [place for place in (dst, png) if place and place.exists()]
    if there and known["settings"] != settings:
        raise DataError(f"{there[0]} is there, and not known to be built like this (from {src}, "
                        f"size {size}, window {window}): delete it, or give another name")
    if dst in there and (not png or png in there):
        print(*known["lines"], f"{dst} is there: nothing to do", sep="\n")
        return
    work.mkdir(parents=True, exist_ok=True)
    for folder, prefix in ((work, "."), (dst.parent, f".{dst.name}."),
                           *([(png.parent, f".{png.name}.")] if png else [])):
        _clear(folder, prefix)

    with _Workers(workers) as pool:
        refused, calls = [], []
        files = list(_walk(src, work, refused))
        for start in range(0, len(files), 256):
            stamps = [_stamp(file) for file in files[start:start + 256]]
            calls.append((stamps, work / f"files-{_key(stamps)}.json", read))
        refused += itertools.chain(*pool.each(_look, calls, "blocks of 256 files"))
        tasks, unmatched = _match([target for _, target, _ in calls])
        calls = []
        for task in tasks:
            stamps = [_stamp(file) for file in (task.reading, *sum(task.files.values(), []))]
            key = _key("cut-1", size, window, task, stamps)
            calls.append((task, work / f"series-{key}.npz", size, window, read))
        refused += [*unmatched, *filter(None, pool.each(_build_series, calls, "series"))]
    cases = _Cases([(task.patient, target) for task, target, *_ in calls if target.exists()])
    if not cases.names:
        raise DataError("; ".join([f"{src}: nothing to cut", *map(": ".join, refused[:3])]))
    made = [target.name for target in cases.targets]
    if there and known["made"] != made:
        raise DataError(f"{src} has changed since {there[0]} was built: delete it, or give another "
                        "name")

    lines = [f"refused: {name}: {reason}" for name, reason in sorted(refused)] + cases.table()
    lines = [line.encode(errors="backslashreplace").decode() for line in lines]  # odd file names
    content = json.dumps({"settings": settings, "made": made, "lines": lines})
    write_atomically(report, lambda name: Path(name).write_text(content))
    if png and not png.exists():
        cases.write_png(png)
    if not dst.exists():
        write_atomically(dst, cases.write_npz)
    print(*lines, f"wrote {dst}" + (f" and {png}" if png else ""), sep="\n")


def _clear(folder: Path, prefix: str) -> None:
    """Remove what a kill left half-written."""
    for half in folder.glob(".*.tmp"):
        if half.name.startswith(prefix):
            shutil.rmtree(half) if half.is_dir() else half.unlink()


def _walk(src: Path, work: Path, refused: list) -> Iterator[str]:
    """Every file under `src`, links followed, each folder once; nothing of `work`."""
    def refuse(error: OSError):
        refused.append((error.filename, error.strerror))

    seen = {(os.stat(work).st_dev, os.stat(work).st_ino)}
    for folder, folders, names in os.walk(src, onerror=refuse, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders.sort()
        for file in sorted(os.path.join(folder, name) for name in names):
            if os.path.isfile(file):  # no pipe, no dead link
                yield file


def _stamp(file: str) -> tuple[str, int, int]:
    """What changes when a file does: name, bytes, time."""
    return file, os.stat(file).st_size, os.stat(file).st_mtime_ns


def _key(*parts) -> str:
    return hashlib.sha1(json.dumps(parts).encode()).hexdigest()[:16]


class _Workers:
    """Processes that share out calls; one worker is this process itself."""

    def __init__(self, count: int):
        self.pool = None if count == 1 else ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), _begin_worker)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def each(self, function: Callable, calls: list[tuple], what: str) -> Iterator:
        """The results of function(*call) as they come, with a progress line."""
        if not self.pool:
            results = (function(*call) for call in calls)
        else:
            futures = [self.pool.submit(function, *call) for call in calls]
            results = (future.result() for future in as_completed(futures))
        try:
            yield from _progress(results, len(calls), what)
        except BrokenProcessPool as error:
            raise DataError("a worker was killed, for want of memory perhaps: run it again, with "
                            "fewer --workers; what is done is kept") from error


def _begin_worker() -> None:
    """Leaves Ctrl-C to the parent and dies with it, however it dies; one thread a worker."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)


def _progress(results: Iterable, total: int, what: str) -> Iterator:
    """One updating line on a terminal, a plain line every ten seconds in a pipe."""
    start = shown = time.monotonic()
    terminal = sys.stdout.isatty()
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - shown > (0.2 if terminal else 10) or terminal and done == total:
            shown, left = now, (now - start) / done * (total - done)
            text = f"{done}/{total} {what}, {left // 60:.0f}m{left % 60:02.0f}s left"
            print("\r\x1b[K" * terminal + text, end="" if terminal and done < total else "\n",
                  flush=True)


def _look(stamps: list, target: Path, read: Callable) -> list[tuple[str, str]]:
    """What CT slices and readings are in these files, into `target`; the bad ones: (name, why)."""
    if target.exists() and not json.loads(target.read_text())["refused"]:
        return []
    slices, readings, refused = [], [], []
    for file, length, _ in stamps:
        try:
            if not file.lower().endswith(".xml"):
                found = read(file)
                if found is None and file.lower().endswith(".dcm"):
                    raise DataError("is no DICOM file")
                if found and found.modality == "CT":
                    slices.append((found.uid, found.series, found.patient, file))
            elif length > 2**26:
                raise DataError("is larger than any reading")
            elif reading := _reading(Path(file).read_bytes()):
                series, sessions = reading
                uids = {uid for drawn in sessions for nodule in drawn for uid in nodule}
                readings.append((series, file, _key(sessions), sorted(uids)))
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # damaged bytes can raise nearly anything
            refused.append((file, _reason(error)))
    content = json.dumps({"slices": slices, "readings": readings, "refused": refused})
    write_atomically(target, lambda name: Path(name).write_text(content))
    return refused


def _match(targets: list[Path]) -> tuple[list[_Series], list[tuple[str, str]]]:
    """The series to cut, each with its reading and the files of its outlined slices; what is left
    over, with the reason."""
    readings, series, refused, astray = {}, {}, [], []
    for target in targets:
        for uid, *reading in json.loads(target.read_text())["readings"]:
            readings.setdefault(uid, []).append(reading)
    for target in targets:
        for slice_uid, uid, patient, file in json.loads(target.read_text())["slices"]:
            files = series.setdefault(uid, (patient, {}))[1]
            if any(slice_uid in outlined for _, _, outlined in readings.get(uid, ())):
                files.setdefault(slice_uid, []).append(file)
    tasks = []
    for uid, several in readings.items():
        if len({drawn for _, drawn, _ in several}) > 1:
            # Of LIDC-IDRI-0101 the archive keeps the first reading beside the corrected one.
            fixed = [reading for reading in several if "correction" in Path(reading[0]).name]
            if len(fixed) != 1:
                names = ", ".join(file for file, *_ in several)
                refused.append((f"series {uid}", f"XML files that contradict each other: {names}"))
                series.pop(uid, None)
                continue
            several = fixed
        if uid not in series:
            astray.append(several[0][0])
            continue
        patient, files = series.pop(uid)
        # The name becomes that of a folder.
        tasks.append(_Series(uid, re.sub(r"[^\w-]+", "_", patient) or uid, several[0][0], files))
    if astray:
        refused.append((", ".join(astray[:3] + ["..."] * (len(astray) > 3)),
                        f"{len(astray)} XML files whose series is not here"))
    refused += [(f"series {uid} ({patient})", "no XML of its readers")
                for uid, (patient, _) in series.items()]
    return sorted(tasks, key=lambda task: (task.patient, task.uid)), refused


def _build_series(task: _Series, target: Path, size, window, read) -> tuple[str, str] | None:
    """`_cut` and the measures of its cases, into `target`; where it is bad, its name and why."""
    if target.exists():
        return None
    try:
        arrays = _cut(task, size, window, read)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        return f"series {task.uid} ({task.patient})", _reason(error)
    there = (arrays["labels"] != IGNORE).any((2, 3))
    odds = torch.from_numpy(there / there.sum(1, keepdims=True))
    measures = [_measure(*case, 2) for case in zip(torch.from_numpy(arrays["labels"]), odds)]
    arrays |= {key: np.array([case[key] for case in measures]) for key in ("empty", "diversity")}

    def save(name):
        with open(name, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(target, save)
    return None


def _measure(labels: Tensor, odds: Tensor, num_classes: int) -> dict:
    """One case, labels (A, *S), of readers of these odds (A,), at a reader drawn by them.

    shares: (256,) share of the pixels with each label; empty: odds of a map without foreground;
    diversity: E[1 - IoU] of two readers (of one twice, too: SSN, arXiv:2006.06015, Sec. 4).
    """
    import metrics

    counts = torch.stack([torch.bincount(m, minlength=256) for m in labels.flatten(1)])  # (A, 256)
    iou = metrics.pairwise_iou(labels, labels, num_classes).to(odds)
    return {"shares": odds @ (counts / counts[0].sum()).to(odds),
            "empty": float(odds @ (counts[:, 1:IGNORE].sum(1) == 0).to(odds)),
            "diversity": float(1 - odds @ iou @ odds)}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DataError) else _line(error)


class _Cases:
    """The cases of all series in one order. Pixels stay on disk; one series at a time is read."""

    def __init__(self, series: list[tuple[str, Path]]):
        self.targets = [target for _, target in series]
        self.groups, self.names, self.dropped = [], [], 0
        empty, diversity, lesions = [], [], Counter()
        for patient, target in series:
            with np.load(target) as arrays:
                # Some patients have two scans: their lesions are numbered on.
                self.names += [f"{patient}/z{z}_c{lesions[patient] + number}"
                               for z, number in zip(arrays["z"], arrays["lesion"])]
                self.groups += [patient] * len(arrays["z"])
                lesions[patient] += arrays["lesion"].max(initial=-1) + 1
                empty.append(arrays["empty"])
                diversity.append(arrays["diversity"])
                self.dropped += int(arrays["dropped"])
        self.empty, self.diversity = map(np.concatenate, (empty or [[]], diversity or [[]]))
        self.lesions = lesions
        self.split = split_groups(self.groups, val=0.2)

    def table(self) -> list[str]:
        """What the papers report of their sets."""
        lines = [f"{'':6}{'patients':>10}{'lesions':>9}{'slices':>8}{'empty masks':>13}"
                 f"{'diversity':>11}"]
        for part, rows in self.split.items():
            patients = {self.groups[i] for i in rows}
            if rows:
                lines.append(f"{part:6}{len(patients):10}{sum(map(self.lesions.get, patients)):9}"
                             f"{len(rows):8}{self.empty[rows].mean():13.1%}"
                             f"{self.diversity[rows].mean():11.3f}")
        return lines + [f"{self.dropped} outlined slices dropped: not there, or SliceLocation and "
                        "ImagePositionPatient disagree"]

    def write_npz(self, name) -> None:
        """images, labels, groups and names, as the reader of .npz files takes them."""
        with zipfile.ZipFile(name, "w") as archive:
            for key in ("images", "labels", "groups", "names"):
                blocks = self._blocks(key)
                first = next(blocks)
                header = {"descr": first.dtype.str, "fortran_order": False,
                          "shape": (len(self.names), *first.shape[1:])}
                # ZipInfo's fixed date: the same cases make the same file, bit for bit.
                entry = zipfile.ZipInfo(f"{key}.npy")
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_2_0(file, header)
                    for block in itertools.chain([first], blocks):
                        file.write(block.tobytes())

    def _blocks(self, key: str) -> Iterator[np.ndarray]:
        if key in ("groups", "names"):
            yield np.array(getattr(self, key))
            return
        for target in self.targets:
            with np.load(target) as arrays:
                yield arrays[key]

    def write_png(self, folder: Path) -> None:
        """{train,val,test}/images/<name>.png and gt/<name>_l<reader>.png, foreground 255."""
        half = folder.with_name(f".{folder.name}.half.tmp")
        part_of = {i: part for part, rows in self.split.items() for i in rows}
        pixels = [itertools.chain.from_iterable(self._blocks(key)) for key in ("images", "labels")]
        for i, (name, image, masks) in enumerate(zip(self.names, *pixels)):
            pictures = {f"images/{name}": image}
            pictures |= {f"gt/{name}_l{reader}": mask * np.uint8(255)
                         for reader, mask in enumerate(masks) if (mask != IGNORE).any()}
            for place, picture in pictures.items():
                file = half / part_of[i] / f"{place}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(file)
        half.rename(folder)


# ----------------------------------------------------------------------------------- command line


def show(name: str, path=None, split: str = "train", out=None, **options) -> str:
    """A table of the data set, and a contact sheet of `split` with every reader's outline.

    The sheet is a PNG, `out` or <name>.png. Shares, empty masks and diversity are those of readers
    drawn by their odds. Raises DataError as `load` does.
    """
    if split == "all":
        parts = {split: load(name, split, path, **options)}
    else:
        try:
            parts = dict(zip(SPLITS, load(name, SPLITS, path, **options)))
        except DataError:  # perhaps only another split is not there
            parts = {split: load(name, split, path, **options)}
    out = Path(out or f"{name}.png")
    _contact_sheet(parts[split], out, f"{name}, {split}")
    columns = [_summary(part) for part in parts.values()]
    lines = [f"{'':12}" + "".join(f"{part:>18}" for part in parts)]
    lines += [f"{row:12}" + "".join(f"{column.get(row, ''):>18}" for column in columns)
              for row in dict.fromkeys(itertools.chain(*columns))]
    return "\n".join([f"{name}: {DATASETS[name].doc}", *lines, f"wrote {out}"])


def _summary(part: Split) -> dict[str, str]:
    """The table's rows of one split."""
    odds = part.odds
    cases = [_measure(part.subset([i]).all_maps().labels[0], odds[i], part.num_classes)
             for i in range(len(part))]
    mean = {key: np.mean([np.asarray(case[key]) for case in cases], 0) for key in cases[0]}
    missing = (part.labels == IGNORE).flatten(2).all(2).float().mean()
    rows = {"cases": f"{len(part)}", "groups": f"{len(set(part.groups))}",
            "channels": f"{part.images.shape[1]}", "size": _times(part.images.shape[2:]),
            "intensity": f"{part.images.min():.3g} to {part.images.max():.3g}",
            "readers": f"{odds.shape[1]}", "missing": f"{missing:.1%}",
            "empty masks": f"{mean['empty']:.1%}", "diversity": f"{mean['diversity']:.3f}"}
    for value in (*range(part.num_classes), IGNORE):
        if value < part.num_classes or mean["shares"][value]:
            title = f"class {value}" if value < IGNORE else "ignored"
            rows[title] = f"{mean['shares'][value]:.2%}"
    return rows


def _contact_sheet(part: Split, out: Path, title: str, count: int = 12) -> None:
    """A PNG of cases spread over the split (of volumes, the slice with most foreground), with the
    readers' outlines in their colours, of at most the eight likeliest, or the instances' borders.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.lines import Line2D

    rows = sorted({round(i) for i in np.linspace(0, len(part) - 1, count)})
    across = min(4, len(rows))
    figure, axes = new_figure(-(-len(rows) // across), across, panel=2.2, title=title)
    for ax, i in zip(axes.flat, rows):
        case = part.subset([i]).all_maps()
        image, labels, odds = case.images[0], case.labels[0], case.odds[0]
        ids = None if case.instances is None else case.instances[0]
        if image.dim() == 4:
            z = ((labels > 0) & (labels < IGNORE)).sum((0, 2, 3)).argmax()
            image, labels, ids = image[:, z], labels[:, z], ids if ids is None else ids[z]
        if image.dim() == 2:  # a line, shown as a band
            image, labels = image[:, None].repeat(1, 5, 1), labels[:, None].repeat(1, 5, 1)
        picture = paint_image(image)
        if ids is not None:
            border = torch.zeros_like(ids, dtype=torch.bool)
            border[1:] |= ids[1:] != ids[:-1]
            border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
            picture[border] = torch.tensor(to_rgb(COLORS[0]))
        ax.imshow(picture.numpy(), interpolation="nearest")
        ax.set_title(part.names[i][-36:], fontsize=6)
        likeliest = odds.argsort(descending=True, stable=True)[:len(COLORS)].tolist()
        for order, reader in enumerate(likeliest if ids is None else []):
            for value in range(1, part.num_classes):
                mask = labels[reader] == value
                if odds[reader] > 0 and mask.any() and not mask.all():
                    # Thinner and thinner, so that an outline drawn twice shows both colours.
                    ax.contour(mask.numpy(), [0.5], colors=[COLORS[reader % len(COLORS)]],
                               linewidths=2 * 0.7**order)
    readers = part.odds.shape[1]
    if part.instances is None and 1 < readers <= len(COLORS):
        figure.legend([Line2D([], [], color=color) for color in COLORS[:readers]],
                      [f"reader {reader}" for reader in range(readers)], fontsize=7,
                      ncols=readers, loc="outside lower center")
    save_figure(figure, out)


def main(argv=None) -> int:
    """The command line; a user's mistake is one line on stderr and exit status 2."""
    sets = "\n".join(f"  {name:12}{source.doc}" for name, source in DATASETS.items())
    parser = argparse.ArgumentParser(
        prog="python data.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"The data sets, and what to see and build of them.\n\n{sets}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    see = commands.add_parser("show", help="a table, and a PNG with every reader's outlines")
    see.add_argument("--data", required=True, help=f"one of: {' '.join(DATASETS)}")
    see.add_argument("--path", help="its file or folder (default datasets/<data>)")
    see.add_argument("--data-args", nargs="+", metavar="K=V", default=[], help="its options")
    see.add_argument("--split", default="train", choices=[*SPLITS, "all"])
    see.add_argument("--out", help="the PNG (default <data>.png)")
    cut = commands.add_parser("build-lidc", help="LIDC-IDRI from the archive's DICOM and XML",
                              description=build_lidc.__doc__.partition("`read`")[0])
    cut.add_argument("src", metavar="SRC", help="the archive's folder, nested in any way")
    cut.add_argument("dst", metavar="DST", help="the .npz to write")
    cut.add_argument("--size", type=int, default=180, help="pixels a side (default 180)")
    cut.add_argument("--window", type=float, nargs=2, default=LIDC_WINDOW, metavar="HU",
                     help="what becomes 0 and what 1 (default -1000 400)")
    cut.add_argument("--png", metavar="FOLDER", help="write the crops as a tree of PNGs, too")
    cut.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
                     help="processes (default %(default)s)")
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    try:
        if command == "build-lidc":
            build_lidc(**args)
        elif command == "show":
            options = pairs("--data-args", args.pop("data_args"))
            for key in options.keys() & {"name", *args}:
                raise DataError(f"--data-args {key}=...: no data set has such an option")
            print(show(args.pop("data"), **args, **options))
        else:
            parser.print_help()
        return 0
    except (DataError, UserError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or ''}; what was done before "
              "stands", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
