"""Samples for images of a user's own."""

from pathlib import Path

import numpy as np
import torch

import metrics
import models

from analysis.pictures import paint_image, paint_label, paint_map, paint_outlines, save_grid
from common import UserError, pick_device
from models import read_config
from sources.brats import BRATS, read_patient
from sources.files import (bounding_box, is_nifti, read_nifti, standardised, write_atomically,
                           write_nifti)


def predict_image(folder, file, *, samples=16, out=None, device=None, seed=0) -> Path:
    """Samples for a picture, a NIfTI file or a patient's folder of BraTS: what they are written to.

    A picture (8 or 16 bits, scaled to [0, 1]) or a NIfTI (of a model of `folder` or `brats` every
    channel brought to mean 0 and deviation 1, as there; else as it is) gives <name>_samples.png:
    image, prediction, every sample's outlines, foreground probability, uncertainty, samples; of a
    volume, the slice with most foreground. Then
        <name>.npz                for a picture: samples uint8 (n, H, W), prediction uint8 (H, W),
                                  probabilities float32 (K, H, W), the samples' mean, and
                                  uncertainty float32 (H, W)
        <name>_samples.nii.gz     and so on, the same four for a NIfTI: with its shape and affine,
                                  n or K as the fourth axis
    Raises UserError or data.DataError where the file and the model do not fit.
    """
    folder, file = Path(folder), Path(file)
    device = device or pick_device()
    model = models.load(folder / "best.pt", device)
    channels, dims = model.config.in_channels, model.config.dims
    taught = read_config(folder)["settings"]["data"]
    image, inside, source = read_image(file, channels, dims, taught)
    if (len(image), image.ndim - 1) != (channels, dims):
        raise UserError(f"{file}: {len(image)} channels of {image.ndim - 1}D; the model of "
                        f"{folder} takes {channels} of {dims}D")
    box = bounding_box(inside)
    size, image = image.shape[1:], torch.from_numpy(image[(slice(None), *box)]).float()
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(seed)
        batch, inside = image[None].to(device), torch.from_numpy(inside[box]).to(device)
        probs = model.sample(batch, samples, generator).float().softmax(2)  # (n, 1, K, *S)
        probs *= inside  # elsewhere, where training saw nothing, is background
        probs[:, :, 0] += ~inside
        drawn, mean = probs[:, 0].argmax(1).byte().cpu(), probs.mean(0)[0].cpu()
        prediction = (model.predict(batch)[0].argmax(0).byte() * inside).cpu()
        uncertainty = metrics.uncertainty_map(probs)[0].cpu()
    arrays = dict(samples=drawn, probabilities=mean, prediction=prediction, uncertainty=uncertainty)
    arrays = {name: array.numpy() for name, array in arrays.items()}

    name = file.resolve().name if file.is_dir() else Path(file.name.removesuffix(".gz")).stem
    out = Path(out or folder)
    out.mkdir(parents=True, exist_ok=True)
    if source is None:
        written = out / f"{name}.npz"

        def write(temporary):
            with open(temporary, "wb") as stream:  # given a name, savez would add .npz to it
                np.savez_compressed(stream, **arrays)

        write_atomically(written, write)
    else:
        written = out / f"{name}_samples.nii.gz"
        for kind, array in arrays.items():
            whole = np.zeros(array.shape[: array.ndim - dims] + size, array.dtype)
            whole[:1] = kind == "probabilities"  # beyond the box all is background
            whole[(..., *box)] = array
            write_nifti(out / f"{name}_{kind}.nii.gz", whole, source)

    if dims == 3:
        at = int((drawn > 0).sum((0, 2, 3)).argmax())
        image, prediction, mean, uncertainty, drawn = (
            x.select(-3, at) for x in (image, prediction, mean, uncertainty, drawn))
    rows = {"": [paint_image(image), paint_label(prediction, image), paint_outlines(drawn, image),
                 paint_map(1 - mean[0], 1), paint_map(uncertainty, 1)]}
    for i in range(0, len(drawn), 8):
        rows[f"samples\n{i + 1} to {min(i + 8, len(drawn))}"] = [paint_label(sample, image)
                                                               for sample in drawn[i : i + 8]]
    save_grid(out / f"{name}_samples.png", rows,
              ["image", "prediction", "outlines", "foreground", "uncertainty"], cell=1.3)
    return written


def pictures(path: Path) -> list[Path]:
    """`path` itself, if it is a file or a patient's folder of BraTS, or the images in the folder;
    UserError if there is none, or two of one name."""
    if not path.is_dir() or all(any(path.glob(f"*_{kind}.nii*")) for kind in BRATS):
        return [path]
    kinds = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".nii", ".nii.gz")
    found = sorted(file for file in path.iterdir() if file.name.lower().endswith(kinds))
    if not found:
        raise UserError(f"--image {path}: no image in this folder ({', '.join(kinds)})")
    names = [Path(file.name.removesuffix(".gz")).stem for file in found]
    for name, file in zip(names, found):
        if names.count(name) > 1:
            raise UserError(f"--image {path}: {file.name} and another file share the name {name}, "
                            "and so would their results; rename one")
    return found


def read_image(file: Path, channels: int, dims: int, taught: str):
    """(array (C, *S); where (*S) a model of the data set `taught` has something to say, not in the
    air of BraTS; the nibabel image it came from, or None)."""
    if file.is_dir():
        image, inside, source = read_patient(file)
    elif is_nifti(file):
        if not file.exists():
            raise UserError(f"{file}: no such file")
        image, source = read_nifti(file, dims)
        inside = (image != 0).any(0)
        if taught != "brats" or not inside.any():
            inside = np.ones(image.shape[1:], bool)
    else:
        image = read_picture(file, channels)
        return image, np.ones(image.shape[1:], bool), None
    if taught in ("brats", "folder"):
        image = standardised(image, inside)
    return image, inside, source


def read_picture(file: Path, channels: int) -> np.ndarray:
    """(C, H, W) float32 in [0, 1], C = 3 if the model takes 3 channels, else 1; UserError if it is
    not a picture."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            if channels == 3:
                picture = picture.convert("RGB")
            elif picture.mode not in ("L", "F") and not picture.mode.startswith("I"):
                picture = picture.convert("L")
            array = np.asarray(picture)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{file}: not a picture that Pillow reads ({error})") from error
    scale = {"uint8": 255.0, "uint16": 65535.0, "int32": 65535.0}.get(str(array.dtype), 1.0)
    array = array.astype(np.float32) / scale
    return np.ascontiguousarray(array.transpose(2, 0, 1)) if channels == 3 else array[None]
