"""What every data set becomes: a `Split`, and the steps from listed cases to one."""

import itertools
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import IGNORE
from sources.files import DataError, readable, size_text


SPLITS = ("train", "val", "test")


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
    def present(self) -> Tensor:
        """(N, A) bool: whether the annotator labelled the case, that is, is not 255 everywhere."""
        return (self.labels != IGNORE).flatten(2).any(2)

    @property
    def marked(self) -> Tensor:
        """(N, A) bool: whether the annotator marked any foreground."""
        return ((self.labels > 0) & (self.labels != IGNORE)).flatten(2).any(2)

    @property
    def probabilities(self) -> Tensor:
        """(N, A) float32, rows sum to 1: `weights`, or uniform over the annotators present."""
        share = self.present * (1.0 if self.weights is None else self.weights)
        return share / share.sum(1, keepdim=True)

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
        maps = [relabel(self.labels[:, 0], table) for table in self.flips.unbind(1)]
        return replace(self, labels=torch.stack(maps, 1), flips=None)


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


class Case(NamedTuple):
    """A case that a reader found; read(*key) is its image (C, *S) and {reader: label map (*S)}."""

    name: str
    group: str
    read: Callable[..., tuple[np.ndarray, dict[int, np.ndarray]]]
    key: tuple


@dataclass
class Listing:
    """The cases of a set, not read yet, and what makes a Split of them."""

    cases: list[Case]
    parts: dict[str, list[int]]  # the case indices of train, val and test
    num_classes: int = 0  # 0: the largest label + 1
    own: str = ""  # where files tell the split, parts are read one by one: why `part` may be empty
    weights: np.ndarray | None = None  # (N, A)
    flips: tuple[Tensor, Tensor] | None = None  # (A, 256) and (A,), of every case: `flip_modes`
    fixed: int | None = None  # given where the label maps are instance ids, as Split tells
    scored: tuple[int, ...] = ()
    pad: str = "reflect"  # how images are filled up to the largest: a mode of numpy.pad


def gather(name, path, source, wanted, split_file, values) -> tuple[Split, dict, dict]:
    """(the cases read, the rows of each part, the names of each part) of a set read from files."""
    with readable(path or name, "data set", OSError):  # such as a folder that may not be opened
        place = locate(name, path, source)
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


def _listed_parts(file, cases: Sequence[Case]) -> dict[str, list[int]]:
    """The parts named by a JSON file {"train": [names of cases or groups], "val": ..., "test"}."""
    with readable(file, "split file (JSON)"):
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


def _collect(path, listing: Listing, rows: Sequence[int]) -> Split:
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
            raise DataError(f"{where}: image is {size_text(image.shape[1:])}; (H, W) or (D, H, W) is "
                            "needed")
        if images and (image.ndim, len(image)) != (images[0].ndim, len(images[0])):
            raise DataError(f"{where}: image is {size_text(image.shape)} (channels first), the first "
                            f"is {size_text(images[0].shape)}; give as many channels and axes in all")
        for reader, mask in drawn.items():
            told = f"{where}: mask {reader}"
            drawn[reader] = (_as_label(mask, listing.num_classes or IGNORE, told)
                             if listing.fixed is None else _as_instances(mask, listing.fixed, told))
            if mask.shape != image.shape[1:]:
                raise DataError(f"{told} is {size_text(mask.shape)} and its image "
                                f"{size_text(image.shape[1:])}; they must be of one size")
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


def _read_ahead(cases: Iterable[Case], threads: int = min(8, os.cpu_count() or 1)) -> Iterator:
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
        generator = seeded_generator(number, *whole.names[i].encode())
        return relabel(ids, random_classes(1, int(ids.max()) + 1, whole.fixed, whole.num_classes,
                                             generator))

    drawn = [torch.cat([draw(i, number) for i in range(len(whole))]) for number in range(maps)]
    return replace(whole, labels=torch.stack(drawn, 1))


def check_known(what: str, name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise DataError(f"unknown {what} {name!r}: choose from {', '.join(names) or '(none)'}")
    return name


def random_classes(count: int, ids: int, fixed: int, num_classes: int, generator) -> Tensor:
    """A random class fixed..K-1 for every instance id from `fixed` on. (count, ids) uint8."""
    table = torch.randint(fixed, num_classes, (count, ids), generator=generator, dtype=torch.uint8)
    table[:, :fixed] = torch.arange(fixed)[:ids]
    return table


def relabel(instances: Tensor, table: Tensor) -> Tensor:
    """Instance ids or classes (B, *S) through a class table (B, ids) -> (B, *S) uint8."""
    labels = table.gather(1, instances.flatten(1).clamp(min=0).long()).view(instances.shape)
    return labels.masked_fill(instances < 0, IGNORE)


def seeded_generator(*words: int) -> torch.Generator:
    """A generator seeded by a hash of `words`: neighbouring steps share nothing."""
    seed = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def locate(name: str, path, source) -> Path:
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


def spline(knots: Tensor, shape: Sequence[int]) -> Tensor:
    """The uniform cubic B-spline with control values `knots` (B, C, *k) -> (B, C, *shape)."""
    for want in shape:
        count = knots.shape[2]
        at = torch.linspace(1, count - 2, want, device=knots.device)
        gap = (at[:, None] - torch.arange(count, device=knots.device)).abs()
        basis = torch.where(gap < 1, 2 / 3 - gap**2 + gap**3 / 2, (2 - gap).clamp(min=0) ** 3 / 6)
        knots = torch.tensordot(knots, basis, ([2], [1]))  # the axis done goes to the end
    return knots


def measure_case(labels: Tensor, odds: Tensor, num_classes: int) -> dict:
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
