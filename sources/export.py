"""Writes any data set as an .npz, a folder of pictures or the LIDC pickle, for other codebases."""

import csv
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from common import IGNORE
from sources.base import Split, check_known
from sources.files import DataError, size_text

LAYOUTS = ("npz", "png", "pickle")
PICTURES = ((1, np.uint8), (1, np.uint16), (3, np.uint8))  # channels and kinds that a PNG holds


def export(whole: Split, out, layout: str = "") -> str:
    """Writes all cases of a set to `out`, and its splits beside them; returns how to read them.

    layout  npz     the arrays that `own.read_npz` describes
            png     images/NAME.png, labels/ANNOTATOR/NAME.png and groups.csv; what a PNG does not
                    hold exactly (volumes, most floats) becomes an .npy
            pickle  LIDC's {key: {image, masks, series_uid}}: one channel, 2D, two classes
            ""      what the ending of `out` says; without an ending, png
    Files appear only when complete. Raises DataError if `out` is there or cannot hold the set.
    """
    out, whole = Path(out), whole.all_maps()
    said = {".npz": "npz", ".pickle": "pickle", ".pkl": "pickle", "": "png"}
    layout = check_known("layout", layout or said.get(out.suffix, out.suffix), LAYOUTS)
    if layout != "png" and said.get(out.suffix) != layout:
        out = Path(f"{out}.{layout}")
    splits = out / "split.json" if layout == "png" else out.with_suffix(".split.json")
    for path in (out, splits):
        if os.path.lexists(path):
            raise DataError(f"{path} is there: delete it, or give another name")
    images, labels, names = whole.images.numpy(), whole.labels.numpy(), whole.names
    named = whole.annotators != [str(number) for number in range(len(whole.annotators))]
    if images.ndim < 4:
        raise DataError(f"{out}: lines have no layout; images or volumes are needed")
    if layout == "pickle" and (images.ndim > 4 or images.shape[1] > 1 or whole.num_classes > 2):
        raise DataError(f"{out}: the pickle holds images of one channel and two classes; use .npz")

    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    try:
        if layout == "npz":
            arrays = dict(images=_small(images), labels=labels, groups=np.array(whole.groups),
                          names=np.array(names), num_classes=np.array(whole.num_classes))
            if whole.weights is not None:
                arrays["weights"] = whole.weights.numpy()
            if named:
                arrays["annotators"] = np.array(whole.annotators)
            np.savez_compressed(work / "out.npz", **arrays)
        elif layout == "pickle":
            table = {name: dict(image=image[0].astype(float), masks=list(maps), series_uid=group)
                     for name, image, maps, group in zip(names, images, labels, whole.groups)}
            (work / "out.pickle").write_bytes(pickle.dumps(table, 4))
        else:
            names = _write_folder(work, whole)
        shown = dict(zip(whole.names, names))
        if whole.parts and set().union(*whole.parts.values()) <= shown.keys():
            (work / "split.json").write_text(json.dumps(
                {split: [shown[name] for name in part] for split, part in whole.parts.items()}))
        if layout == "png":
            work.rename(out)
        else:
            for file in sorted(work.iterdir(), reverse=True):  # the set itself comes last
                file.rename(splits if file.suffix == ".json" else out)
    finally:
        shutil.rmtree(work, ignore_errors=True)

    how = {"npz": "npz", "pickle": "lidc", "png": "folder"}[layout] + f" --path {out} --data-args"
    if layout == "png":
        how += f" num_classes={whole.num_classes}"
    if splits.exists():
        how += f" split_file={splits}"
    uniform = replace(whole, weights=None).probabilities
    if layout != "npz" and not np.allclose(whole.probabilities, uniform):
        how += " (the probabilities of its label maps have no place in this layout)"
    done = f"wrote {out}, {len(whole)} cases, to be read with --data {how}"
    if (labels == IGNORE).any():
        return (f"note: {IGNORE} in the label maps means ignored, also where smaller images are "
                f"padded to {size_text(images.shape[2:])}\n{done}")
    return done


def _small(images: np.ndarray) -> np.ndarray:
    """Returns the images as whole numbers of 8 or 16 bits if these read as the same floats."""
    for kind in (np.uint8, np.uint16):
        top, small = np.float32(np.iinfo(kind).max), np.empty(images.shape, kind)
        for i, image in enumerate(images):
            small[i] = np.rint(image.clip(0, 1) * top)
            if not np.array_equal(small[i] / top, image):
                break
        else:
            return small
    return images


def _write_folder(root: Path, whole: Split) -> list[str]:
    """Writes the layout "folders" of `templates.PRESETS`; returns the cases' file names."""
    names, annotators = _file_names(whole.names), _file_names(whole.annotators)
    for i, name in enumerate(names):
        image = whole.images[i].numpy()
        flat, small = image.ndim == 3, _small(image)
        picture = flat and (len(small), small.dtype) in PICTURES
        if picture:
            small = small[0] if len(small) == 1 else small.transpose(1, 2, 0)
        _write(root / "images" / name, small, picture)
        for annotator, label in zip(annotators, whole.labels[i].numpy()):
            if (label != IGNORE).any():
                _write(root / "labels" / annotator / name, label, flat)
    with open(root / "groups.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "group"), *zip(names, whole.groups)])
    return names


def _file_names(texts: list[str]) -> list[str]:
    """Returns each text as a file's name of its own."""
    names: dict[str, None] = {}  # in this order, and quick to look up
    for text in texts:
        safe = re.sub(r"[^\w.-]+|^\.", "_", text)
        safe = safe if len(safe) <= 60 else safe[:50] + safe[-10:]  # the end may number a slice
        while safe in names:
            safe += "_"
        names[safe] = None
    return list(names)


def _write(file: Path, array: np.ndarray, picture: bool) -> None:
    """Writes a PNG (H, W) or (H, W, 3), or an .npy of any array."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if picture:
        Image.fromarray(array).save(f"{file}.png")
    else:
        np.save(f"{file}.npy", array)
