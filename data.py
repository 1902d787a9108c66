"""Every data set: made ones whose distribution of label maps is known, and real ones from files.

    train, val = data.load("shapes", ("train", "val"))           # two `Split`s: tensors in memory
    stream = data.batches(train.to("cuda"), 12, seed=0, augmentation=data.DATASETS["shapes"].augmentation)
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
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.pictures import COLORS, new_figure, paint_image, save_figure
from common import IGNORE, UserError, key_values, reflect_index
from sources.base import (SPLITS, Split, check_known, gather, measure_case, random_classes,
                          relabel, seeded_generator, spline)
from sources.brats import read_brats
from sources.cityscapes import read_cityscapes
from sources.em import read_em
from sources.files import DataError, size_text
from sources.lidc import HDF5, read_lidc
from sources.lidc_archive import LIDC_WINDOW, build_lidc
from sources.own import read_folder, read_npz
from sources.synapse import read_synapse
from sources.synthetic import (make_cells, make_lesions3d, make_modes, make_organs, make_shapes,
                               make_toy1d)


def load(name: str, split: str | Sequence[str] = "train", path=None, **options):
    """The `split` ("train", "val", "test" or "all") of the data set `name`, as a `Split`.

    A sequence of splits gives a list and reads the source once. `path` is the file or folder of a
    real set; without it, datasets/<name> in the working folder. `DATASETS` lists names and options;
    all sets take hide, see `hide`; real ones split_file, a JSON file {"train": [names of cases or
    groups], "val": [...], "test": [...]}, such as `Split.parts` holds. Cases named nowhere in it
    are left out.
    Raises DataError for anything the user can mend.
    """
    source = DATASETS[check_known("data set", name, DATASETS)]
    wanted = [check_known("split", part, (*SPLITS, "all"))
              for part in ([split] if isinstance(split, str) else split)]
    values = _checked_options(name, source, options)
    percent = values.pop("hide")
    if percent > 99:
        raise DataError(f"{name} option hide={percent}: give per cent of the image, 0 to 99")
    if source.real:
        whole, parts, whole.parts = gather(name, path, source, wanted, values.pop("split_file"),
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
    size, generator = split.images.shape[2:], seeded_generator(percent, len(split))
    maps = torch.multinomial(split.probabilities.cpu(), copies, replacement=True, generator=generator)
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
        allowed = table[check_known(f"{name} option", key, table)][1]
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
        raise DataError(f"size {size} for images of {size_text(shape)}: give one number from 1 up, or "
                        f"{len(shape)} of them")
    return sizes


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
    return images, labels


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
        return torch.randperm(len(split), generator=seeded_generator(seed, 0, epoch))

    def draw(step: int) -> tuple[Tensor, Tensor]:
        first, offset = divmod(step * batch_size, len(split))
        last = ((step + 1) * batch_size - 1) // len(split)
        order = torch.cat([permutation(epoch) for epoch in range(first, last + 1)])
        rows = order[offset:offset + batch_size]
        # Drawn for the whole batch whatever the rank: `ship` cuts afterwards.
        generator = seeded_generator(seed, 1, step)
        if split.instances is None:
            # A race of exponential clocks of rates `odds` (in logarithms): a rate of 0 never wins,
            # and there is no cumulative sum to round past the last reader.
            chances = torch.rand(odds[rows].shape, generator=generator, dtype=torch.float64)
            reader = (chances.log() / odds[rows]).argmax(1)
            case, reader = ship(rows), ship(reader)
            labels = split.labels[case, reader] if split.flips is None else relabel(
                split.labels[case, 0], split.flips[case, reader])
        else:
            table = random_classes(batch_size, ids, split.fixed, split.num_classes, generator)
            case = ship(rows)
            labels = relabel(split.instances[case], ship(table))
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


# ------------------------------------------------------------------------------------- made sets


# ------------------------------------------------------------------------------------- real sets


# ------------------------------------------------------------------------- what is in one file


# ------------------------------------------------------------------------------------ the readers


# ----------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Source:
    """One line of the table below."""

    read: Callable  # (**options) -> whole Split, {split: indices}; real: (path, splits, **options)
    doc: str
    augmentation: Augmentation  # of training batches
    options: dict[str, tuple]  # name: (default, smallest number, choices or str)
    suffixes: tuple[str, ...] = ()  # of files that are the set
    layout: str = ""  # what to put where, told when nothing is found
    marks: tuple[str, ...] = ()  # what a folder holds that is the set (patterns)

    @property
    def real(self) -> bool:
        """Whether it is read from files; made sets are not."""
        return bool(self.layout)


DATASETS: dict[str, Source] = {
    "toy1d": Source(make_toy1d, "made: 21 pixels, two label maps", Augmentation(),
                     {}),
    "shapes": Source(make_shapes, "made: ambiguous class, border and presence; 12 maps of known odds",
                     Augmentation(flip=(-2, -1), quarter_turns=True),
                     {"n": (1000, 3), "size": (64, 32), "seed": (0, 0)}),
    "modes": Source(make_modes, "made: street scenes, five classes flip; 32 maps of known odds",
                    Augmentation(flip=(-1,)),
                     {"n": (500, 3), "size": (64, 48), "seed": (0, 0)}),
    "cells": Source(make_cells, "made: cells and membranes, each cell one of 15 classes at random",
                    _FULL,
                     {"n": (500, 3), "size": (64, 32), "seed": (0, 0)}),
    "organs": Source(make_organs, "made: five organs with blurred borders, three readers",
                     _MILD,
                     {"n": (400, 12), "size": (96, 48), "seed": (0, 0)}),
    "lesions3d": Source(make_lesions3d, "made: a sure and a faint lesion in 3D; 6 maps of known odds",
                        Augmentation(flip=(-3, -2, -1), quarter_turns=True),
                     {"n": (60, 3), "size": (48, 32), "seed": (0, 0)}),
    "lidc": Source(read_lidc, "LIDC-IDRI lung nodules, or other sets in its layouts", _FULL,
                     {},
                   (".pickle", ".pkl", ".npz", *HDF5),
                   "a pickle {key: {image, masks, series_uid}} (data_lidc.pickle, linked from "
                   "github.com/stefanknegt/Probabilistic-Unet-Pytorch), the PNG tree "
                   "{train,val,test}/{images,gt}/<patient>/ (gs://hpunet-data/lidc_crops), an .npz "
                   "as for the data set npz (python data.py build-lidc makes it of the archive's "
                   "DICOM and XML), HDF5 of groups train, val, test with images and labels",
                   tuple(f"{part}/images" for part in SPLITS)),
    "npz": Source(read_npz, "your own: images (N, H, W) and labels (N, A, H, W), or in 3D",
                  _MILD,
                     {"num_classes": (0, 0)}, (".npz",),
                  "an .npz with images (N, H, W), (N, C, H, W) or (N, C, D, H, W) and labels "
                  "(N, A, H, W) or (N, A, D, H, W), and if wanted weights, groups, names, "
                  "num_classes"),
    "folder": Source(read_folder, "your own: pictures or NIfTI volumes, a folder for each reader",
                     _MILD,
                     {"num_classes": (0, 0), "masks": ("classes", ("classes", "binary"))}, (),
                     "a folder with images/NAME.png, labels/READER/NAME.png and, if wanted, "
                     "groups.csv of lines NAME,GROUP; also .tif, .jpg (images), .nii.gz",
                     ("images",)),
    "em": Source(read_em, "sections of electron microscopy, each cell one of 15 classes at random",
                 _FULL,
                     {"tile": (256, 0)}, (".npz",),
                 "an .npz of images and instances (N, H, W), 0 = membrane, or a folder with "
                 "train-input.tif and train-labels.tif (snemi3d.grand-challenge.org)",
                 ("train-input.tif",)),
    "cityscapes": Source(read_cityscapes, "street scenes; five classes flip, or cars are coloured",
                         Augmentation(flip=(-1,), rotation=20, shear=0.05, scale=0.2, translation=8, elastic=3),
                     {"task": ("modes", ("modes", "cars")), "factor": (0, 0)}, (),
                         "a folder with leftImg8bit/{train,val}/<city>/ and gtFine/{train,val}/"
                         "<city>/ (leftImg8bit_trainvaltest and gtFine_trainvaltest of "
                         "cityscapes-dataset.com)", ("leftImg8bit",)),
    "synapse": Source(read_synapse, "abdominal CT, slice by slice, eight organs",
                      _MILD,
                     {"size": (224, 0)}, (),
                      "a folder with train_npz/caseXXXX_sliceYYY.npz and test_vol_h5/"
                      "caseXXXX.npy.h5 (github.com/Beckschen/TransUNet, datasets/README.md)",
                      ("train_npz", "test_vol_h5")),
    "brats": Source(read_brats, "brain tumours in 3D, four channels of MR, three classes", Augmentation(flip=(-2, -1), quarter_turns=True),
                     {}, (),
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


# So much for one series; from here on: all files, processes, resuming, writing.


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
    odds = part.probabilities
    cases = [measure_case(part.subset([i]).all_maps().labels[0], odds[i], part.num_classes)
             for i in range(len(part))]
    mean = {key: np.mean([np.asarray(case[key]) for case in cases], 0) for key in cases[0]}
    missing = (part.labels == IGNORE).flatten(2).all(2).float().mean()
    rows = {"cases": f"{len(part)}", "groups": f"{len(set(part.groups))}",
            "channels": f"{part.images.shape[1]}", "size": size_text(part.images.shape[2:]),
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
        image, labels, odds = case.images[0], case.labels[0], case.probabilities[0]
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
    readers = part.probabilities.shape[1]
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
    cut.add_argument("--border", choices=["exclude", "include"], default="exclude",
                     help="whether the outlines belong to the nodules (default exclude)")
    cut.add_argument("--png", metavar="FOLDER", help="write the crops as a tree of PNGs, too")
    cut.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
                     help="processes (default %(default)s)")
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    try:
        if command == "build-lidc":
            build_lidc(**args)
        elif command == "show":
            options = key_values("--data-args", args.pop("data_args"))
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
