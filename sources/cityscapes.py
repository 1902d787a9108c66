"""Cityscapes as published."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import IGNORE
from sources.base import SPLITS, Case, Listing
from sources.files import read_label, read_picture, resample_case
from sources.synthetic import flip_modes


# The ids of the 19 classes in Cityscapes' files, in the order of their train ids.
_CITY_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


_CITY_FLIPS = (1, 11, 13, 8, 0)  # train ids of `FLIPS`


_CITY_CAR = 26


_CITY_VAL = ("darmstadt", "monchengladbach", "ulm")


def read_cityscapes(path: Path, wanted: Sequence[str], task: str, factor: int) -> Listing:
    """Cityscapes as published: leftImg8bit/{train,val}/<city>/ and gtFine/ beside it.

    Test is the published val; validation is Darmstadt, Moenchengladbach and Ulm of train, as both
    papers have it. Void classes are 255. Images are `factor` times smaller.
      task=modes  the Probabilistic U-Net's: 19 classes by train id, five of which flip to the
                  classes 19 to 23, as `FLIPS` says; factor 4. IoU is scored on these ten.
      task=cars   HPU-Net's (App. C, D.3): the 18 other classes in their order, then five labels,
                  one of which every car has at random; factor 2. IoU is scored on these five. Cars
                  that were outlined as one group are ignored.
    """
    factor = factor or {"modes": 4, "cars": 2}[task]
    classes = [i for i in _CITY_IDS if task == "modes" or i != _CITY_CAR]
    table = np.full(256, -1, np.int32)
    table[classes] = range(len(classes))

    def read(file: Path, truth: Path):
        image, ids = read_picture(file), read_label(truth)
        image, ids = resample_case(image, ids.astype(np.int32), [side // factor for side in ids.shape],
                               file)
        # A numbered instance is 1000 * class + number; the rest is told by its class alone.
        label = table[np.minimum(np.where(ids < 1000, ids, ids // 1000), IGNORE)]
        if task == "cars":
            return image, {0: np.where(ids // 1000 == _CITY_CAR, len(classes) + ids % 1000, label)}
        return image, {0: np.where(label < 0, IGNORE, label)}

    cases, parts = [], {part: [] for part in SPLITS}
    kind = "instanceIds" if task == "cars" else "labelIds"
    for half in ("train", "val"):
        for file in sorted((path / "leftImg8bit" / half).glob("*/*_leftImg8bit.png")):
            city, name = file.parent.name, file.stem.removesuffix("_leftImg8bit")
            truth = path / "gtFine" / half / city / f"{name}_gtFine_{kind}.png"
            part = "test" if half == "val" else "val" if city in _CITY_VAL else "train"
            parts[part].append(len(cases))
            cases.append(Case(name, city, read, (file, truth)))
    own, twins = "leftImg8bit/ holds none of its cities", range(len(classes), len(classes) + 5)
    if task == "cars":
        return Listing(cases, parts, twins.stop, own, fixed=twins.start, scored=tuple(twins))
    return Listing(cases, parts, twins.stop, own, flips=flip_modes(_CITY_FLIPS, twins.start),
                    scored=(*sorted(_CITY_FLIPS), *twins))
