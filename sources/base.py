"""What every data set becomes, a `Split`, and how the cases found in files become one.

A set's reader only *lists* its cases: a `Listing` of `Case`s, each with a function that reads it.
`assign` shares them out to train, val and test, and `collect` reads those that are asked for.
"""

import contextlib
import difflib
import functools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import IGNORE, Progress, is_first
from sources.files import DataError, as_float_image, holds, readable, shortened, size_text

SPLITS = ("train", "val", "test")
SLOW = 3.0  # seconds of reading after which a progress line appears
MANY = 64  # classes; where there are more, their number has to be given
LARGE = 5.0  # root mean square of an image above which a warning is printed
SMALL = 0.03  # deviation of all images below which one is printed


@dataclass(repr=False)
class Split:
    """Cases in memory, images and all their annotations, on one device."""

    images: Tensor  # (N, C, *S) float32
    labels: Tensor  # (N, A, *S) uint8, 255 = ignore; (N, 1, *S) where `flips` gives the others
    weights: Tensor | None  # (N, A) float32, rows sum to 1: probabilities; None: uniform
    groups: list[str]  # patient, series or scene of each case: no split cuts through one
    num_classes: int
    names: list[str]  # key or file of each case
    # Instance ids (N, *S) int32, -1 = ignore. Ids below `fixed` are classes; every batch maps the
    # others to new random classes fixed..K-1. `labels` holds a few such maps, for evaluation.
    instances: Tensor | None = None
    fixed: int = 1
    exact: bool = False  # whether labels and weights are the whole distribution of label maps
    # (N, A, 256) uint8, saves memory: label map a of case i is flips[i, a][labels[i, 0]].
    flips: Tensor | None = None
    scored: tuple[int, ...] = ()  # classes whose IoU the set's paper averages; () = 1..K-1
    # {split: names of its cases} of the whole set, as `split_file` takes it.
    parts: dict[str, list[str]] = field(default_factory=dict)
    annotators: list[str] = field(default_factory=list)  # names; "0", "1", ... where they have none

    def __post_init__(self):
        count = (self.labels if self.flips is None else self.flips).shape[1]
        if len(self.annotators) != count:  # none are given, or they drew other label maps
            self.annotators = [str(number) for number in range(count)]

    def __repr__(self) -> str:
        return (f"Split({len(self)} cases of {size_text(self.images.shape[1:])}, "
                f"{self.num_classes} classes, {self.drawn_by})")

    @property
    def drawn_by(self) -> str:
        """Whose label maps these are, for a message."""
        if self.exact or self.instances is not None:
            return f"{len(self.annotators)} label maps"
        return f"annotators {', '.join(shortened(self.annotators))}"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def present(self) -> Tensor:
        """(N, A) bool: whether the annotator labelled the case, that is, is not 255 everywhere."""
        parts = self.labels.split(64)  # so that few cases at a time take more memory
        return torch.cat([(labels != IGNORE).flatten(2).any(2) for labels in parts])

    @property
    def marked(self) -> Tensor:
        """(N, A) bool: whether the annotator marked any foreground."""
        parts = self.labels.split(64)
        return torch.cat([((part > 0) & (part != IGNORE)).flatten(2).any(2) for part in parts])

    @property
    def probabilities(self) -> Tensor:
        """(N, A) float32, rows sum to 1: `weights`, or uniform over the annotators present."""
        share = self.present * (1.0 if self.weights is None else self.weights)
        return share / share.sum(1, keepdim=True)

    def label_maps(self, cases: Tensor, annotators: Tensor) -> Tensor:
        """Returns one label map (B, *S) uint8 of each case, both given by their index (B,)."""
        if self.flips is None:
            return self.labels[cases, annotators]
        return relabel(self.labels[cases, 0], self.flips[cases, annotators])

    def all_maps(self) -> "Split":
        """Returns the split with every label map in `labels`. It is large: take few cases."""
        if self.flips is None:
            return self
        maps = [relabel(self.labels[:, 0], table) for table in self.flips.unbind(1)]
        return replace(self, labels=torch.stack(maps, 1), flips=None)

    def to(self, device) -> "Split":
        """Returns the split with all its tensors on `device`."""
        return replace(self, **{key: tensor.to(device) for key, tensor in self._tensors()})

    def subset(self, indices: Sequence[int]) -> "Split":
        """Returns these cases. For a range the tensors are views, so nothing is copied."""
        if isinstance(indices, range):
            rows = slice(indices.start, indices.stop, indices.step)
        else:
            rows = torch.as_tensor(indices, dtype=torch.long, device=self.images.device)
        groups, names = ([kept[i] for i in indices] for kept in (self.groups, self.names))
        return replace(self, **{key: tensor[rows] for key, tensor in self._tensors()},
                       groups=groups, names=names)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(key, value) for key, value in vars(self).items() if torch.is_tensor(value)]


# ----------------------------------------------------------------------------- from files to Split


@dataclass
class Case:
    """A case that a reader found: read() gives its image (C, *S) and {annotator: label map}."""

    name: str
    group: str
    read: Callable[[], tuple[np.ndarray, dict[int, np.ndarray]]]
    split: str = ""  # train, val or test, where the set has splits of its own

    def __post_init__(self):
        self.name, self.group = writable(self.name), writable(self.group)


@dataclass
class Listing:
    """The cases of a set, not read yet, and what else makes a Split of them."""

    cases: list[Case]
    num_classes: int = 0  # 0: the largest label + 1
    # Of sets without splits of their own: the shares that `split_groups` takes, here 60/20/20.
    val: float = 0.25
    test: float = 0.2
    # Whether only the splits asked for are read. Otherwise all are, so that each has the number of
    # classes and the size of the whole set.
    apart: bool = False
    if_empty: str = ""  # why the set may have no case of {split}
    weights: np.ndarray | None = None  # (N, A)
    flips: tuple[Tensor, Tensor] | None = None  # (A, 256) and (A,), of every case: `flip_modes`
    fixed: int | None = None  # given where the label maps are instance ids, see Split
    scored: tuple[int, ...] = ()
    pad: str = "reflect"  # how images are filled up to the largest: a mode of numpy.pad
    annotators: Sequence[str] = ()  # the names of annotator 0, 1, ..., where they have any


def locate(name: str, path, source) -> Path:
    """Finds the file, or the folder in a known layout, that `path` or datasets/<name> points to."""
    place = Path("datasets", name) if path is None else Path(str(path))
    if place.is_dir():
        if any(any(place.glob(mark)) for mark in source.marks):
            return place
        files = sorted(place.iterdir())
    else:
        files = map(place.with_suffix, source.suffixes) if path is None else [place]
    found = [file for file in files if file.suffix in source.suffixes and file.exists()]
    if len(found) > 1:
        raise DataError(f"{name}: several files at {place}: give the path of one, "
                        f"{' or '.join(file.name for file in found)}")
    if not found:
        fault = f"nothing to read at {place}" + (f" ({holds(place)})" if place.is_dir() else "")
        if not place.exists():
            near = next(folder for folder in place.absolute().parents if folder.is_dir())
            fault = f"there is no {place}"
            if path is not None:
                fault += f"; {holds(near)}"
        raise DataError(f"{name}: {fault}: give as --path, or put at datasets/{name}, "
                        f"{source.layout}; sources/README.md has every layout")
    return found[0]


def split_groups(groups: Sequence[str], val: float, test: float = 0.2) -> dict[str, list[int]]:
    """Splits cases into train, val and test, as their indices, with no group in two of them.

    The n distinct groups, sorted, are shuffled by RandomState(0); the first ceil(test n) are test.
    The other m, in that order, are shuffled by a fresh RandomState(0); the first ceil(val m) are
    val. With val = 0.2 this is the 64/16/20 split of the LIDC pickle that recent papers share (two
    calls of scikit-learn's train_test_split); with val = 0.25 it is 60/20/20.
    """
    rest, members = np.unique(groups), {}
    for split, share in (("test", test), ("val", val)):
        rest = rest[np.random.RandomState(0).permutation(len(rest))]
        taken, rest = np.split(rest, [math.ceil(share * len(rest))])
        members[split] = set(taken)
    members["train"] = set(rest)
    return {split: [i for i, group in enumerate(groups) if group in members[split]]
            for split in SPLITS}


def assign(place, listing: Listing, wanted: Sequence[str], split_file="") -> dict[str, list[int]]:
    """Returns the case indices of train, val and test: the set's own, or those of a split file.

    Raises DataError for two cases of one name, a group in two splits, an empty split in `wanted`.
    """
    cases, groups = listing.cases, [case.group for case in listing.cases]
    name, count = Counter(case.name for case in cases).most_common(1)[0]
    if count > 1:
        raise DataError(f"{place}: two cases are named {name!r}; rename one")
    why = listing.if_empty or (f"{len(set(groups))} groups (patients, scenes) are too few to "
                               "split: give 3 or more, or load 'all'")
    if split_file:
        place, splits = split_file, _read_split_file(split_file, cases, wanted)
        why = listing.if_empty or "none is listed"
    elif any(case.split for case in cases):
        splits = {split: [i for i, case in enumerate(cases) if case.split == split]
                  for split in SPLITS}
    else:
        splits = split_groups(groups, listing.val, listing.test)
    home: dict[str, str] = {}
    for split, rows in splits.items():
        for group in [groups[i] for i in rows]:
            if home.setdefault(group, split) != split:
                raise DataError(f"{place}: {group!r} is in {home[group]} and in {split}; all cases "
                                "of a group (patient, scene) must be in one")
    for split in wanted:
        if split != "all" and not splits[split]:
            raise DataError(f"{place}: no case is left for {split!r}: "
                            + why.replace("{split}", split))
    return splits


def _read_split_file(file, cases: Sequence[Case], wanted: Sequence[str]) -> dict[str, list[int]]:
    """Reads a JSON file {"train": [names of cases or groups], "val": ..., "test": ...}. All names
    in the splits `wanted` must be known."""
    with readable(file, "split file (JSON)"):
        listed = json.loads(Path(file).read_text(encoding="utf-8"))
    if (not isinstance(listed, dict) or not set(listed) <= set(SPLITS)
            or not all(isinstance(names, list) for names in listed.values())):
        raise DataError(f'{file}: give {{"train": [names], "val": [names], "test": [names]}}, of '
                        "cases or of groups (patients)")
    listed = {split: set(map(str, listed.get(split, []))) for split in SPLITS}
    needed = {name for split in SPLITS if {split, "all"} & {*wanted} for name in listed[split]}
    names, groups = {case.name for case in cases}, {case.group for case in cases}
    for name in sorted(needed - names - groups):
        raise DataError(f"{file}: no case and no group is named {name!r}; the first case is "
                        f"{cases[0].name!r}, of group {cases[0].group!r}")
    every = set().union(*listed.values())
    if lost := sorted(every - names - groups):
        warn(f"{file}: {len(lost)} names of other splits are not in the data, such as {lost[0]!r}")
    only_cases = every & (names | groups) <= names  # then a group that is named alike is not meant
    return {split: [i for i, case in enumerate(cases) if case.name in listed[split]
                    or (case.group in listed[split] and not only_cases)] for split in SPLITS}


def collect(place, listing: Listing, rows: list[int]) -> Split:
    """Reads the cases at `rows` on several threads, checks them and stacks them."""
    if listing.num_classes and not 2 <= listing.num_classes <= IGNORE:
        raise DataError(f"{place}: num_classes is {listing.num_classes}; 2 to {IGNORE} are allowed")
    cases, images, maps = [listing.cases[i] for i in rows], [], []
    kinds: dict[str, list] = {}  # of label maps, see `_kind`
    progress = Progress(len(cases))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # A case's arrays are kept until they are stacked, so reading ahead costs no more memory.
        for image, drawn in pool.map(partial(_read_case, place, listing), cases):
            images.append(image)
            maps.append(drawn)
            for annotator, label in drawn.items() if listing.fixed is None else ():
                kinds.setdefault(_kind(label), []).append((len(images) - 1, annotator))
            if (image.ndim, len(image)) != (images[0].ndim, len(images[0])):
                raise DataError(f"{place}: {cases[len(images) - 1].name!r}: image is "
                                f"{size_text(image.shape)} (channels first), the first is "
                                f"{size_text(images[0].shape)}; channels and axes must agree")
            if time.monotonic() - progress.start > SLOW:
                progress.update(len(images), "cases read")
    if time.monotonic() - progress.start > SLOW:
        progress.say(f"{place}: {len(cases)} cases read")
    if "classes" in kinds and "black and white" in kinds and "ignored" not in kinds:
        odd = kinds["black and white"]
        (case, number), names = odd[0], dict(enumerate(listing.annotators))
        warn(f"{place}: {len(odd)} label maps hold nothing but 0 and {IGNORE} (ignored), such as "
             f"that of {cases[case].name!r} by annotator {names.get(number, number)}; "
             f"{len(kinds['classes'])} others have classes: are those black and white masks?")
    whole = _stack(place, listing, rows, images, maps)
    warn_of_scale(place, whole.images)
    return whole


def warn_of_scale(place, images: Tensor) -> None:
    """Prints a warning if images (N, C, *S), read from `place`, are far from the scale that models
    expect: pixels of some image are too large, or those of every image hardly differ."""
    largest = max(float(image.norm()) / math.sqrt(image.numel()) for image in images)
    advice = "models expect about [0, 1], or mean 0 and deviation 1"
    if largest > LARGE:
        warn(f"{place}: pixels of about {largest:.3g}; {advice}: divide the images, or store them "
              "as uint8 or uint16")
    elif max(float(image.std()) for image in images) < SMALL:
        warn(f"{place}: in every image, the deviation of the pixels is below {SMALL}; {advice}: "
             "multiply the images (12 bits stored in 16 bits give values of 0 to 0.06)")


def _kind(label: np.ndarray) -> str:
    """Tells what a label map holds besides background: "classes", or pixels to be "ignored" as
    well; "black and white", nothing but ignored ones; or "" if it is of a single value 0 or 255."""
    ignored = (label == IGNORE).any()
    if ((label > 0) & (label < IGNORE)).any():
        return "ignored" if ignored else "classes"
    return "black and white" if ignored and not label.all() else ""


def check_room(place, cases: int, shape: Sequence[int], annotators: int, held: int = 0) -> None:
    """Raises DataError if so many images (C, *S) and label maps do not fit into the memory that is
    free (known on Linux only): the system would end the process without a word."""
    need, free = cases * math.prod(shape[1:]) * (4 * shape[0] + annotators), math.inf
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun, each with a copy
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    if processes * (need - held) > free:  # what is held is freed while it is stacked
        raise DataError(f"{place}: {cases} cases of {size_text(shape)} (the largest extent of each "
                        f"axis) take {need / 2**30:.1f} GB in each of {processes} processes, and "
                        f"{free / 2**30:.1f} GB are free: name fewer cases in a split_file, or cut "
                        "or shrink the images")


@functools.cache
def warn(text: str) -> None:
    """Prints a warning once, also under torchrun, and where a set is read again."""
    if is_first():
        print(f"warning: {text}", file=sys.stderr)


def _stack(place, listing: Listing, rows: list[int], images: list, maps: list) -> Split:
    """Stacks images (C, *S) and {annotator: label map (*S)} of all cases into one Split. A missing
    label map is 255 and has weight 0.

    Cases of different sizes are centred in the largest extent of each axis: images are filled up
    by reflection, labels with 255, which no loss and no metric uses.
    """
    cases = [listing.cases[i] for i in rows]
    size, annotators = np.max([image.shape[1:] for image in images], 0), 1 + max(chain(*maps, [0]))
    held = sum(array.nbytes for i in range(len(cases)) for array in (images[i], *maps[i].values()))
    check_room(place, len(cases), (len(images[0]), *size), annotators, held)
    stack = np.empty((len(cases), len(images[0]), *size), np.float32)
    empty, kind = (IGNORE, np.uint8) if listing.fixed is None else (-1, np.int32)
    labels = np.full((len(cases), annotators, *size), empty, kind)
    for i in range(len(cases)):
        stack[i] = centred(as_float_image(images[i], cases[i].name), size, mode=listing.pad)
        for annotator, label in maps[i].items():
            labels[i, annotator] = centred(label, size, constant_values=empty)
        images[i] = maps[i] = None  # frees them one by one
    whole = Split(torch.from_numpy(stack), torch.from_numpy(labels), None,
                  [case.group for case in cases], listing.num_classes,
                  [case.name for case in cases], scored=listing.scored,
                  annotators=list(map(writable, listing.annotators[:annotators])))
    if listing.fixed is not None:
        whole = replace(whole, instances=whole.labels[:, 0], fixed=listing.fixed)
        return replace(whole, labels=_fixed_maps(whole))

    highest = np.max([[label[label != IGNORE].max(initial=0) for label in drawn]
                      for drawn in labels], 0).astype(int)  # (A,)
    if not highest.any():
        raise DataError(f"{place}: all labels are 0 (background) or {IGNORE} (ignored); if these "
                        "are black and white masks, add --data-args masks=binary (data set folder),"
                        " or store foreground as 1")
    num_classes = listing.num_classes or int(highest.max()) + 1
    if num_classes > MANY and not listing.num_classes:
        raise DataError(f"{place}: the largest label makes {num_classes} classes; if that is right,"
                        f" add --data-args num_classes={num_classes}; if these are black and white "
                        "masks with grey borders, masks=binary (data set folder) or redraw them")
    whole.num_classes = num_classes
    weights = whole.present.double()  # (N, A)
    if listing.weights is not None:
        weights = weights * torch.from_numpy(listing.weights[rows])
    total = weights.sum(1, keepdim=True)
    if not total.all():
        raise DataError(f"{place}: {whole.names[int(total.argmin())]!r}: no mask of any annotator "
                        "(or only of weight 0); give one, or leave the case out")
    if listing.flips:
        table, weights = (part.expand(len(whole), *part.shape) for part in listing.flips)
        return replace(whole, flips=table, weights=weights.float(), exact=True)
    if listing.weights is not None or not weights.all():
        whole.weights = (weights / total).float()
    return whole


def _read_case(place, listing: Listing, case: Case) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Reads and checks a case: its image, and its label maps as uint8 (or instance ids as int32).
    Images of 8 and 16 bits stay small until they are stacked; others become float32."""
    where = f"{place}: {case.name!r}"
    image, maps = case.read()
    if image.dtype not in (np.uint8, np.uint16):
        image = as_float_image(image, f"{where}: image")
    if image.ndim not in (3, 4) or not image.size:
        raise DataError(f"{where}: image is {size_text(image.shape[1:])}; (H, W) or (D, H, W) is "
                        "needed")
    for annotator, label in maps.items():
        who = f"of {listing.annotators[annotator]}" if listing.annotators else annotator
        title = f"{where}: mask {who}"
        if listing.fixed is None:
            maps[annotator] = _as_label(label, listing.num_classes or IGNORE, title)
        else:
            maps[annotator] = _as_instances(label, listing.fixed, title)
        if label.shape != image.shape[1:]:
            raise DataError(f"{title} is {size_text(label.shape)} and its image "
                            f"{size_text(image.shape[1:])}; they must be of one size")
    return image, maps


def _as_label(label: np.ndarray, num_classes: int, where: str) -> np.ndarray:
    if not isinstance(label, np.ndarray) or label.dtype.kind not in "buif":
        kind = getattr(label, "dtype", type(label).__name__)
        raise DataError(f"{where} is of {kind}; give an array of whole numbers")
    with np.errstate(invalid="ignore"):  # whatever NaN becomes, it differs from NaN
        small = label.astype(np.uint8, copy=False)
    good = (small == label) & ((small < num_classes) | (small == IGNORE))
    if not good.all():
        raise DataError(f"{where} has the value {label[~good][0]}; 0 to {num_classes - 1} are "
                        f"classes, {IGNORE} is ignored")
    return small


def _as_instances(ids: np.ndarray, fixed: int, where: str) -> np.ndarray:
    """Renumbers the ids from `fixed` on without gaps, so that tables of classes stay small."""
    if ids.dtype.kind not in "ui" or (ids < -1).any() or not (ids >= 0).any():
        raise DataError(f"{where} is of {ids.dtype}, its least {ids.min(initial=0)}; instance ids "
                        "are whole numbers from 0 up (at least one); -1 is ignored")
    found = np.unique(ids[ids >= fixed])
    return np.where(ids < fixed, ids, fixed + np.searchsorted(found, ids)).astype(np.int32)


def _fixed_maps(whole: Split) -> Tensor:
    """Draws four label maps a case, (N, 4, *S), of a split with instances. Those of a case depend
    on its name alone."""
    maps = []
    for ids, name in zip(whole.instances, whole.names):
        for number in range(4):
            table = random_classes(1, int(ids.max()) + 1, whole.fixed, whole.num_classes,
                                   seeded_generator(number, *name.encode()))
            maps.append(relabel(ids[None], table))
    return torch.cat(maps).unflatten(0, (-1, 4))


# ----------------------------------------------------------------------- shared by several files


def writable(text: str) -> str:
    """Replaces what a CSV or JSON file cannot hold: bytes of a file's name that are not UTF-8, and
    code points in damaged arrays of text that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8", "replace")


def centred(array: np.ndarray, size: Sequence[int], **how) -> np.ndarray:
    """Crops and fills the last axes to `size`, about their centre; `how` is numpy.pad's."""
    cuts, widths = [...], [(0, 0)] * (array.ndim - len(size))
    for have, want in zip(array.shape[-len(size):], size):
        spare, lack = max(have - want, 0), max(want - have, 0)
        cuts.append(slice(spare // 2, spare // 2 + want))
        widths.append((lack // 2, lack - lack // 2))
    array = array[tuple(cuts)]
    return np.pad(array, widths, **how) if np.any(widths) else array


def check_known(what: str, name: str, names: Iterable[str]) -> str:
    """Returns `name` if it is one of `names`, and raises a DataError that lists them if not."""
    if name not in names:
        near = difflib.get_close_matches(str(name)[:80], names, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise DataError(f"unknown {what} {name!r}: {meant}choose from {', '.join(names)}")
    return name


def random_classes(count: int, ids: int, fixed: int, num_classes: int, generator) -> Tensor:
    """Draws tables (count, ids) uint8 of a random class fixed..K-1 for each id from `fixed` on."""
    table = torch.randint(fixed, num_classes, (count, ids), generator=generator, dtype=torch.uint8)
    table[:, :fixed] = torch.arange(fixed)[:ids]
    return table


def relabel(instances: Tensor, table: Tensor) -> Tensor:
    """Looks instance ids or classes (B, *S) up in class tables (B, ids); returns (B, *S) uint8."""
    labels = table.gather(1, instances.flatten(1).clamp(min=0).long()).view(instances.shape)
    return labels.masked_fill(instances < 0, IGNORE)


def seeded_generator(*words: int) -> torch.Generator:
    """A generator seeded by a hash of `words`, so that neighbouring steps share nothing."""
    seed = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def spline(knots: Tensor, shape: Sequence[int]) -> Tensor:
    """Evaluates the uniform cubic B-spline of `knots` (B, C, *k) on a grid: (B, C, *shape)."""
    for want in shape:
        count = knots.shape[2]
        at = torch.linspace(1, count - 2, want, device=knots.device)
        gap = (at[:, None] - torch.arange(count, device=knots.device)).abs()
        basis = torch.where(gap < 1, 2 / 3 - gap**2 + gap**3 / 2, (2 - gap).clamp(min=0) ** 3 / 6)
        knots = torch.tensordot(knots, basis, ([2], [1]))  # the finished axis goes to the end
    return knots
