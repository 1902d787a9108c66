"""Every data set: synthetic ones, whose label maps have known probabilities, and ones in files.

    train, val = data.load("shapes", ("train", "val"))     # two `Split`s: tensors in memory
    augmentation = data.DATASETS["shapes"].augmentation
    stream = data.batches(train.to("cuda"), 12, seed=0, augmentation=augmentation)
    image, label = next(stream)                            # (B, C, *S) float32, (B, *S) int64

    python data.py                                # lists the data sets
    python data.py show --data shapes             # a table, and a PNG with all label maps
    python data.py export --data lidc --path lidc.pickle --out lidc.npz      # or a folder of PNGs
    python data.py build-lidc SRC lidc.npz        # LIDC-IDRI from the archive's DICOM and XML

sources/README.md describes every file layout. A `Split` is moved to the device whole, and batches
are drawn, cropped and augmented there, so training never waits for a worker or a copy.

Shapes: N cases, B batch, C channels, K classes, A annotators, *S space. 255 means ignore.
"""

import argparse
import functools
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
from torch import Tensor

import metrics
from analysis.pictures import fullest_slice, paint_image, paint_label, save_grid
from common import IGNORE, UserError, key_values, out_of_memory, say
from sources.base import (SPLITS, Split, assign, centred, check_known, collect, locate,
                          random_classes, relabel, seeded_generator, warn)
from sources.brats import read_brats
from sources.cityscapes import read_cityscapes
from sources.em import read_em
from sources.export import LAYOUTS, export
from sources.files import DataError, error_line, size_text
from sources.lidc import HDF5, read_lidc
from sources.lidc_archive import LIDC_WINDOW, build_lidc
from sources.own import read_npz
from sources.synapse import read_synapse
from sources.synthetic import (make_cells, make_lesions3d, make_modes, make_organs, make_shapes,
                               make_toy1d)
from sources.templates import MARKS, read_folder
from sources.warp import Augmentation, Warp, apply_warp, draw_warp


def load(name: str, split: str | Sequence[str] = "train", path=None, /, **options):
    """Returns the `split` ("train", "val", "test" or "all") of the data set `name`, as a `Split`.

    A sequence of splits gives a list and reads the source once. `path` is the file or folder of a
    real set; without it, datasets/<name> in the working folder. `options` are the keyword arguments
    of the set's reader in `DATASETS`, and for every set
      hide        per cent of each image to hide, see `hide`
      split_file  (real sets) a JSON file {"train": [names of cases or groups], "val": [...],
                  "test": [...]}, such as `Split.parts` holds; cases not listed are left out.
    Raises DataError for anything the user can correct.
    """
    source = DATASETS[check_known("data set", name, DATASETS)]
    wanted = [split] if isinstance(split, str) else list(split)
    for one in wanted:
        check_known("split", one, (*SPLITS, "all"))
    path = options.pop("path", path)  # or by keyword, which wins
    _check_options(name, source, options)
    percent, split_file = options.pop("hide", 0), options.pop("split_file", None)
    if split_file == "":
        raise DataError("split_file is empty: give a JSON file, or leave the option out")
    if not source.layout:
        if path is not None:
            raise DataError(f"{name} is synthetic, not read from {path}: leave the path out")
        whole, rows = source.read(**options)
    else:
        try:
            place = locate(name, path, source)
            listing = source.read(place, **options)
        except OSError as error:  # such as a folder that may not be opened
            raise DataError(f"{path or name}: not a readable data set: {error_line(error)}"
                            ) from error
        if not listing.cases:
            raise DataError(f"{place}: holds no cases; it should be {source.layout}")
        splits = assign(place, listing, wanted, split_file or "")
        if "all" in wanted:
            rows, order = splits, list(range(len(listing.cases)))
        else:  # reads split after split, so that `subset` can give views
            needed = [one for one in SPLITS if one in wanted or not listing.apart]
            rows, order = {}, []
            for one in needed:
                rows[one] = range(len(order), len(order) + len(splits[one]))
                order += splits[one]
        whole = collect(place, listing, order)
        whole.parts = {one: [listing.cases[i].name for i in splits[one]] for one in SPLITS}
    splits = [whole if one == "all" else whole.subset(rows[one]) for one in wanted]
    if percent:
        splits = [hide(one, percent) for one in splits]
    return splits[0] if isinstance(split, str) else splits


def _check_options(name: str, source: "Source", given: dict) -> None:
    """Raises DataError unless the set has such options and values, by its reader's annotations."""
    allowed = {key: parameter.annotation
               for key, parameter in inspect.signature(source.read).parameters.items()
               if parameter.kind is parameter.KEYWORD_ONLY}
    allowed |= {"split_file": str, "hide": int} if source.layout else {"hide": int}
    for key, value in given.items():
        kind = allowed[check_known(f"{name} option", key, allowed)]
        if get_origin(kind) is Literal:
            good, hint = value in get_args(kind), f"choose from {', '.join(get_args(kind))}"
        elif kind is str:
            good, hint = isinstance(value, (str, Path)), "give a text"
        else:
            least = 0 if kind is int else get_args(kind)[1]
            good = type(value) is int and least <= value < 2**31
            hint = f"give a whole number >= {least}"
        if not good:
            raise DataError(f"{name} option {key}={repr(value)[:60]}: {hint}")


def hide(split: Split, percent: int, copies: int = 4) -> Split:
    """Makes the task of HPU-Net's Fig. 5: a part of every image is hidden, and the labels of the
    rest are given. A model segments what it is shown and completes what it is not.

    Each case comes `copies` times, each time with one of its label maps, drawn by its probability,
    and with a random side hidden. Images (N * copies, C + K + 1, *S): the image and its one-hot
    known labels, both 0 where hidden, and a channel that is 1 there; labels (N * copies, 1, *S),
    the whole map.
    """
    if percent > 99:
        raise DataError(f"hide={percent}: give per cent of the image, 0 to 99")
    size, generator = split.images.shape[2:], seeded_generator(percent, len(split))
    maps = torch.multinomial(split.probabilities.cpu(), copies, replacement=True,
                             generator=generator)
    rows = torch.arange(len(split)).repeat_interleave(copies)
    labels = split.label_maps(rows, maps.flatten())
    sides = torch.randint(2 * len(size), (len(rows),), generator=generator)
    hidden = torch.zeros(len(rows), *size, dtype=torch.bool)
    for axis, have in enumerate(size):
        depth = round(have * percent / 100)
        lines = hidden.movedim(axis + 1, 1)  # a view
        lines[sides == 2 * axis, :depth] = True
        lines[sides == 2 * axis + 1, have - depth:] = True
    classes = torch.arange(split.num_classes).view(-1, *[1] * len(size))
    known = torch.cat([split.images[rows], (labels[:, None] == classes).float()], 1)
    images = torch.cat([known.masked_fill(hidden[:, None], 0), hidden[:, None].float()], 1)
    return replace(split, images=images, labels=labels[:, None], weights=None,
                   groups=[group for group in split.groups for _ in range(copies)],
                   names=[f"{name}-{i}" for name in split.names for i in range(copies)],
                   instances=None, flips=None, exact=False)


def center(split: Split, size: int | Sequence[int]) -> Split:
    """Crops a split on the host to its centre, or pads it: images by reflection, labels by 255,
    instances by -1. Warns where annotated foreground is cut off."""
    size = _as_size(size, split.images.shape[2:])

    def fit(tensor: Tensor | None, **how) -> Tensor | None:
        return None if tensor is None else torch.from_numpy(centred(tensor.numpy(), size, **how))

    labels = fit(split.labels, constant_values=IGNORE)
    before, after = (sum(int(((part > 0) & (part != IGNORE)).sum()) for part in maps.split(64))
                     for maps in (split.labels, labels))
    if after < 0.99 * before:
        warn(f"validation and test see the middle {size_text(size)} pixels only: of these "
             f"{len(split)} cases, {1 - after / before:.0%} of the annotated foreground lies "
             "outside; evaluate.py --whole judges whole images")
    return replace(split, images=fit(split.images, mode="reflect"), labels=labels,
                   instances=fit(split.instances, constant_values=-1))


def _as_size(size: int | Sequence[int] | None, shape: Sequence[int]) -> tuple[int, ...]:
    if size is None:
        return tuple(shape)
    sizes = (size,) * len(shape) if isinstance(size, int) else tuple(size)
    if len(sizes) != len(shape) or min(sizes) < 1:
        raise DataError(f"size {size} for images of {size_text(shape)}: give one number from 1 up, "
                        f"or {len(shape)} of them")
    return sizes


# --------------------------------------------------------------------------------------- batches


def batches(split: Split, batch_size: int, seed: int, *, start: int = 0,
            augmentation: Augmentation | None = None, size: int | Sequence[int] | None = None,
            rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields training batches without end: images (B, C, *S) float32 and label maps (B, *S) int64.

    Cases come in seeded permutations chained end to end. Each draws one annotator by `weights`
    (see `labelled_by`); a set with instances draws new classes for them.
    `size` is the output window: at a random place where it is smaller than the image, centred and
    padded where it is larger. Batch `step` depends on (seed, step) alone; the stream begins at
    `start`. `batch_size` counts the rows of all `world` processes; this one gets those of `rank`.
    Everything is drawn on the host, so it is the same on every device, and sent without waiting.
    Raises DataError where a batch cannot be cut evenly.
    """
    if batch_size % world:
        raise DataError(f"batch size {batch_size} cannot be cut evenly over {world} processes: "
                        f"give a multiple of {world}")
    augmentation = augmentation or Augmentation()
    device, shape = split.images.device, split.images.shape[2:]
    size = _as_size(size, shape)
    weights = torch.ones(split.labels.shape[:2]) if split.weights is None else split.weights.cpu()
    ids = 0 if split.instances is None else int(split.instances.max()) + 1
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)

    def send(tensor: Tensor | None) -> Tensor | None:
        """Sends this rank's rows to the device; only a copy from pinned memory does not block."""
        if tensor is None:
            return None
        tensor = tensor[mine].pin_memory() if device.type == "cuda" else tensor[mine]
        return tensor.to(device, non_blocking=True)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        # Drawn for the whole batch on every rank; `send` selects its rows afterwards.
        rows = _rows(len(split), batch_size, seed, step)
        cases, generator = send(rows), seeded_generator(seed, 1, step)
        if split.instances is None:
            annotator = torch.multinomial(weights[rows].double(), 1, generator=generator)[:, 0]
            labels = split.label_maps(cases, send(annotator))
        else:
            table = random_classes(batch_size, ids, split.fixed, split.num_classes, generator)
            labels = relabel(split.instances[cases], send(table))
        warp = draw_warp(augmentation, batch_size, shape, size, generator)
        images, labels = apply_warp(split.images[cases], labels, Warp(*map(send, warp)), size,
                                    augmentation.resamples)
        return images, labels.long()

    return map(draw, itertools.count(start))


def _rows(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Returns the cases (B,) of batch `step`, from permutations of 0..count-1 chained together."""
    first, offset = divmod(step * batch_size, count)
    last = ((step + 1) * batch_size - 1) // count
    order = torch.cat([_permutation(count, seed, epoch) for epoch in range(first, last + 1)])
    return order[offset:offset + batch_size]


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=seeded_generator(seed, 0, epoch))


def labelled_by(split: Split, annotators: Sequence[int]) -> Split:
    """Returns the cases that at least one of these annotators (indices) labelled, with weight 0 for
    the others, and says how many cases it leaves out. DataError if all."""
    if split.instances is not None:
        raise DataError("annotators: a set with instances has none, its labels are drawn at random")
    count = len(split.annotators)
    if not annotators or not set(annotators) <= set(range(count)):
        raise DataError(f"annotators {list(annotators)}: choose from 0 to {count - 1}")
    weights = split.present * (1.0 if split.weights is None else split.weights)  # (N, A)
    weights[:, [a for a in range(count) if a not in annotators]] = 0
    split = replace(split, weights=weights)
    rows = weights.sum(1).nonzero().flatten().tolist()
    names = [split.annotators[a] for a in annotators]
    if not rows:
        raise DataError(f"annotators {', '.join(names)}: none of them labelled any of the "
                        f"{len(split)} cases")
    if len(rows) < len(split):
        warn(f"{len(split) - len(rows)} of {len(split)} training cases are left out, because they "
             f"were not labelled by {' or '.join(names)}")
        split = split.subset(rows)
    return replace(split, weights=split.weights / split.weights.sum(1, keepdim=True))


# ----------------------------------------------------------------------------------------- table


# The papers name their transformations and give no magnitudes: the numbers are ours. Where
# probabilities depend on a width or a shape (shapes, lesions3d) nothing is resampled, so that they
# stay exact.
_FULL = Augmentation(flip=(-2, -1), quarter_turns=True, rotation=30, shear=0.1, scale=0.15,
                     translation=2, elastic=3)
_MILD = Augmentation(rotation=10, shear=0.05, scale=0.1, translation=4, elastic=2)


@dataclass(frozen=True)
class Source:
    """A data set: how it is read and described. Its options are the keyword arguments of `read`,
    which returns (whole Split, {split: indices}) for synthetic sets, a `Listing` for others."""

    read: Callable
    doc: str
    augmentation: Augmentation  # of training batches
    layout: str = ""  # real: what to put where, for the message when nothing is found
    suffixes: tuple[str, ...] = ()  # of files that are the set
    marks: tuple[str, ...] = ()  # what a folder holds that is the set (patterns)


DATASETS: dict[str, Source] = {
    "toy1d": Source(make_toy1d, "synthetic: 21 pixels, two label maps", Augmentation()),
    "shapes": Source(
        make_shapes, "synthetic: class, border and presence ambiguous; 12 maps, known probability",
        Augmentation(flip=(-2, -1), quarter_turns=True)),
    "modes": Source(
        make_modes, "synthetic: street scenes, five classes flip; 32 maps of known probability",
        Augmentation(flip=(-1,))),
    "cells": Source(
        make_cells, "synthetic: cells and membranes, each cell one of 15 classes at random", _FULL),
    "organs": Source(
        make_organs, "synthetic: five organs with blurred borders, three annotators", _MILD),
    "lesions3d": Source(
        make_lesions3d, "synthetic: a certain and a faint 3D lesion; 6 maps of known probability",
        Augmentation(flip=(-3, -2, -1), quarter_turns=True)),
    "lidc": Source(
        read_lidc, "LIDC-IDRI lung nodules, or other sets in its layouts", _FULL,
        "a pickle {key: {image, masks, series_uid}} (linked from github.com/stefanknegt/"
        "Probabilistic-Unet-Pytorch), a folder of PNGs (HPU-Net's gs://hpunet-data/lidc_crops, "
        "Kaggle's LIDC-IDRI-slices), an .npz (python data.py build-lidc) or HDF5",
        (".pickle", ".pkl", ".npz", *HDF5), MARKS),
    "npz": Source(
        read_npz, "your own: images (N, H, W) and labels (N, A, H, W), or in 3D", _MILD,
        "an .npz of images (N, H, W), (N, C, H, W) or (N, C, D, H, W) and labels (N, A, H, W) or "
        "(N, A, D, H, W)", (".npz",)),
    "folder": Source(
        read_folder, "your own: pictures, NIfTI volumes or .npy in a folder of any layout", _MILD,
        "a folder with images/NAME.png and labels/ANNOTATOR/NAME.png (also .tif, .npy, .nii.gz), "
        "or of any layout with --data-args image= label=, two path templates", marks=("*",)),
    "em": Source(
        read_em, "sections of electron microscopy, each cell one of 15 classes at random", _FULL,
        "an .npz of images and instances (N, H, W), 0 = membrane, or a folder with train-input.tif "
        "and train-labels.tif (snemi3d.grand-challenge.org)", (".npz",), ("train-input.tif",)),
    "cityscapes": Source(
        read_cityscapes, "street scenes; five classes flip, or each car has a random class",
        Augmentation(flip=(-1,), rotation=20, shear=0.05, scale=0.2, translation=8, elastic=3,
                     color=0.2),
        "a folder with leftImg8bit/ and gtFine/ (leftImg8bit_trainvaltest and gtFine_trainvaltest "
        "of cityscapes-dataset.com)", marks=("leftImg8bit",)),
    "synapse": Source(
        read_synapse, "abdominal CT, slice by slice, eight organs", _MILD,
        "a folder with train_npz/caseXXXX_sliceYYY.npz and test_vol_h5/caseXXXX.npy.h5 "
        "(github.com/Beckschen/TransUNet, datasets/README.md)", marks=("train_npz", "test_vol_h5")),
    "brats": Source(
        read_brats, "brain tumours in 3D, four channels of MR, three classes",
        Augmentation(flip=(-2, -1), quarter_turns=True),
        "a folder of folders, one a patient, with *_flair, *_t1, *_t1ce, *_t2 and *_seg.nii.gz "
        "(the training data of BraTS 2017 to 2021)", marks=("*/*_seg.nii*", "*/*/*_seg.nii*")),
}


# ----------------------------------------------------------------------------------- command line


def show(name: str, path=None, split: str = "train", out=None, options: dict | None = None) -> str:
    """Returns a table of the data set, and draws the cases of `split` whose label maps differ most
    as a PNG (`out`, or show-<name>.png). Raises DataError as `load` does."""
    options, out = options or {}, Path(out or f"show-{name}.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted = ["all"] if split == "all" else list(SPLITS)
    try:
        splits = load(name, wanted, path, **options)
    except DataError:  # perhaps only another split is missing
        wanted = [split]
        splits = load(name, wanted, path, **options)
    sampled = splits[0].flips is not None and max(map(len, splits)) >= 400
    if sampled:  # Cityscapes: a case of 32 label maps takes a second
        splits = [one.subset(range(0, len(one), max(1, len(one) // 200))) for one in splits]
    distances = [_distances(one) for one in splits]
    columns = [_summary(*pair) for pair in zip(splits, distances)]
    rows = list(dict.fromkeys(itertools.chain(*columns)))
    width = max(13, 1 + max(map(len, rows)))
    lines = [" " * width + "".join(f"{which:>24}" for which in wanted)]
    lines += [row.ljust(width) + "".join(f"{column.get(row, ''):>24}" for column in columns)
              for row in rows]
    lines.append("diversity: mean 1 - IoU of two annotators, drawn with replacement")
    if any(row.startswith("annotator ") for row in rows):
        numbered = " (numbered from 0)" if splits[0].annotators[0] == "0" else ""
        lines.append(f"annotator{numbered}: pixels marked / mean 1 - IoU with another annotator / "
                     "how often one of the two marks nothing")
    shown = splits[wanted.index(split)], distances[wanted.index(split)]
    _plot_cases(*shown, out)
    if sampled:
        lines.append("of a sample of the cases, spread over each split")
    return "\n".join([f"{name}: {DATASETS[name].doc}", *lines, f"wrote {out}"])


def _distances(split: Split) -> Tensor:
    """Returns 1 - IoU of every two label maps of a case, (N, A, A), averaged over the classes."""
    maps = (split.subset([i]).all_maps().labels[0] for i in range(len(split)))
    return torch.stack([1 - metrics.pairwise_iou(m, m, split.num_classes).float() for m in maps])


def _diversity(split: Split, distances: Tensor) -> Tensor:
    """Returns E[1 - IoU] (N,) of two annotators, drawn with replacement (SSN, Sec. 4)."""
    weights = split.probabilities
    return torch.einsum("na,nab,nb->n", weights, distances, weights)


def _summary(split: Split, distances: Tensor) -> dict[str, str]:
    """Returns the table's rows of a split: means over cases, of annotators drawn by probability."""
    weights, present, count = split.probabilities, split.present, split.labels.shape[1]
    counts = torch.zeros(len(split), weights.shape[1], 256)
    for i in range(len(split)):
        for a, label in enumerate(split.subset([i]).all_maps().labels[0]):
            counts[i, a] = torch.bincount(label.flatten(), minlength=256) / label.numel()
    area = counts[:, :, 1:IGNORE].sum(2)  # (N, A) share of the pixels
    shares = torch.einsum("na,nak->k", weights, counts) / len(split)
    empty = float((weights * (area == 0)).sum() / len(split))
    rows = {"cases": f"{len(split)}", "groups": f"{len(set(split.groups))}",
            "channels": f"{split.images.shape[1]}", "size": size_text(split.images.shape[2:]),
            "intensity": f"{split.images.min():.3g} to {split.images.max():.3g}",
            "annotators": f"{weights.shape[1]}",
            "missing": f"{1 - present.float().mean():.1%}", "empty masks": f"{empty:.1%}",
            "diversity": f"{_diversity(split, distances).mean():.3f}"}
    rows |= {f"class {k}": f"{shares[k]:.2%}" for k in range(split.num_classes)}
    if shares[IGNORE]:
        rows["ignored"] = f"{shares[IGNORE]:.2%}"
    if split.exact or split.instances is not None or count == 1:
        return rows  # no annotator drew these label maps
    both = present[:, :, None] & present[:, None] & ~torch.eye(count, dtype=torch.bool)
    one_sided = split.marked[:, :, None] != split.marked[:, None]
    for a in both.any(2).any(0).nonzero().flatten().tolist():
        rows[f"annotator {split.annotators[a]}"] = (
            f"{area[present[:, a], a].mean():.2%} / {distances[:, a][both[:, a]].mean():.3f} / "
            f"{one_sided[:, a][both[:, a]].float().mean():.1%}")
    return rows


def _plot_cases(split: Split, distances: Tensor, out: Path, cases: int = 8, maps: int = 7) -> None:
    """Draws a row a case, the most diverse first (of a volume, its fullest slice): the image, and
    its likeliest label maps over it, each with its annotator's name and probability."""
    pictures, notes = {}, {}
    scores, order = _diversity(split, distances).sort(descending=True, stable=True)
    for score, i in zip(scores[:cases].tolist(), order[:cases].tolist()):
        case, name = split.subset([i]).all_maps(), f"{split.names[i][-36:]}\ndiversity {score:.2f}"
        image, labels = case.images[0], case.labels[0]
        if image.dim() == 4:
            fullest = fullest_slice(labels)
            image, labels = image[:, fullest], labels[:, fullest]
        elif image.dim() == 2:  # a line, shown as a band
            image, labels = image[:, None].repeat(1, 5, 1), labels[:, None].repeat(1, 5, 1)
        pictures[name] = [paint_image(image)]
        probabilities, numbers = case.probabilities[0].sort(descending=True, stable=True)
        for probability, number in zip(probabilities[:maps], numbers[:maps]):
            if probability > 0:
                notes[name, len(pictures[name])] = f"{split.annotators[number]}: {probability:.2f}"
                pictures[name].append(paint_label(labels[number], image))
    save_grid(out, pictures, ["image", "label maps"], notes)


def main(argv=None) -> int:
    """Runs the command line. A user's mistake is one line on stderr and exit status 2."""
    sets = "\n".join(f"  {name:12}{source.doc}" for name, source in DATASETS.items())
    parser = argparse.ArgumentParser(
        prog="python data.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Lists, shows, builds and exports data sets.\n\n{sets}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    look = commands.add_parser("show", help="a table, and a PNG of cases and their label maps")
    copy = commands.add_parser("export", help="any set as .npz, a folder of PNGs or LIDC's pickle")
    for command in (look, copy):
        command.add_argument("--data", required=True, help=f"one of: {' '.join(DATASETS)}")
        command.add_argument("--path", help="its file or folder (default datasets/<data>)")
        command.add_argument("--data-args", nargs="+", metavar="K=V", default=[],
                             help="its options")
    look.add_argument("--split", default="train", choices=[*SPLITS, "all"])
    look.add_argument("--out", help="the PNG (default show-<data>.png)")
    copy.add_argument("--out", required=True, help="NAME.npz, NAME.pickle, or a new folder")
    copy.add_argument("--layout", choices=LAYOUTS, help="default: what the ending of --out says")
    cut = commands.add_parser("build-lidc", help="LIDC-IDRI from the archive's DICOM and XML",
                              description=build_lidc.__doc__)
    cut.add_argument("src", metavar="SRC", help="the archive's folder, nested in any way")
    cut.add_argument("dst", metavar="DST", help="the .npz to write")
    cut.add_argument("--size", type=int, default=180, help="pixels a side (default 180)")
    cut.add_argument("--window", type=float, nargs=2, default=LIDC_WINDOW, metavar="HU",
                     help="Hounsfield units that become 0 and 1 (default -1000 400)")
    cut.add_argument("--border", choices=["exclude", "include"], default="exclude",
                     help="whether the outlines belong to the nodules (default exclude)")
    cut.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
                     help="threads (default %(default)s)")
    args = vars(parser.parse_args(argv))
    command = args.pop("command")
    try:
        if command == "build-lidc":
            build_lidc(**args)
        elif command:
            name, path, out = (args[key] for key in ("data", "path", "out"))
            options = key_values("--data-args", args["data_args"])
            if command == "show":
                say(show(name, path, args["split"], out, options))
            else:
                say(export(load(name, "all", path, **options), out, args["layout"] or ""))
        else:
            parser.print_help()
        return 0
    except (UserError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print("error: out of memory: name fewer cases in a split_file, or shrink the images",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; rerun to resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
