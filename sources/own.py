"""A user's own cases: an .npz, or a folder of pictures or NIfTI volumes."""

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from sources.base import Case, Listing, split_groups
from sources.files import (FOLDER, DataError, is_nifti, read_label, read_nifti, read_npz_arrays,
                           read_picture, readable, same_grid, size_text, standardised)


def read_npz(path: Path, wanted: Sequence[str], val: float = 0.25, *,
             num_classes: int = 0) -> Listing:
    """A user's own .npz.

      images   (N, H, W), (N, C, H, W) or (N, C, D, H, W): floats, or uint8 or uint16, as
               `as_float_image` scales them
      labels   (N, A, H, W) or (N, A, D, H, W), always with the annotator axis: 0..K-1, 255 = ignore
    and optionally: weights (N, A), normalised row by row; groups (N,), such as the patient of each
    case; names (N,); num_classes, else the largest label + 1. An annotator's map of nothing but
    255 is missing.
    """
    arrays = read_npz_arrays(path, ("images", "labels"),
                             ("weights", "groups", "names", "num_classes"))
    images, labels = arrays["images"], arrays["labels"]
    shape = labels.shape
    images = images[:, None] if images.ndim == labels.ndim - 1 else images
    if len(shape) not in (4, 5) or images.shape[:1] + images.shape[2:] != shape[:1] + shape[2:]:
        raise DataError(f"{path}: labels is {size_text(shape)} and images "
                        f"{size_text(arrays['images'].shape)}; (N, A, H, W) must meet (N, H, W) or "
                        "(N, C, H, W) (of a single annotator? store labels[:, None])")
    sizes = {"weights": shape[:2], "groups": shape[:1], "names": shape[:1], "num_classes": ()}
    for key in arrays.keys() & sizes:
        number = arrays[key].dtype.kind in "buif" or key in ("groups", "names")
        if arrays[key].shape != sizes[key] or not number:
            raise DataError(f"{path}: {key} is {size_text(arrays[key].shape)} of "
                            f"{arrays[key].dtype}; {size_text(sizes[key])} is needed")
    if not float(arrays.get("num_classes", 0)).is_integer():
        raise DataError(f"{path}: num_classes is {arrays['num_classes']}; give a whole number")
    num_classes = num_classes or int(arrays.get("num_classes", 0))
    with readable(path, "names or groups"):  # damaged text may hold what is no character
        names = [str(name) for name in arrays.get("names", range(len(labels)))]
        groups = [str(group) for group in arrays.get("groups", names)]
    cases = [Case(name, group, partial(read_row, images, labels, i))
             for i, (name, group) in enumerate(zip(names, groups))]
    return Listing(cases, split_groups(groups, val), num_classes, weights=arrays.get("weights"))


def read_row(images: np.ndarray, labels: np.ndarray, i: int):
    """Case i of stacked images (N, C, *S) and labels (N, A, *S), as `Case.read` gives it."""
    return images[i], dict(enumerate(labels[i]))


def read_folder(path: Path, wanted: Sequence[str], *, num_classes: int = 0,
                masks: Literal["classes", "binary"] = "classes") -> Listing:
    """Anyone's own images: images/NAME.png and labels/ANNOTATOR/NAME.png.

    Labels are grey levels or palette indices from 0 to K - 1, with 255 to ignore; with masks=binary
    whatever is not 0 is class 1. Channels of NIfTI volumes are brought to mean 0 and deviation 1;
    one of a single slice is 2D. An annotator may lack some of the images. groups.csv, lines of
    NAME,GROUP, tells which cases are of one patient.
    """
    images = _files_by_name(path / "images")
    annotators = [_files_by_name(folder) for folder in sorted((path / "labels").iterdir())
                  if folder.is_dir()]
    for files in annotators:
        for name in files.keys() - images.keys():
            raise DataError(f"{files[name]}: images/ holds none of that name")
    groups = _read_groups(path / "groups.csv", images)
    cases = []
    for name, image in images.items():
        labels = {number: files[name] for number, files in enumerate(annotators) if name in files}
        cases.append(Case(name, groups[name] or name, partial(_read_files, image, labels, masks)))
    return Listing(cases, split_groups([case.group for case in cases], val=0.25), num_classes)


def _files_by_name(folder: Path) -> dict[str, Path]:
    """{name without its ending: file} of the pictures and volumes in `folder`."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.is_dir():
            continue
        end = [suffix for suffix in FOLDER if file.name.lower().endswith(suffix)]
        if not end:
            raise DataError(f"{file}: not one of {', '.join(FOLDER)}; convert or remove it")
        other = found.setdefault(file.name[:-len(end[0])], file)
        if other is not file:
            raise DataError(f"{file}: {other.name} beside it has the same name; rename one")
    return found


def _read_groups(file: Path, images: dict[str, Path]) -> dict[str, str | None]:
    """{name: group}, from the table `file` if there is one."""
    if not file.exists():
        return dict.fromkeys(images)
    with readable(file, "table of name,group"):
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        table = dict(csv.reader(filter(None, lines)))
    table.pop("name", None)  # the heading
    if odd := sorted(table.keys() ^ images.keys()):
        fault = "does not list" if odd[0] in images else "images/ does not hold"
        raise DataError(f"{file}: {fault} {odd[0]!r}; list every image once")
    return table


def _read_files(image: Path, labels: dict[int, Path], masks: str):
    """A case of a folder, as `Case.read` gives it."""
    if is_nifti(image):
        array, source = read_nifti(image)
        array = standardised(array, np.ones(array.shape[1:], bool))
        maps = {}
        for number, file in labels.items():
            label, other = read_nifti(file)
            same_grid(source, other, file)
            maps[number] = label[0] if len(label) == 1 else label
    else:
        array = read_picture(image)
        maps = {number: read_label(file) for number, file in labels.items()}
    if masks == "binary":
        maps = {number: label != 0 for number, label in maps.items()}
    return array, maps
