"""Reading one file: a picture, arrays, NIfTI; and writing files safely."""

import contextlib
import gzip
import importlib
import math
import os
import threading
import warnings
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from common import UserError

# The endings of the files that `read_array` reads.
ENDINGS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".npy", ".nii", ".nii.gz")
EXPANSION, SMALL = 200, 2**28  # a file may claim arrays of 200 times its size, or of 256 MiB
# NumPy parses a file's header by `ast`, and now and then that fails where two threads do it at once
# ("AST constructor recursion depth mismatch", seen with Python 3.11.7).
PARSING = threading.Lock()

# `_open_picture` refuses what Pillow would only warn of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DataError(UserError):
    """A mistake in a data file, or in what was asked of it, in one line."""


def size_text(shape: Sequence[int]) -> str:
    """Writes a shape for a message: (3, 4) becomes "3 x 4"."""
    return " x ".join(map(str, shape)) or "one value"


def holds(folder: Path) -> str:
    """Says what a folder holds, for a message."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return f"{folder} holds {', '.join(shortened(names)) or 'nothing'}"


def shortened(names: Sequence[str]) -> list[str]:
    """Cuts a list of many names, for a message."""
    return [*names[:6], "..."] if len(names) > 6 else [*names]


@contextlib.contextmanager
def readable(file, what: str):
    """Turns any error inside into one DataError: damaged bytes can raise nearly anything. Only
    regular files are read: a pipe would wait forever, and a device may have no end."""
    if not Path(file).is_file():
        raise DataError(f"{file}: not a readable {what}: no such file, or not a regular one")
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{file}: not a readable {what}: {error_line(error)}") from error


def error_line(error: Exception) -> str:
    """Returns the kind and the text of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def optional_package(module: str, file):
    """Imports the package that reads `file`, or raises a DataError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{file}: {module} reads it: pip install {module}") from error


@contextlib.contextmanager
def _open_picture(file: Path, pages: bool = False):
    kind = {".tif": "TIFF", ".jpg": "JPEG"}.get(file.suffix.lower(), file.suffix[1:].upper())
    with readable(file, kind), Image.open(file) as picture:
        if prod(picture.size) > Image.MAX_IMAGE_PIXELS:
            raise DataError(f"{file}: {size_text(picture.size)} pixels (a decompression bomb?); "
                            f"{Image.MAX_IMAGE_PIXELS} are allowed: cut it into tiles")
        if picture.format == "TIFF" and getattr(picture, "n_frames", 1) > 1 and not pages:
            raise DataError(f"{file}: {picture.n_frames} pages, and only one is a picture: save "
                            "each page as a file, or the volume as an .npy (D, H, W)")
        # Viewers turn such a picture and readers do not, so masks drawn upright would not fit it.
        orientation = picture.getexif().get(0x112, 1)
        if orientation not in (0, 1):  # 0: some cameras' word for unknown, which nobody turns
            raise DataError(f"{file}: has an EXIF rotation (orientation {orientation}), which not "
                            "every program applies: save it upright, without that rotation")
        yield picture


def read_picture(file: Path) -> np.ndarray:
    """Reads a picture (C, H, W), grey or RGB, of 8 or 16 bits or floats, and does not scale it."""
    with _open_picture(file) as picture:
        if picture.mode not in ("L", "F", "RGB") and not picture.mode.startswith("I"):
            picture = picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
        array = np.asarray(picture)
    if array.dtype == np.int32 and 0 <= array.min() and array.max() < 2**16:
        array = array.astype(np.uint16)  # some versions of Pillow give int32 for 16 bits
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def read_label(file: Path) -> np.ndarray:
    """Reads a label map (H, W), whose classes are the grey levels or palette indices."""
    with _open_picture(file) as picture:
        array = np.asarray(picture)
        if array.ndim == 3 and (array[..., :3] == array[..., :1]).all() and (
                array[..., 3:] == 255).all():
            array = array[..., 0]  # grey levels that were saved as opaque colours
        if picture.format == "JPEG" or array.ndim != 2:
            raise DataError(f"{file}: a {picture.format} of {picture.mode}; a label map is a PNG or"
                            " TIFF of grey levels or palette indices (JPEG changes labels)")
    return array


def as_float_image(image: np.ndarray, where: str) -> np.ndarray:
    """Returns float32 pixels: uint8 and uint16 are scaled to [0, 1], floats stay as they are. Other
    kinds, and pixels that are not finite, are refused."""
    if image.dtype.kind == "u" and image.dtype.itemsize <= 2:
        return image / np.float32(np.iinfo(image.dtype).max)
    if image.dtype.kind != "f":
        raise DataError(f"{where} is of {image.dtype}; give floats, or uint8 or uint16 (scaled to "
                        "[0, 1])")
    with np.errstate(over="ignore"):
        image = image.astype(np.float32, copy=False)
    if not np.isfinite(image).all():
        raise DataError(f"{where} has pixels that are not finite; replace them first")
    return image


def read_pages(file: Path) -> np.ndarray:
    """Reads a TIFF of several pages as (N, H, W)."""
    with _open_picture(file, pages=True) as picture:
        return np.stack([np.asarray(page) for page in ImageSequence.Iterator(picture)])


def read_npz_arrays(file: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict:
    """Reads {key: array}, in the order of `needed` and `optional`; other keys are refused. NumPy
    expands no more than the sizes in the zip's directory, so these are checked first."""
    with readable(file, ".npz of plain arrays"), PARSING, open(file, "rb") as raw, \
            np.load(raw, allow_pickle=False) as archive:
        given = set(archive.files)
        if not set(needed) <= given <= {*needed, *optional}:
            allowed = f", {', '.join(optional)} allowed" if optional else ""
            raise DataError(f"{file}: has the keys {', '.join(sorted(given)[:20]) or '(none)'}; "
                            f"{' and '.join(needed)} are needed{allowed}")
        check_claim(file, sum(member.file_size for member in archive.zip.infolist()))
        arrays = {key: archive[key] for key in (*needed, *optional) if key in given}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("a member is no array")  # NumPy returns its bytes
        return arrays


def check_claim(file: Path, claimed: int) -> None:
    """Raises DataError if `file` claims to hold far more bytes than it can be expected to."""
    most = max(EXPANSION * os.path.getsize(file), SMALL)
    if claimed > most:
        raise DataError(f"{file}: claims {claimed:,} bytes of arrays, more than {EXPANSION} times "
                        "its own size; save it without compression if that is right")


def read_nifti(file, dims: int | None = None) -> tuple[np.ndarray, object]:
    """Reads a NIfTI file: voxels (C, D, H, W), and the nibabel image that `write_nifti` needs.

    A single slice is (C, H, W), unless dims=3. Axes are turned, in steps of 90 degrees, so that W
    runs to the patient's left, H to the back and D to the head, as in DICOM: files stored in
    different orders agree. Voxels that are not finite real numbers are refused.
    """
    nibabel = optional_package("nibabel", file)
    with readable(file, "NIfTI file"):
        source = nibabel.load(file)
        array = np.asarray(source.dataobj)
        array = array.reshape(*(array.shape + (1, 1, 1))[:3], -1)  # x, y, z, channel
        array = nibabel.apply_orientation(array, _turned(source)[0]).T
    if array.dtype.kind not in "buif" or not np.isfinite(array).all():
        raise DataError(f"{file}: voxels of {array.dtype}, or some are NaN or infinite; give "
                        "finite real numbers, with channels along the fourth axis")
    # Turned axes have negative strides, which torch refuses.
    array = np.ascontiguousarray(array)
    thin = [axis for axis in (1, 2, 3) if array.shape[axis] == 1]
    if dims != 3 and len(thin) == 1:
        array = array.squeeze(thin[0])
    return array, source


def is_nifti(file: Path) -> bool:
    """Tells whether the file's name is that of a NIfTI file."""
    return file.name.lower().endswith(ENDINGS[-2:])


def read_array(file: Path, label: bool = False, dims: int | None = None):
    """Reads an image (C, *S) or a label map (*S) from a file of any kind in `ENDINGS`; returns it
    and the nibabel image it came from, or None. Channels of a NIfTI image are brought to mean 0 and
    deviation 1. An .npy is as it was stored, perhaps without channels. dims: see `read_nifti`."""
    if is_nifti(file):
        array, source = read_nifti(file, dims)
        if label:
            return whole_numbers(array[0] if len(array) == 1 else array), source
        return standardised(array, np.ones(array.shape[1:], bool)), source
    if file.suffix.lower() == ".npy":
        return np.array(_open_npy(file)), None
    return (read_label if label else read_picture)(file), None


def whole_numbers(label: np.ndarray) -> np.ndarray:
    """Rounds a label map that is off by a header's scale (scl_slope): 0.99999 is 1."""
    if label.dtype.kind != "f":
        return label
    near = np.rint(label)
    if np.abs(label - near).max(initial=0) >= 1e-3:
        return label
    return near.astype(np.uint8) if 0 <= near.min(initial=0) and near.max(initial=0) < 256 else near


def _open_npy(file: Path) -> np.ndarray:
    """Maps the array in an .npy into memory, so that it cannot claim more than the file holds."""
    with readable(file, ".npy of a plain array"), open(file, "rb") as raw:
        np.lib.format.read_magic(raw)  # refuses what NumPy would take for a zip or a pickle
        with PARSING:
            return np.load(file, mmap_mode="r", allow_pickle=False)


def count_slices(file: Path) -> int:
    """Returns D of the volume (C, D, H, W) or (D, H, W) in a NIfTI file or an .npy."""
    if is_nifti(file):
        nibabel = optional_package("nibabel", file)
        with readable(file, "NIfTI file"):
            return _turned(nibabel.load(file))[1][2]
    if file.suffix.lower() != ".npy" or _open_npy(file).ndim < 3:
        raise DataError(f"{file}: not a volume; slices=axial cuts NIfTI files and .npy arrays")
    return _open_npy(file).shape[-3]


def _turned(source) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """Returns the turn that `read_nifti` applies, as nibabel notes it, and the size (x, y, z) and
    the affine after it."""
    from nibabel import orientations

    turn = orientations.ornt_transform(orientations.io_orientation(source.affine),
                                       orientations.axcodes2ornt("LPS"))
    size = (source.shape + (1, 1, 1))[:3]
    affine = source.affine @ orientations.inv_ornt_aff(turn, size)
    return turn, tuple(size[axis] for axis in turn[:, 0].argsort()), affine


def write_nifti(path, array: np.ndarray, source) -> None:
    """Writes (D, H, W) or (n, D, H, W), of a single slice (H, W) or (n, H, W), with the shape, the
    order of axes and the affine of `source`, from `read_nifti`. n is the file's fourth axis."""
    import nibabel
    from nibabel import orientations

    size = _turned(source)[1]
    back = orientations.ornt_transform(orientations.axcodes2ornt("LPS"),
                                       nibabel.io_orientation(source.affine))
    array = nibabel.apply_orientation(array.reshape(-1, *size[::-1]).T, back)
    image = nibabel.Nifti1Image(array[..., 0] if array.shape[3] == 1 else array, source.affine,
                                source.header)
    image.header.set_data_dtype(array.dtype)
    image.header["cal_min"] = image.header["cal_max"] = 0  # the window of the original's values
    write_atomically(path, lambda file: file.write(gzip.compress(image.to_bytes())))


def same_grid(source, other, file) -> None:
    """Raises DataError if `other`, read from `file`, lies on other voxels than `source`."""
    (_, size, here), (_, _, there) = _turned(source), _turned(other)
    voxel = np.linalg.norm(here[:3, :3], axis=0).min()
    if (abs(here - there) @ [*size, 1]).max() > voxel / 2:
        image = Path(source.get_filename()).name
        raise DataError(f"{file}: its affine is not that of {image}; resample it onto that grid "
                        "or, if only the header is wrong, save it with that affine")


def standardised(volume: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Brings each channel of (C, *S) to mean 0 and deviation 1 inside (*S), and to 0 outside."""
    volume = volume.astype(np.float32)
    for channel in volume:
        channel -= channel.mean(dtype=np.float64, where=inside)
        channel *= inside
        flat = channel.ravel()
        square = np.einsum("i,i", flat, flat, dtype=np.float64)
        channel /= math.sqrt(square / max(np.count_nonzero(inside), 1)) or 1
    return volume


def resample_case(image: np.ndarray, label: np.ndarray, size: Sequence[int], file: Path):
    """Resamples (C, H, W), bilinear over the area that a new pixel covers, and (H, W), nearest."""
    if image.shape[1:] != label.shape or min(size) < 1:
        raise DataError(f"{file}: image is {size_text(image.shape[1:])} and its label "
                        f"{size_text(label.shape)}; they must be of one size, not shrunk to 0")
    with readable(file, "image to resize"):
        planes = [Image.fromarray(plane).resize(tuple(size)[::-1], Image.Resampling.BILINEAR)
                  for plane in np.ascontiguousarray(image)]
    middles = [((np.arange(want) + 0.5) * have / want).astype(int)
               for want, have in zip(size, label.shape)]
    return np.stack([np.asarray(plane) for plane in planes]), label[np.ix_(*middles)]


def bounding_box(inside: np.ndarray) -> tuple[slice, ...]:
    """Returns the tightest box around all that is True."""
    return tuple(slice(line.min(), line.max() + 1) for line in np.nonzero(inside))


def write_atomically(path, write) -> None:
    """Calls write(file) for a temporary file, open for bytes, flushes it to disk and renames it to
    `path`. A kill or a full disk leaves what stood at `path` before. Only regular files are
    replaced, no device or folder."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a regular file, so it is not replaced; give another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_npz(path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a compressed .npz, whole or not at all; the same arrays make the same bytes."""
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def write_text(path, text: str) -> None:
    """Writes `text`, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))
