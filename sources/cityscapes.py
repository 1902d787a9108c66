"""Cityscapes: street scenes, in the folders and files in which they are published."""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from common import IGNORE
from sources.base import Case, Listing
from sources.files import read_label, read_picture, resample_case
from sources.synthetic import flip_modes

# The ids of the 19 classes in Cityscapes' files, in the order of their train ids.
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
FLIPPED = (1, 11, 13, 8, 0)  # the train ids of `synthetic.FLIPS`
CAR = 26
VALIDATION = ("darmstadt", "monchengladbach", "ulm")


def read_cityscapes(path: Path, *, task: Literal["modes", "cars"] = "modes",
                    factor: int = 0) -> Listing:
    """Lists the scenes of Cityscapes in leftImg8bit/{train,val}/<city>/ and gtFine/ beside it.

    Test is the published val; validation is Darmstadt, Moenchengladbach and Ulm of train, as in
    both papers. Void classes are 255. Images are shrunk by `factor` (0: as much as in the paper).
      task=modes  the Probabilistic U-Net's: 19 classes by train id, of which five flip to the
                  classes 19 to 23, as `synthetic.FLIPS` says; factor 4. IoU is scored on these ten.
      task=cars   HPU-Net's (App. C, D.3): the 18 other classes in their order, then five labels,
                  one of which every car has at random; factor 2. IoU is scored on these five. Cars
                  that were outlined as one group are ignored.
    """
    factor = factor or {"modes": 4, "cars": 2}[task]
    classes = [i for i in IDS if task == "modes" or i != CAR]
    table = np.full(256, -1, np.int32)
    table[classes] = range(len(classes))

    def read(file: Path, truth: Path):
        image, ids = read_picture(file), read_label(truth)
        size = [side // factor for side in ids.shape]
        image, ids = resample_case(image, ids.astype(np.int32), size, file)
        # A numbered instance is 1000 * class + number; all else is its class alone.
        label = table[np.minimum(np.where(ids < 1000, ids, ids // 1000), IGNORE)]
        if task == "cars":
            return image, {0: np.where(ids // 1000 == CAR, len(classes) + ids % 1000, label)}
        return image, {0: np.where(label < 0, IGNORE, label)}

    cases = []
    kind = "instanceIds" if task == "cars" else "labelIds"
    for half in ("train", "val"):
        for file in sorted((path / "leftImg8bit" / half).glob("*/[!.]*_leftImg8bit.png")):
            city, name = file.parent.name, file.stem.removesuffix("_leftImg8bit")
            truth = path / "gtFine" / half / city / f"{name}_gtFine_{kind}.png"
            split = "test" if half == "val" else "val" if city in VALIDATION else "train"
            cases.append(Case(name, name, partial(read, file, truth), split))
    twins = range(len(classes), len(classes) + 5)
    listing = Listing(cases, twins.stop, apart=True,
                      if_empty="leftImg8bit/ holds none of its cities")
    if task == "cars":
        listing.fixed, listing.scored = twins.start, tuple(twins)
    else:
        listing.flips = flip_modes(FLIPPED, twins.start)
        listing.scored = (*sorted(FLIPPED), *twins)
    return listing
