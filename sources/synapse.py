"""Synapse's abdominal CT."""

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np

from sources.base import Case, Listing, split_groups
from sources.files import optional_package, read_npz_arrays, readable, resample_case


def read_synapse(path: Path, *, size: int = 224, organs: Annotated[int, 1] = 8) -> Listing:
    """Lists Synapse's abdominal CT as TransUNet's authors share it: eight organs (or 13 in other
    preparations: give `organs`), slice by slice.

    train_npz/caseXXXX_sliceYYY.npz of image and label (H, W); test_vol_h5/caseXXXX.npy.h5 of the
    same (D, H, W), taken slice by slice. A fifth of the training volumes is validation. Slices are
    resampled to `size` pixels a side (the paper's 224), or not at all with size=0.
    """
    def read(file: Path, i: int | None = None):
        if i is None:
            image, label = read_npz_arrays(file, ("image", "label")).values()
        else:
            with readable(file, "HDF5 file"), h5py.File(file, "r") as volume:
                image, label = volume["image"][i], volume["label"][i]
        with readable(file, "slice of numbers"):
            image = np.asarray(image, np.float32)[None]
        if size:
            image, label = resample_case(image, label, (size, size), file)
        return image, {0: label}

    files = sorted((path / "train_npz").glob("case????_slice*.npz"))
    splits = split_groups([file.stem[:8] for file in files], val=0.2, test=0)
    cases = [Case(files[i].stem, files[i].stem[:8], partial(read, files[i]), split)
             for split, rows in splits.items() for i in rows]
    for file in sorted((path / "test_vol_h5").glob("case????.npy.h5")):
        h5py = optional_package("h5py", file)
        with readable(file, "HDF5 file"), h5py.File(file, "r") as volume:
            count = len(volume["image"])
        case = file.name[:8]
        cases += [Case(f"{case}_slice{i:03d}", case, partial(read, file, i), "test")
                  for i in range(count)]
    return Listing(cases, organs + 1, apart=True,
                   if_empty="train_npz/ (train, val) or test_vol_h5/ (test) is empty")
