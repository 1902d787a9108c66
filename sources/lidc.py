"""LIDC-IDRI in the layouts that people share. (`lidc_archive` builds it from DICOM and XML.)"""

from functools import partial
from pathlib import Path

import numpy as np

from sources.base import SPLITS, Case, Listing
from sources.files import DataError, check_claim, optional_package, readable, size_text
from sources.own import read_npz, read_row
from sources.pickles import read_pickle
from sources.templates import read_folder

HDF5 = (".h5", ".hdf5")


def read_lidc(path: Path) -> Listing:
    """Lists LIDC-IDRI in a pickle, HDF5, an .npz, or a folder in a layout of `templates`."""
    if path.is_dir():
        listing = read_folder(path, num_classes=2)
    elif path.suffix == ".npz":
        listing = read_npz(path, num_classes=2)
    else:
        listing = _read_hdf5(path) if path.suffix in HDF5 else _read_pickle(path)
    listing.val = 0.2  # 64/16/20, the split that recent papers share
    return listing


def _read_pickle(path: Path) -> Listing:
    """Lists the cases of the widely shared LIDC pickle: {key: {image, masks, series_uid}}."""
    table = read_pickle(path)
    if not isinstance(table, dict):
        raise DataError(f"{path}: holds a {type(table).__name__}; give a dict "
                        "{key: {image, masks, series_uid}}")

    def read(key):
        record = table.pop(key)  # frees it: the real file has 15,096 cases of float64
        with readable(path, f"pickle: {key!r}: image must be an array, masks a list of arrays"):
            return record["image"][None], dict(enumerate(record["masks"]))

    cases = []
    for key, record in table.items():
        missing = {"image", "masks", "series_uid"} - set(record if isinstance(record, dict) else ())
        if missing:
            raise DataError(f"{path}: {key!r}: no {', '.join(sorted(missing))}; each case is a "
                            "dict of image, masks and series_uid")
        uid = record["series_uid"]
        if not isinstance(uid, (str, bytes, int, float, np.generic)):
            raise DataError(f"{path}: {key!r}: series_uid is a {type(uid).__name__}; give a text")
        cases.append(Case(str(key), str(uid), partial(read, key)))
    return Listing(cases, 2)


def _read_hdf5(path: Path) -> Listing:
    """Lists HDF5 made from the LIDC pickle (by PHiSeg's code, UNet-Zoo and what follows them).

    At the top, or in groups train, val and test: images (N, H, W), floats as they are; labels or
    masks (N, H, W, A), (N, A, H, W) or (N, H, W); optionally uids (N,), the series of each, else
    every case is a group of its own. Names may begin with lidc_.
    """
    h5py = optional_package("h5py", path)
    cases = []
    with readable(path, "HDF5 file"), h5py.File(path, "r") as file:
        groups = {split: file[split] for split in SPLITS if split in file}
        for split, group in (groups or {"": file}).items():
            found = {key.removeprefix("lidc_"): group[key] for key in group}
            images, labels = found.get("images"), found.get("labels", found.get("masks"))
            if images is None or labels is None:
                raise DataError(f"{path}: /{split} holds {', '.join(group) or 'nothing'}; images "
                                "and labels (or masks) are needed")
            size, shape = images.shape, labels.shape
            if len(size) != 3 or size not in (shape, shape[:-1], shape[:1] + shape[2:]):
                raise DataError(f"{path}: /{split}: images are {size_text(size)} and labels "
                                f"{size_text(shape)}; (N, H, W) and (N, H, W, A) are needed")
            check_claim(path, images.nbytes + labels.nbytes)
            wide = np.float32 if images.dtype.kind == "f" else images.dtype
            images, labels = images.astype(wide)[()][:, None], labels[()]
            if len(shape) == 3:
                labels = labels[:, None]
            elif shape[:3] == size:
                labels = np.moveaxis(labels, -1, 1)
            names = [f"{split or 'case'}/{i:05d}" for i in range(len(images))]
            uids = found["uids"][()].tolist() if "uids" in found else names
            for i, (name, uid) in enumerate(zip(names, uids, strict=True)):
                uid = uid.decode() if isinstance(uid, bytes) else str(uid)
                cases.append(Case(name, uid, partial(read_row, images, labels, i), split))
    return Listing(cases, 2, apart=bool(groups),
                   if_empty="the file has no such group" if groups else "")
