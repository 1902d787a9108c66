"""BraTS: brain tumours in 3D."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from common import IGNORE
from sources.base import Case, Listing, split_groups
from sources.files import DataError, bounding_box, read_nifti, same_grid, size_text, standardised

BRATS = ("flair", "t1", "t1ce", "t2")


def read_patient(folder: Path) -> tuple[np.ndarray, np.ndarray, object]:
    """Read a patient of BraTS: the channels (4, D, H, W), the brain (D, H, W) bool, which is where
    any of them is not 0, and the nibabel image of the first. DataError if their grids differ."""
    files = {kind: _only(folder, kind) for kind in BRATS}
    volumes = {kind: read_nifti(file, 3) for kind, file in files.items()}
    if len({array.shape for array, _ in volumes.values()}) > 1:
        sizes = (f"{kind} {size_text(array.shape[1:])}" for kind, (array, _) in volumes.items())
        raise DataError(f"{folder}: the volumes are not of one size: {', '.join(sizes)}")
    source = volumes[BRATS[0]][1]
    for kind in BRATS[1:]:
        same_grid(source, volumes[kind][1], files[kind])
    image = np.concatenate([array for array, _ in volumes.values()])
    brain = (image != 0).any(0)
    if not brain.any():
        raise DataError(f"{folder}: all channels are 0 everywhere")
    return image, brain, source


def _only(folder: Path, kind: str) -> Path:
    """The file of this kind in a patient's folder; DataError unless there is exactly one."""
    files = list(folder.glob(f"*_{kind}.nii*"))
    if len(files) != 1:
        raise DataError(f"{folder}: {len(files)} files *_{kind}.nii.gz; give one")
    return files[0]


def read_brats(path: Path, wanted: Sequence[str]) -> Listing:
    """List the patients of BraTS (SSN, Sec. 5.3), each in a folder of its own with the files
    *_flair, *_t1, *_t1ce, *_t2 and *_seg.nii.gz.

    An image has the four channels in that order, each brought to mean 0 and deviation 1 inside the
    brain, which is where any channel is not 0. (SSN's authors also corrected the bias field and
    matched the histograms.) Air is 0 in the image and 255 in the labels, as SSN masks it out.
    Labels 0, 1, 2 and 4 become 0 to 3. Volumes are cut to the brain, which takes about 80 MB a
    patient, and filled up with air to the largest. 60, 10 and 30 % of the patients are train, val
    and test; `split_file` takes published lists.
    """
    def read(folder: Path):
        image, brain, source = read_patient(folder)
        file = _only(folder, "seg")
        seg, other = read_nifti(file, 3)
        if seg.shape != (1, *brain.shape):
            raise DataError(f"{folder}: the volumes are not of one size: seg "
                            f"{size_text(seg.shape)}, flair {size_text((1, *brain.shape))}")
        same_grid(source, other, file)
        seg = seg[0]
        if not np.isin(seg, (0, 1, 2, 4)).all():
            raise DataError(f"{folder}: seg has other labels than 0, 1, 2 and 4")
        label = np.where(brain, np.where(seg == 4, 3, seg), IGNORE)
        box = bounding_box(brain)
        return standardised(image[(slice(None), *box)], brain[box]), {0: label[box]}

    # Patients in folders of their own, or in HGG/ and LGG/.
    cases = [Case(file.parent.name, file.parent.name, partial(read, file.parent))
             for depth in ("*/", "*/*/") for file in sorted(path.glob(f"{depth}*_seg.nii*"))]
    splits = split_groups([case.group for case in cases], val=1 / 7, test=0.3)
    return Listing(cases, splits, 4, apart=True, if_empty="too few patients", pad="constant")
