"""A user's own cases in an .npz. (`templates` reads folders.)"""

from functools import partial
from pathlib import Path

import numpy as np

from sources.base import Case, Listing
from sources.files import DataError, read_npz_arrays, readable, size_text


def read_npz(path: Path, *, num_classes: int = 0) -> Listing:
    """Lists the cases of a user's own .npz.

      images   (N, H, W), (N, C, H, W) or (N, C, D, H, W), of a kind that `as_float_image` takes
      labels   (N, A, H, W) or (N, A, D, H, W), always with the annotator axis: 0..K-1, 255 = ignore
    and optionally: weights (N, A), normalised row by row; groups (N,), such as the patient of each
    case; names (N,); annotators (A,), their names; num_classes, else the largest label + 1. An
    annotator's map that is 255 everywhere is missing.
    """
    arrays = read_npz_arrays(path, ("images", "labels"),
                             ("weights", "groups", "names", "annotators", "num_classes"))
    images, labels = arrays["images"], arrays["labels"]
    shape = labels.shape
    images = images[:, None] if images.ndim == labels.ndim - 1 else images
    if len(shape) not in (4, 5) or images.shape[:1] + images.shape[2:] != shape[:1] + shape[2:]:
        raise DataError(f"{path}: labels is {size_text(shape)} and images "
                        f"{size_text(arrays['images'].shape)}; (N, A, H, W) goes with (N, H, W) or "
                        "(N, C, H, W) (for a single annotator, store labels[:, None])")
    sizes = {"weights": shape[:2], "groups": shape[:1], "names": shape[:1], "num_classes": (),
             "annotators": shape[1:2]}
    for key in arrays.keys() & sizes:
        text = key in ("groups", "names", "annotators")
        if arrays[key].shape != sizes[key] or not text and arrays[key].dtype.kind not in "buif":
            raise DataError(f"{path}: {key} is {size_text(arrays[key].shape)} of "
                            f"{arrays[key].dtype}; {size_text(sizes[key])} is needed")
    weights = np.asarray(arrays.get("weights", ()), float)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise DataError(f"{path}: weights: some are negative or not finite")
    if not float(arrays.get("num_classes", 0)).is_integer():
        raise DataError(f"{path}: num_classes is {arrays['num_classes']}; give a whole number")
    num_classes = num_classes or int(arrays.get("num_classes", 0))
    with readable(path, "names or groups"):  # damaged text may hold what is no character
        annotators = [str(name) for name in arrays.get("annotators", ())]
        names = [str(name) for name in arrays.get("names", range(len(labels)))]
        groups = [str(group) for group in arrays.get("groups", names)]
    cases = [Case(name, group, partial(read_row, images, labels, i))
             for i, (name, group) in enumerate(zip(names, groups))]
    return Listing(cases, num_classes, weights=weights if "weights" in arrays else None,
                   annotators=annotators)


def read_row(images: np.ndarray, labels: np.ndarray, i: int):
    """Returns case i of images (N, C, *S) and labels (N, A, *S), as `Case.read` does."""
    return images[i], dict(enumerate(labels[i]))
