"""A user's own cases: an .npz, or a folder of pictures or NIfTI volumes."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sources.base import Case, Listing, split_groups
from sources.files import (FOLDER, DataError, is_nifti, read_label, read_nifti, read_npz_arrays,
                           read_picture, readable, same_grid, size_text, standardised)


def read_row(images: np.ndarray, labels: np.ndarray, i: int):
    return images[i], dict(enumerate(labels[i]))


def read_npz(path: Path, wanted: Sequence[str], num_classes: int, val: float = 0.25) -> Listing:
    """A user's own .npz.

      images   (N, H, W), (N, C, H, W) or (N, C, D, H, W): float, or uint8 or uint16 scaled to
               [0, 1]
      labels   (N, A, H, W) or (N, A, D, H, W), always with the reader axis: 0..K-1, 255 = ignore
    and if wanted: weights (N, A), normalised row by row; groups (N,), such as the patient of each
    case; names (N,); num_classes, else the largest label + 1. Images with one axis fewer than the
    labels have one channel and no axis for it. A reader's map of nothing but 255 is a missing one.
    """
    optional = ("weights", "groups", "names", "num_classes")
    arrays = read_npz_arrays(path, ("images", "labels"), optional)
    images, labels = arrays["images"], arrays["labels"]
    shape = labels.shape
    images = images[:, None] if images.ndim == labels.ndim - 1 else images
    if len(shape) not in (4, 5) or images.shape[:1] + images.shape[2:] != shape[:1] + shape[2:]:
        raise DataError(f"{path}: labels is {size_text(shape)} and images "
                        f"{size_text(arrays['images'].shape)}; (N, A, H, W) must meet (N, H, W) or "
                        "(N, C, H, W) (of a single reader? store labels[:, None])")
    sizes = {"weights": shape[:2], "groups": shape[:1], "names": shape[:1], "num_classes": ()}
    for key in arrays.keys() & set(optional):
        number = arrays[key].dtype.kind in "buif" or key in ("groups", "names")
        if arrays[key].shape != sizes[key] or not number:
            raise DataError(f"{path}: {key} is {size_text(arrays[key].shape)} of {arrays[key].dtype}; "
                            f"{size_text(sizes[key])} is needed")
    num_classes = num_classes or int(arrays.get("num_classes", 0))
    names = [str(name) for name in arrays.get("names", range(len(labels)))]
    groups = [str(group) for group in arrays.get("groups", names)]
    cases = [Case(name, group, read_row, (images, labels, i))
             for i, (name, group) in enumerate(zip(names, groups))]
    return Listing(cases, split_groups(groups, val), num_classes, weights=arrays.get("weights"))




def read_folder(path: Path, wanted: Sequence[str], num_classes: int, masks: str) -> Listing:
    """Anyone's own images: images/NAME.png and labels/READER/NAME.png, a folder for each reader.

    Pictures of any kind in `FOLDER`; their labels are PNG or TIFF, grey levels or palette indices
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
            end = [suffix for suffix in FOLDER if file.name.lower().endswith(suffix)]
            if not end:
                raise DataError(f"{file}: not one of {', '.join(FOLDER)}; convert or remove it")
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
                same_grid(source, other, file)
                drawn[reader] = label[0] if len(label) == 1 else label
        else:
            image = read_picture(images[name])
            drawn = {reader: read_label(file) for reader, file in drawn.items()}
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
        with readable(path / "groups.csv", "table of name,group"):
            lines = (path / "groups.csv").read_text(encoding="utf-8-sig").splitlines()
            table = {name: group for name, group in csv.reader(filter(None, lines))}
        table.pop("name", None)  # the heading
        if odd := sorted(table.keys() ^ images.keys()):
            raise DataError(f"{path / 'groups.csv'}: {odd[0]!r} is there or in images/, not in "
                            "both; list every image once")
        groups = table
    cases = [Case(name, groups[name] or name, read, (name,)) for name in images]
    return Listing(cases, split_groups([case.group for case in cases], val=0.25), num_classes)
