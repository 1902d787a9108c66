"""Electron microscopy with instances."""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np

from sources.base import Case, Listing, warn
from sources.files import DataError, read_npz_arrays, read_pages, size_text


def read_em(path: Path, *, tile: int = 256, colours: Annotated[int, 2] = 15) -> Listing:
    """Lists electron microscopy with instances, 0 = membrane (HPU-Net's SNEMI3D task).

    It is an .npz of images and instances (N, H, W), or the SNEMI3D stacks train-input.tif and
    train-labels.tif in a folder. Cases are the tiles of `tile` pixels a side that fit into a
    section, or whole sections with tile=0. Every label map gives each instance one of `colours`
    classes. The last tenth of the sections (rounded up) is test, the tenth before it validation:
    the paper's 80 / 10 / 10 of 100 sections, 1280 / 160 / 160 tiles.
    """
    if path.is_dir():
        images, ids = (read_pages(path / f"train-{kind}.tif") for kind in ("input", "labels"))
    else:
        images, ids = read_npz_arrays(path, ("images", "instances")).values()
    if images.shape != ids.shape or images.ndim != 3 or min(images.shape[1:]) < tile:
        raise DataError(f"{path}: images are {size_text(images.shape)} and instances "
                        f"{size_text(ids.shape)}; both must be (N, H, W), H and W from {tile} up "
                        "(or give another tile)")

    if len(ids) and len(np.unique(ids[0])) < 3:
        warn(f"{path}: section 0 has only one instance; if this is a map of membranes, number its "
             "cells, for example with scipy.ndimage.label")
    if len(ids) and ids.all():
        warn(f"{path}: no pixel is 0 (membrane); set the borders of instances to 0")

    def read(i: int, y: int, x: int):
        cut = (i, slice(y, y + tile), slice(x, x + tile)) if tile else i
        return images[cut][None], {0: ids[cut]}

    count, *size = images.shape
    tenth = math.ceil(count / 10)
    steps = [range(0, side - tile + 1, tile) if tile else (0,) for side in size]
    cases = []
    for i, y, x in itertools.product(range(count), *steps):
        split = "train" if i < count - 2 * tenth else "val" if i < count - tenth else "test"
        section = f"section-{i:04d}"
        name = f"{section}/y{y:04d}-x{x:04d}" if tile else section
        cases.append(Case(name, section, partial(read, i, y, x), split))
    return Listing(cases, colours + 1, fixed=1)
