"""Samples for images of a user's own."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import metrics
import models
from analysis.pictures import (fullest_slice, label_picture, paint_image, paint_label, paint_map,
                               paint_outlines, save_grid)
from common import UserError, key_values, say
from models import labels_of, sample_chunks
from sources.base import warn_of_scale
from sources.brats import BRATS, read_patient
from sources.files import (ENDINGS, as_float_image, bounding_box, is_nifti, read_array, read_nifti,
                           size_text, standardised, write_atomically, write_nifti, write_npz,
                           write_text)
from sources.runs import read_config
from ssn import SSN

DRAWN, SHOWN = 16, 64  # samples by default, and in the picture at most
# Endings of the images in a folder. A single file may be of any kind that PIL reads.
IMAGES = (*ENDINGS, ".bmp", ".gif", ".webp")


def number(value: float) -> str:
    """A size to read: 1,234,567 or 0.001235, never 1.2e+06."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def predict_images(args, device) -> None:
    """Draw samples for one image or for a folder of them, as --image asks."""
    folder, place = Path(args.run), Path(args.image)
    out = Path(args.out or folder)
    if place.is_dir() and out.resolve() == place.resolve():
        raise UserError("--out must differ from the folder of --image: every image in it is read")
    scales = key_values("--scale-class", args.scale_class)
    if not all(k.isdecimal() and isinstance(factor, (int, float)) for k, factor in scales.items()):
        raise UserError("--scale-class: a class and a number, such as 1=0.5")
    data_name, files = read_config(folder)["settings"]["data"], images_at(place)
    model = models.load(folder / f"{args.weights}.pt", device)
    for file in files:
        picture, arrays, sizes = predict_image(
            model, data_name, file, out, temperature=args.temperature,
            samples=args.samples[0] if args.samples else DRAWN,
            class_scales={int(k): factor for k, factor in scales.items()})
        say(f"{picture} (look at it), {arrays} (the samples and maps)")
        say("\n".join("  {}: {} {} on average, from {} to {} in 90 % of the samples".format(
            kind, number(size["mean"]), sizes["unit"], number(size["q05"]), number(size["q95"]))
                      for kind, size in sizes["volume"].items()))


def predict_image(model, data_name: str, file, out, *, samples=16, temperature=1.0,
                  class_scales=None) -> tuple[Path, Path, dict]:
    """Write samples for a picture, .npy, NIfTI file or BraTS patient's folder to the folder `out`.

    Returns the path of a picture to look at, the path of the samples, and their `volumes`. Pictures
    of 8 or 16 bits are scaled to [0, 1]; floats are taken as they are, with a warning where they
    are far from that scale. A NIfTI's channels are standardised for a model trained on `folder` or
    `brats`, as in its training. A model of 2D images takes a volume slice by slice, each with the
    same noise, so how the size of a volume varies over its samples is a rough guess.
        <name>_samples.png   image, prediction, outlines, maps, samples; a volume's fullest slice
        <name>_volumes.json  how large each class is, see `volumes`
    for a picture or an .npy
        <name>_arrays.npz   the arrays of `sample_arrays`
    and in 2D
        <name>_mean.png     its palette indices are the classes; <name>_entropy.png and
                            <name>_probability_<k>.png have 16 bits: 65535 is log K nats, and 1
    and for a NIfTI
        <name>_<array>.nii.gz   the same arrays, on its grid; n or K is the fourth axis
    `probabilities` are the mean and `uncertainty` the variance of the samples' probabilities, which
    cannot be computed again from `samples`: these are label maps, which hold less.
    data_name: the data set that the model was trained on. temperature, class_scales: for SSN only,
    see `scaled_samples`. Raises UserError where the file and the model do not fit.
    """
    file, out, dims = Path(file), Path(out), model.config.dims
    if dims == 1:
        raise UserError("--image is for models of images and volumes; this one is of lines")
    name = file.resolve().name if file.is_dir() else stem(file)
    image, inside, source = read_image(file, model.config.in_channels, dims, data_name)
    size, box = image.shape[1:], bounding_box(inside)
    image = torch.tensor(image[(slice(None), *box)]).float()
    inside, options = torch.from_numpy(inside[box]), (samples, temperature, class_scales)
    if inside.dim() > dims:  # axis -3 of every array is that of the slices
        slices = [sample_arrays(model, *each, *options) for each in zip(image.unbind(1), inside)]
        arrays = {kind: torch.stack([each[kind] for each in slices], -3) for kind in slices[0]}
    else:
        arrays = sample_arrays(model, image, inside, *options)

    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"{name}_samples.png"
    plot_prediction(picture, image, arrays)
    sizes = volumes(arrays["samples"], len(arrays["probabilities"]), source)
    write_text(out / f"{name}_volumes.json", json.dumps(sizes, indent=2) + "\n")
    if source is None:
        write_npz(out / f"{name}_arrays.npz", arrays)
        top, pictures = np.log(len(arrays["probabilities"])), {}
        if image.dim() == 3:
            pictures = {"mean": label_picture(arrays["mean"].numpy()),
                        "entropy": grey_picture(arrays["entropy"] / top)}
            pictures |= {f"probability_{k}": grey_picture(probability)
                         for k, probability in enumerate(arrays["probabilities"])}
        for kind, content in pictures.items():
            write_atomically(out / f"{name}_{kind}.png", lambda file: content.save(file, "PNG"))
        return picture, out / f"{name}_arrays.npz", sizes
    for kind, array in arrays.items():
        whole = np.zeros((*array.shape[: array.dim() - len(size)], *size), array.numpy().dtype)
        whole[:1] = kind == "probabilities"  # beyond the box all is background
        whole[(..., *box)] = array
        write_nifti(out / f"{name}_{kind}.nii.gz", whole, source)
    return picture, out / f"{name}_samples.nii.gz", sizes


def grey_picture(values) -> Image.Image:
    """A map (H, W) of numbers in 0..1 as a grey picture of 16 bits."""
    return Image.fromarray((65535 * values.clamp(0, 1)).round().numpy().astype(np.uint16))


def volumes(samples, num_classes: int, source=None) -> dict:
    """How large the foreground, and each of several classes, is in the samples (n, *S).

    {"samples": n, "unit": "pixels" or "mm^3", "volume": {"foreground": {"mean", "q05", "q95"},
    "class_1": ...}}, with quantiles at 5 % and 95 %; mm^3 by the affine of the nibabel image
    `source`, if there is one.
    """
    unit, voxel = "pixels", 1.0
    if source is not None:
        length = {"meter": 1e3, "micron": 1e-3}.get(source.header.get_xyzt_units()[0], 1.0)
        unit, voxel = "mm^3", length**3 * abs(np.linalg.det(source.affine[:3, :3]))
    kinds = {"foreground": samples > 0}
    if num_classes > 2:
        kinds |= {f"class_{k}": samples == k for k in range(1, num_classes)}
    sizes = {kind: voxel * inside.flatten(1).sum(1).numpy() for kind, inside in kinds.items()}
    return {"samples": len(samples), "unit": unit,
            "volume": {kind: dict(zip(("mean", "q05", "q95"), (
                size.mean().item(), *np.quantile(size, (0.05, 0.95)).tolist())))
                for kind, size in sizes.items()}}


@torch.no_grad()
def sample_arrays(model, image, inside, samples, temperature, class_scales) -> dict:
    """The arrays that `predict_image` writes, as CPU tensors, for image (C, *S): the label maps
    samples (n, *S), prediction, by `model.predict`, and mean (*S), that of the samples' mean
    probabilities (K, *S); uncertainty (*S), the variance over the samples, added over the classes,
    and entropy (*S).

    Where inside (*S) is false, which training never saw, everything is background.
    """
    device = next(model.parameters()).device
    batch, mask = image[None].to(device), inside.to(device)
    generator = torch.Generator(device).manual_seed(0)
    moments, drawn = metrics.Moments(), []
    for logits in scaled_samples(model, batch, samples, generator, temperature, class_scales):
        drawn.append((labels_of(logits, 2)[:, 0] * mask).cpu())
        for sample in logits:
            probs = sample.softmax(1) * mask
            probs[:, 0] += ~mask
            moments.add(probs)
    return dict(samples=torch.cat(drawn), probabilities=moments.mean[0].cpu(),
                prediction=(labels_of(model.predict(batch), 1)[0] * mask).cpu(),
                mean=labels_of(moments.mean, 1)[0].cpu(),
                uncertainty=moments.variance[0].cpu(),
                entropy=metrics.entropy_map(moments)[0].cpu())


def scaled_samples(model, batch, n, generator, temperature, class_scales):
    """Chunks of n samples' logits (m, B, K, *S), of SSN changed after the fact (its Sec. 4).

    temperature: T scales the covariance of the logits. class_scales {k: factor}: each class's part
    of (sample - mean) is multiplied by its factor. Raises UserError for other models and classes,
    and for factors that float32 does not hold.
    """
    classes, class_scales = model.config.num_classes, class_scales or {}
    changed = {} if temperature == 1 else dict(temperature=temperature)
    if (changed or class_scales) and not isinstance(model, SSN):
        raise UserError("--temperature and --scale-class change the normal over logits that only "
                        "ssn predicts; leave them out for this model")
    if max(class_scales, default=0) >= classes:
        raise UserError(f"--scale-class {max(class_scales)}: this model's classes are 0 to "
                        f"{classes - 1}")
    for k, factor in class_scales.items():
        if not abs(factor) <= torch.finfo(torch.float32).max:  # also false for NaN
            raise UserError(f"--scale-class {k}={str(factor)[:20]}: too large or not finite; give "
                            "a factor such as 0.5")
    factors = torch.tensor([float(class_scales.get(k, 1)) for k in range(classes)])
    for logits in sample_chunks(model, batch, n, classes, generator, **changed):
        yield model.distribution(batch).scale_classes(logits, factors) if class_scales else logits


def plot_prediction(path, image, arrays: dict) -> None:
    """Draw <name>_samples.png from image (C, *S) and the arrays of `sample_arrays`."""
    top = {name: arrays[name].max().item() for name in ("uncertainty", "entropy")}
    if image.dim() == 4:
        fullest = fullest_slice(arrays["samples"])
        image = image[:, fullest]
        arrays = {name: array.select(-3, fullest) for name, array in arrays.items()}
    samples = arrays["samples"][:SHOWN]
    rows = {"": [paint_image(image), paint_label(arrays["prediction"], image),
                 paint_outlines(samples, image), paint_map(1 - arrays["probabilities"][0], 1),
                 *(paint_map(arrays[name], high) for name, high in top.items())]}
    for i in range(0, len(samples), 8):
        rows[f"samples\n{i + 1} to {min(i + 8, len(samples))}"] = [
            paint_label(sample, image) for sample in samples[i : i + 8]]
    save_grid(path, rows, ["image", "prediction", "outlines", "foreground,\n0 to 1", *(
        f"{name},\n0 to {high:.2g}" for name, high in top.items())], cell=1.3)


def images_at(path: Path) -> list[Path]:
    """The images in the folder `path`, or `path` itself if it is a file or a BraTS patient.

    Raises UserError where there is no image, or where two share a name.
    """
    if not path.is_dir() or all(any(path.glob(f"*_{kind}.nii*")) for kind in BRATS):
        return [path]
    found = sorted(file for file in path.iterdir()
                   if file.name[0] != "." and file.name.lower().endswith(IMAGES))
    if not found:
        raise UserError(f"--image {path}: no image in this folder ({', '.join(IMAGES)})")
    names = [stem(file) for file in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--image {path}: two files share the name {twice[0]}, and so would their "
                        "results; rename one")
    return found


def stem(file: Path) -> str:
    """The file's name without its ending, be it .png or .nii.gz."""
    return Path(file.name.removesuffix(".gz")).stem


def read_image(file: Path, channels: int, dims: int, data_name: str):
    """Read an image as a model trained on the data set `data_name` takes it.

    Returns a float array (C, *S); a bool array (*S), false in the air around a BraTS brain; and the
    nibabel image that it came from, or None. Warns where pixels that are taken as they are stored
    are far from the scale that models expect. Raises UserError where it does not fit the model.
    """
    source, scaled = None, False  # scaled: to [0, 1], from 8 or 16 bits
    if file.is_dir():
        image, inside, source = read_patient(file)
    elif not file.is_file():  # a pipe would be waited for
        raise UserError(f"{file}: " + ("not a file" if file.exists() else "no such file"))
    elif is_nifti(file):
        image, source = read_nifti(file, dims)
        air = (image == 0).all(0)
        inside = ~air if data_name == "brats" and not air.all() else np.ones_like(air)
    else:
        stored = read_array(file)[0]
        image, scaled = as_float_image(stored, str(file)), stored.dtype.kind == "u"
        if file.suffix.lower() == ".npy":
            image = with_channels(image, channels, dims, file)
        elif channels == 3:
            image = image.repeat(3 // len(image), 0)
        elif len(image) == 3:
            image = np.tensordot(np.float32([[0.299, 0.587, 0.114]]), image, 1)  # luma, ITU-R 601
        inside = np.ones(image.shape[1:], bool)
    if source is not None and dims == 2 and image.shape[:2] == (1, channels) and channels > 1:
        raise UserError(f"{file}: its {channels} channels lie along z: store them along the fourth "
                        "axis, or as an .npy (C, H, W)")
    if len(image) != channels or image.ndim != 1 + dims and (dims, image.ndim) != (2, 4):
        raise UserError(f"{file}: {len(image)} channels of {image.ndim - 1}D; this model takes "
                        f"{channels} of {dims}D")
    if source is not None and data_name in ("brats", "folder"):
        image = standardised(image, inside)
    elif not scaled:
        image = image.astype(np.float32, copy=False)
        warn_of_scale(file, torch.tensor(image)[None])
    return image, inside, source


def with_channels(array, channels: int, dims: int, file: Path):
    """The array (C, *S) or (*S) of an .npy as (C, *S). Raises UserError where it is neither."""
    if not array.size or not 2 <= array.ndim <= 4 or array.shape[-1] <= 4 < array.shape[0]:
        raise UserError(f"{file}: an array of {size_text(array.shape)}; give an image (H, W) or "
                        "(C, H, W), or a volume (D, H, W) or (C, D, H, W): channels come first")
    is_volume = channels == 1 and array.ndim == 3 and len(array) > 1
    return array[None] if array.ndim == dims or is_volume else array
