"""BraTS: brain tumours in 3D."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from common import IGNORE
from sources.base import Case, Listing, warn
from sources.files import (DataError, bounding_box, read_nifti, same_grid, shortened, size_text,
                           standardised)

BRATS = ("flair", "t1", "t1ce", "t2")


def read_patient(folder: Path, kinds: Sequence[str] = BRATS):
    """Reads a patient of BraTS: one volume of each of the `kinds`, which begin with the four
    channels, (len(kinds), D, H, W); the brain (D, H, W) bool, which is where any channel is not 0;
    and the nibabel image of the first. DataError unless all are there once and on one grid."""
    volumes = []
    for kind in kinds:
        files = [file for file in folder.glob(f"*_{kind}.nii*") if file.name[0] != "."]
        if len(files) != 1:
            raise DataError(f"{folder}: {len(files)} files *_{kind}.nii.gz; give one")
        array, grid = read_nifti(files[0], 3)
        if not volumes:
            source = grid
        elif array.shape != (1, *volumes[0].shape[1:]):
            raise DataError(f"{folder}: the volumes are not of one size: {kind} "
                            f"{size_text(array.shape)}, flair {size_text(volumes[0].shape)}")
        same_grid(source, grid, files[0])
        volumes.append(array)
    volumes = np.concatenate(volumes)
    brain = (volumes[:len(BRATS)] != 0).any(0)
    if not brain.any():
        raise DataError(f"{folder}: all channels are 0 everywhere")
    return volumes, brain, source


def read_brats(path: Path) -> Listing:
    """Lists the patients of BraTS (SSN, Sec. 5.3), each in a folder of its own with the files
    *_flair, *_t1, *_t1ce, *_t2 and *_seg.nii.gz.

    An image has the four channels in that order, each brought to mean 0 and deviation 1 inside the
    brain. (SSN's authors also corrected the bias field and matched the histograms.) Air is 0 in the
    image and 255 in the labels, as SSN masks it out. Labels 0, 1, 2 and 4 become 0 to 3. Volumes
    are cut to the brain, which takes about 80 MB a patient, and filled up with air to the largest.
    60, 10 and 30 % of the patients are train, val and test; `split_file` takes published lists.
    """
    def read(folder: Path):
        volumes, brain, _ = read_patient(folder, (*BRATS, "seg"))
        image, seg = volumes[:-1], volumes[-1]
        if not np.isin(seg, (0, 1, 2, 4)).all():
            raise DataError(f"{folder}: seg has other labels than 0, 1, 2 and 4")
        label = np.where(brain, np.where(seg == 4, 3, seg), IGNORE)
        box = bounding_box(brain)
        return standardised(image[(slice(None), *box)], brain[box]), {0: label[box]}

    def folders(kind: str) -> list[Path]:  # of patients, or in HGG/ and LGG/; no ._ files of macOS
        return [file.parent for depth in ("*/", "*/*/")
                for file in sorted(path.glob(f"{depth}*_{kind}.nii*")) if file.name[0] != "."]

    found = folders("seg")
    if without := sorted({folder.name for folder in folders("flair")} - {f.name for f in found}):
        warn(f"{path}: these patients are left out, because they have no *_seg.nii.gz: "
             f"{', '.join(shortened(without))} (rename W39_1998.09.19_Segm.nii in BraTS 2020)")
    cases = [Case(folder.name, folder.name, partial(read, folder)) for folder in found]
    return Listing(cases, 4, val=1 / 7, test=0.3, apart=True, pad="constant")
