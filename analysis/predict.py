"""Samples for images of a user's own."""

import io
from pathlib import Path

import numpy as np
import torch

import metrics
from analysis.pictures import (fullest_slice, paint_image, paint_label, paint_map, paint_outlines,
                               save_grid)
from common import UserError
from models import labels_of, sample_chunks
from sources.brats import BRATS, read_patient
from sources.files import (as_float_image, bounding_box, is_nifti, read_nifti, read_picture,
                           standardised, write_atomically, write_nifti)

SHOWN = 64  # samples in the picture, at most


def predict_image(model, data_name: str, file, out, *, samples=16, seed=0, temperature=1.0,
                  class_scales=None) -> tuple[Path, Path]:
    """Samples for a picture, a NIfTI file or a patient's folder of BraTS: (a picture of them, the
    file with them).

    A picture (8 or 16 bits, scaled to [0, 1], or floats as they are) or a NIfTI (for a model
    trained on `folder` or `brats` every channel at mean 0 and standard deviation 1, as there; else
    as it is) gives in the folder `out`
        <name>_samples.png        image, prediction, all outlines, uncertainty and samples; of a
                                  volume, its fullest slice
        <name>.npz                for a picture: samples uint8 (n, H, W), prediction uint8 (H, W),
                                  probabilities float32 (K, H, W), the samples' mean, and
                                  uncertainty and entropy float32 (H, W)
        <name>_samples.nii.gz     and so on, the same five for a NIfTI: with its shape and affine,
                                  n or K as the fourth axis
    data_name: the data set that the model was trained on. temperature, class_scales: SSN only, see
    `scaled_samples`. Raises UserError where the file and the model do not fit.
    """
    file, out, dims = Path(file), Path(out), model.config.dims
    image, inside, source = read_image(file, model.config.in_channels, dims, data_name)
    size, box = image.shape[1:], bounding_box(inside)
    image = torch.from_numpy(image[(slice(None), *box)]).float()
    arrays = sample_arrays(model, image, torch.from_numpy(inside[box]), samples, seed, temperature,
                           class_scales)

    name = file.resolve().name if file.is_dir() else stem(file)
    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"{name}_samples.png"
    plot_prediction(picture, image, arrays)
    if source is None:
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        write_atomically(out / f"{name}.npz",
                         lambda path: Path(path).write_bytes(content.getvalue()))
        return picture, out / f"{name}.npz"
    for kind, array in arrays.items():
        whole = np.zeros((*array.shape[: array.dim() - dims], *size), array.numpy().dtype)
        whole[:1] = kind == "probabilities"  # beyond the box all is background
        whole[(..., *box)] = array
        write_nifti(out / f"{name}_{kind}.nii.gz", whole, source)
    return picture, out / f"{name}_samples.nii.gz"


@torch.no_grad()
def sample_arrays(model, image, inside, samples, seed, temperature, class_scales) -> dict:
    """The arrays that `predict_image` writes, for image (C, *S). Where inside (*S) is false, which
    training never saw, all is background."""
    device = next(model.parameters()).device
    batch, mask = image[None].to(device), inside.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    moments, drawn = metrics.Moments(), []
    for logits in scaled_samples(model, batch, samples, generator, temperature, class_scales):
        drawn.append((labels_of(logits, 2)[:, 0] * mask).cpu())
        for sample in logits:
            probs = sample.softmax(1) * mask
            probs[:, 0] += ~mask
            moments.add(probs)
    return dict(samples=torch.cat(drawn), probabilities=moments.mean[0].cpu(),
                prediction=(labels_of(model.predict(batch), 1)[0] * mask).cpu(),
                uncertainty=metrics.uncertainty_map(moments)[0].cpu(),
                entropy=metrics.entropy_map(moments)[0].cpu())


def scaled_samples(model, batch, n, generator, temperature, class_scales):
    """Chunks of n samples' logits (m, B, K, *S), of SSN changed after the fact (its Sec. 4).

    temperature: T scales the covariance of the logits. class_scales {k: factor}: each class's part
    of (sample - mean) is multiplied by its factor.
    """
    classes = model.config.num_classes
    if temperature == 1 and not class_scales:
        yield from sample_chunks(model, batch, n, classes, generator)
        return
    if not hasattr(model, "distribution"):
        raise UserError("--temperature and --scale-class change the normal over logits that only "
                        "ssn predicts; leave them out for this model")
    class_scales = class_scales or {}
    if max(class_scales, default=0) >= classes:
        raise UserError(f"--scale-class {max(class_scales)}: this model's classes are 0 to "
                        f"{classes - 1}")
    factors = torch.tensor([float(class_scales.get(k, 1)) for k in range(classes)])
    normal = model.distribution(batch)
    for logits in sample_chunks(model, batch, n, classes, generator, temperature=temperature):
        yield normal.scale_classes(logits, factors)


def plot_prediction(path, image, arrays: dict) -> None:
    """<name>_samples.png of image (C, *S) and the arrays of `sample_arrays`."""
    if image.dim() == 4:
        fullest = fullest_slice(arrays["samples"])
        image = image[:, fullest]
        arrays = {name: array.select(-3, fullest) for name, array in arrays.items()}
    samples = arrays["samples"][:SHOWN]
    rows = {"": [paint_image(image), paint_label(arrays["prediction"], image),
                 paint_outlines(samples, image), paint_map(1 - arrays["probabilities"][0], 1),
                 paint_map(arrays["uncertainty"], 1), paint_map(arrays["entropy"])]}
    for i in range(0, len(samples), 8):
        rows[f"samples\n{i + 1} to {min(i + 8, len(samples))}"] = [
            paint_label(sample, image) for sample in samples[i : i + 8]]
    save_grid(path, rows, ["image", "prediction", "outlines", "foreground", "uncertainty",
                           "entropy"], cell=1.3)


def images_at(path: Path) -> list[Path]:
    """`path` itself, if it is a file or a patient's folder of BraTS, or the images in the folder;
    UserError if there is none, or two of one name."""
    if not path.is_dir() or all(any(path.glob(f"*_{kind}.nii*")) for kind in BRATS):
        return [path]
    kinds = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".nii", ".nii.gz")
    found = sorted(file for file in path.iterdir() if file.name.lower().endswith(kinds))
    if not found:
        raise UserError(f"--image {path}: no image in this folder ({', '.join(kinds)})")
    names = [stem(file) for file in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--image {path}: two files share the name {twice[0]}, and so would their "
                        "results; rename one")
    return found


def stem(file: Path) -> str:
    """The file's name without .png, .nii.gz, ..."""
    return Path(file.name.removesuffix(".gz")).stem


def read_image(file: Path, channels: int, dims: int, data_name: str):
    """(float array (C, *S); where (*S) a model trained on `data_name` has something to say, which
    for BraTS is not in the air; the nibabel image it came from, or None)."""
    source = None
    if file.is_dir():
        image, inside, source = read_patient(file)
    elif not file.is_file():  # a pipe would be waited for
        raise UserError(f"{file}: " + ("not a file" if file.exists() else "no such file"))
    elif is_nifti(file):
        image, source = read_nifti(file, dims)
        air = (image == 0).all(0)
        inside = ~air if data_name == "brats" and not air.all() else np.ones_like(air)
    else:
        image = as_float_image(read_picture(file), str(file))
        if channels == 3:
            image = image.repeat(3 // len(image), 0)
        elif len(image) == 3:
            image = np.tensordot(np.float32([[0.299, 0.587, 0.114]]), image, 1)  # luma, ITU-R 601
        inside = np.ones(image.shape[1:], bool)
    if len(image) != channels or image.ndim != 1 + dims:
        raise UserError(f"{file}: {len(image)} channels of {image.ndim - 1}D; this model takes "
                        f"{channels} of {dims}D")
    if source is not None and data_name in ("brats", "folder"):
        image = standardised(image, inside)
    return image, inside, source
