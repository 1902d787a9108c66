"""LIDC-IDRI in the layouts people share."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sources.base import SPLITS, Case, Listing, split_groups
from sources.files import (ArraysOnly, DataError, optional_package, read_label, read_picture,
                           readable, size_text)
from sources.own import read_npz, read_row


def read_lidc(path: Path, wanted: Sequence[str]) -> Listing:
    """LIDC-IDRI in any of four layouts; the PNG tree and the HDF5 file have their own split."""
    if path.is_dir():
        return _png_tree(path)
    if path.suffix in HDF5:
        return _hdf5(path, wanted)
    return read_npz(path, wanted, 2, 0.2) if path.suffix == ".npz" else _lidc_pickle(path)


def _lidc_pickle(path: Path) -> Listing:
    """The layout of the widely shared LIDC pickle: {key: {image, masks, series_uid}}."""
    with readable(path, "pickle of arrays"), open(path, "rb") as file:
        table = ArraysOnly(file).load()
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
        cases.append(Case(str(key), str(record["series_uid"]), read, (key,)))
    return Listing(cases, split_groups([case.group for case in cases], val=0.2), 2)


def _png_tree(root: Path) -> Listing:
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
        return read_picture(file), {numbers.index(number): read_label(mask) > 0
                                for number, mask in masks.items()}

    cases, parts = [], {}
    for part in SPLITS:
        files = sorted((root / part / "images").glob("*/*.png"))
        parts[part] = list(range(len(cases), len(cases) + len(files)))
        for file in files:
            patient = file.parent.name
            masks = drawn.get(root / part / "gt" / patient / file.stem, {})
            cases.append(Case(f"{part}/{patient}/{file.stem}", patient, read, (file, masks)))
    return Listing(cases, parts, 2, own="no {part}/images/<patient>/*.png")


HDF5 = (".h5", ".hdf5")


def _hdf5(path: Path, wanted: Sequence[str]) -> Listing:
    """HDF5 made from the LIDC pickle (by PHiSeg's code, UNet-Zoo and what follows them).

    At the top, or in groups train, val and test: images (N, H, W), floats as they are (PHiSeg's are
    0.5 lower); labels or masks (N, H, W, A), (N, A, H, W) or (N, H, W); uids (N,), the series of
    each, if they are there, else every case is a group of its own. Names may begin with lidc_.
    """
    h5py = optional_package("h5py", path)
    cases, parts = [], {part: [] for part in SPLITS}
    with readable(path, "HDF5 file"), h5py.File(path, "r") as file:
        groups = {part: file[part] for part in SPLITS if part in file}
        for part, group in (groups or {"": file}).items():
            found = {key.removeprefix("lidc_"): group[key] for key in group}
            images, labels = found.get("images"), found.get("labels", found.get("masks"))
            if images is None or labels is None:
                raise DataError(f"{path}: /{part} holds {', '.join(group) or 'nothing'}; images "
                                "and labels (or masks) are needed")
            size, shape = images.shape, labels.shape
            if len(size) != 3 or size not in (shape, shape[:-1], shape[:1] + shape[2:]):
                raise DataError(f"{path}: /{part}: images are {size_text(size)} and labels "
                                f"{size_text(shape)}; (N, H, W) and (N, H, W, A) are needed")
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
                cases.append(Case(name, group, read_row, (images, labels, i)))
    if parts.pop("", None):
        return Listing(cases, split_groups([case.group for case in cases], val=0.2), 2)
    return Listing(cases, parts, 2, own="the file has no such group")
