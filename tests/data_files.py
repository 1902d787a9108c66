"""Small data files, written by the tests that read them, and how a refusal is checked."""

import pickle

import numpy as np
import pytest
from PIL import Image

import data
from sources.files import DataError

SYNTHETIC = {"toy1d": {}, "shapes": {"n": 40}, "modes": {"n": 20}, "cells": {"n": 20},
             "organs": {"n": 24}, "lesions3d": {"n": 8, "size": 32}}


def refused(*fragments, call):
    """The call ends in a DataError of one line that holds every fragment."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert str(fragment) in message, f"{fragment!r} is not in: {message}"


def records(n=12, annotators=4, size=6, seed=0):
    rng = np.random.RandomState(seed)
    return {f"case-{i}": {"image": rng.rand(size, size),
                          "masks": [(rng.rand(size, size) > 0.5).astype(np.uint8)
                                    for _ in range(annotators)],
                          "series_uid": f"uid-{i // 2}"} for i in range(n)}


def grey_records(n=10, annotators=4, size=9):
    """`records` whose images are steps of 1/255, as a picture holds them."""
    table = records(n, annotators, size)
    for record in table.values():
        record["image"] = np.round(record["image"] * 255) / 255
    return table


def write(path, table, protocol=4):
    path.write_bytes(pickle.dumps(table, protocol=protocol))
    return path


def arrays(n=6, annotators=2, shape=(5, 4)):
    rng = np.random.RandomState(0)
    return {"images": rng.rand(n, *shape).astype(np.float32),
            "labels": rng.randint(0, 3, (n, annotators, *shape))}


def load_npz(tmp_path, split="all", name="npz", options=(), **given):
    path = tmp_path / "own.npz"
    np.savez(path, **given)
    return data.load(name, split, path=path, **dict(options))


def save_picture(path, array, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)


def write_folder(root, kind=np.uint8, channels=(), suffix=".png", annotators=("anna", "ben"), n=6):
    rng = np.random.RandomState(0)
    images = rng.randint(0, np.iinfo(kind).max + 1, (n, 8, 7, *channels)).astype(kind)
    labels = rng.randint(0, 3, (n, len(annotators), 8, 7)).astype(np.uint8)
    for i in range(n):
        save_picture(root / "images" / f"case {i}{suffix}", images[i])
        for annotator, label in zip(annotators, labels[i]):
            save_picture(root / "labels" / annotator / f"case {i}.png", label)
    return images, labels


def cut(name, size):
    def change(root):
        (root / name).write_bytes((root / name).read_bytes()[:size])
    return change


LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # already in the order that read_nifti turns to


def stored(array, affine, axes, flips):
    """The same volume, axis i of the file running along axis axes[i] of `array`, or back."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for i, (axis, flip) in enumerate(zip(axes, flips)):
        matrix[axis, i] = -1 if flip else 1
        matrix[axis, 3] += array.shape[axis] - 1 if flip else 0
    turned = array.transpose(*axes, *range(3, array.ndim))
    return turned[tuple(slice(None, None, -1 if f else 1) for f in flips)], affine @ matrix
