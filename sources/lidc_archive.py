"""LIDC-IDRI from the archive's own DICOM and XML files: python data.py build-lidc SRC lidc.npz

Four radiologists outlined the lung nodules of 1,018 CT scans. The papers cut these scans into one
crop per lesion and slice, with four masks each (Probabilistic U-Net, arXiv:1806.05034, Sec. 4.1 and
App. H.1; HPU-Net, arXiv:1905.13077, App. C). What they leave open is decided like this:

  readings  Only the second, unblinded round counts, and of it the nodules of 3 mm and more, which
            have outlines. Annotators are numbered as in the XML file, where their order means
            nothing. If there are fewer than four, the missing maps are 255; if there are more, the
            last ones without an outline are left out. A corrected XML file replaces the other.
  masks     LIDC's outlines run over the first pixels *outside* the nodule. The mask is all pixel
            centres strictly inside the polygon, by the even-odd rule, in exact integers. A hole
            (inclusion FALSE) takes away its inside and its outline. With border="include" outlines
            belong to the nodule: masks are one pixel wider, as in the widely shared pickle.
  lesions   Nodules of different annotators are one lesion if their boxes (slices, rows, columns)
            share a voxel, and so on from nodule to nodule. A crop shows the masks of its own
            lesion only.
  slices    An outline names its image by UID and by z. The UID decides, and the image's own z says
            where the slice is; but outlines of several z under one UID belong each to the slice at
            that z, if there is one. Of several images at one z, the one outlined most is shown. A
            slice is dropped if |SliceLocation| and |ImagePositionPatient[-1]| differ by more than
            0.01 mm.
  crops     The slice, from its corner on, is divided into pixels of 0.5 mm. At their centres the
            image is interpolated linearly, and a mask takes the nearest pixel. The middle of the
            box round all masks of the lesion lies in the crop's pixel (size // 2, size // 2).
            Outside the slice there is air. If no mask has a pixel on a slice, there is no case.
  window    -1000 to 400 HU become 0 to 255, so that one step is 5.5 HU.

Over the annotation files of all 1,018 series these rules give 875 patients with a lesion, 2,648
lesions and 15,742 slices of lesions with border="exclude". The pickle was published with 875
patients, about 2,650 lesions and 15,096 slices; which 4 % of the slices it lacks is not known, as
its authors' rules are unpublished. The two papers, after their own choice, report 12,870.
"""

import functools
import hashlib
import itertools
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from common import IGNORE, Progress, say
from sources.base import split_groups
from sources.files import DataError, error_line, optional_package, size_text, write_npz

# About values of DICOM files that are not used here.
warnings.filterwarnings("ignore", module="pydicom")

LIDC_ANNOTATORS = 4
LIDC_PIXEL = 0.5  # mm
LIDC_WINDOW = (-1000.0, 400.0)  # HU


class CTSlice(NamedTuple):
    """A slice of a scan, as `read_dicom` finds it in a file."""

    file: str
    uid: str  # SOPInstanceUID
    series: str  # SeriesInstanceUID
    patient: str
    shape: tuple[int, ...]  # rows, columns
    spacing: tuple[float, ...]  # mm between rows, mm between columns
    z: float | None  # ImagePositionPatient[-1], mm
    location: float | None  # SliceLocation, mm
    hu: np.ndarray | None = None  # (H, W) float32, Hounsfield units, only if asked for


def read_dicom(path: str, pixels: bool = False) -> CTSlice | None:
    """Reads the slice in a DICOM file of a CT scan. Returns None for any other file, and raises
    what pydicom raises for a damaged one."""
    import pydicom

    try:
        file = pydicom.dcmread(path, stop_before_pixels=not pixels)
    except pydicom.errors.InvalidDicomError:
        if path.lower().endswith(".dcm"):
            raise
        return None
    if file.get("Modality") != "CT":
        return None
    spacing, position, location = (
        [] if file.get(name) is None else np.array(file.get(name), float).ravel().tolist()
        for name in ("PixelSpacing", "ImagePositionPatient", "SliceLocation"))
    hu = None
    if pixels:
        stored = file.pixel_array.astype(np.float32)
        hu = stored * np.float32(file.RescaleSlope) + np.float32(file.RescaleIntercept)
    return CTSlice(path, str(file.SOPInstanceUID), str(file.SeriesInstanceUID),
                   str(file.get("PatientID", "")), (file.Rows, file.Columns), tuple(spacing),
                   position[-1] if position else None, location[0] if location else None, hu)


def read_xml(file: str) -> tuple[str, list[list[dict[tuple, list]]]] | None:
    """Reads (series UID, sessions) from XML; None if it is no reading of a CT scan.

    sessions[annotator][nodule] = {(slice UID, z): [(whether it is no hole, [(x, y)])]}.
    XML entities that would expand to huge texts are refused by Expat itself, from 2.4.1 on.
    """
    root = ElementTree.fromstring(Path(file).read_bytes())
    if root.tag.rpartition("}")[2] != "LidcReadMessage":  # of a chest X-ray: IdriReadMessage
        return None
    series = [field.text.strip() for field in root.findall("{*}ResponseHeader/*") if field.text
              and field.tag.rpartition("}")[2].lower() == "seriesinstanceuid"]
    if not series:
        raise DataError("names no SeriesInstanceUid")
    try:
        sessions = [[nodule_outlines(nodule) for nodule in each.findall("{*}unblindedReadNodule")]
                    for each in root.findall("{*}readingSession")]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError("a roi is not as LIDC writes it (imageSOP_UID, imageZposition, inclusion "
                        "TRUE or FALSE, edgeMaps of whole xCoord and yCoord)") from error
    return series[0], [[nodule for nodule in nodules if nodule] for nodules in sessions]


def nodule_outlines(nodule: ElementTree.Element) -> dict[tuple, list]:
    """Returns {(slice UID, z): outlines} of a nodule; {} if it is smaller than 3 mm."""
    outlines = {}
    for roi in nodule.findall("{*}roi"):
        points = [(int(edge.findtext("{*}xCoord")), int(edge.findtext("{*}yCoord")))
                  for edge in roi.findall("{*}edgeMap")]
        included = {"TRUE": True, "FALSE": False}[roi.findtext("{*}inclusion").strip().upper()]
        if len(points) > 1:
            z = float(roi.findtext("{*}imageZposition", "0"))
            place = roi.findtext("{*}imageSOP_UID").strip(), round(z, 3)
            outlines.setdefault(place, []).append((included, points))
    return outlines


def outlined_places(sessions: list) -> set[tuple]:
    """Returns (slice UID, z) of every outline of every annotator."""
    return {place for nodules in sessions for nodule in nodules for place in nodule}


def fill(points: list[tuple[int, int]], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Finds the pixel centres inside and on the closed polygon of `points` (x, y): two (H, W) bool.
    A centre is inside if the ray to its right crosses the polygon an odd number of times."""
    if any(not (0 <= x < shape[1] and 0 <= y < shape[0]) for x, y in points):
        raise DataError(f"an outline leaves its slice of {size_text(shape)} pixels")
    inside, outline = np.zeros((2, *shape), bool)
    x = np.arange(shape[1])
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1]):
        low, high = sorted((y0, y1))
        y = np.arange(low, high + 1)[:, None]
        side = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)  # 0 on the edge's line
        outline[low:high + 1] |= (side == 0) & (x >= min(x0, x1)) & (x <= max(x0, x1))
        inside[low:high] ^= (side * (y1 - y0) > 0)[:-1]  # row `high` belongs to the next edge
    return inside & ~outline, outline


def fill_nodule(outlines: dict, slices: dict[tuple, CTSlice], border: str) -> np.ndarray:
    """Returns the voxels (P, 3) of a nodule, by z, row and column, in those slices that exist."""
    voxels = [np.empty((0, 3))]
    for place in outlines.keys() & slices.keys():
        mask, hole = np.zeros((2, *slices[place].shape), bool)
        for included, points in outlines[place]:
            inside, outline = fill(points, mask.shape)
            if included:
                mask |= inside | outline if border == "include" else inside
            else:  # the outline of a hole belongs to the nodule where that of a nodule does
                hole |= inside if border == "include" else inside | outline
        pixels = np.argwhere(mask & ~hole).astype(float)
        voxels.append(np.insert(pixels, 0, slices[place].z, axis=1))
    return np.concatenate(voxels)


def group_lesions(nodules: list[tuple[int, np.ndarray]]) -> list[list[tuple[int, np.ndarray]]]:
    """Joins nodules (annotator, voxels) of different annotators whose tightest boxes overlap."""
    boxes = [(voxels.min(0), voxels.max(0)) for _, voxels in nodules]
    lesion = list(range(len(nodules)))
    for i, j in itertools.combinations(range(len(nodules)), 2):
        overlap = np.maximum(boxes[i][0], boxes[j][0]) <= np.minimum(boxes[i][1], boxes[j][1])
        if nodules[i][0] != nodules[j][0] and overlap.all():
            lesion = [lesion[i] if number == lesion[j] else number for number in lesion]
    return [[nodule for nodule, number in zip(nodules, lesion) if number == wanted]
            for wanted in dict.fromkeys(lesion)]


def crop_lines(lesion: list, spacing: tuple[float, ...], size: int) -> list[np.ndarray]:
    """Returns where the crop's rows and columns lie: two (size,), in pixels of the slice."""
    voxels = np.concatenate([voxels for _, voxels in lesion])[:, 1:]
    step = LIDC_PIXEL / np.array(spacing)
    # Pixel k of the crop's grid covers the steps k to k + 1.
    middle = np.floor((voxels.min(0) + voxels.max(0) + 1) / 2 / step)[:, None]
    return list((middle - size // 2 + np.arange(size) + 0.5) * step[:, None] - 0.5)


def crop(image: np.ndarray, lines: list[np.ndarray], outside: float, linear: bool) -> np.ndarray:
    """Samples `image` (H, W) where `lines` cross, at the nearest pixel or linear between pixels."""
    there = [(line >= -0.5) & (line < length - 0.5) for line, length in zip(lines, image.shape)]
    for axis, line in enumerate(lines):
        last = image.shape[axis] - 1
        line = line.clip(0, last) if linear else np.rint(line).clip(0, last)
        low = np.floor(line).astype(int)
        share = np.expand_dims(line - low, 1 - axis).astype(image.dtype)
        image = (image.take(low, axis) * (1 - share)
                 + image.take((low + 1).clip(max=last), axis) * share)
    return np.where(np.outer(*there), image, outside).astype(image.dtype)


class Series(NamedTuple):
    """A scan to be cut."""

    uid: str
    patient: str
    reading: str  # XML file
    slices: dict[tuple, CTSlice]  # of each outlined place (slice UID, z)

    def __str__(self):
        return f"series {self.uid} ({self.patient})"


def cut_series(series: Series, size: int, window, border: str) -> dict:
    """Cuts a scan: images (n, size, size), labels (n, A, size, size), z and lesion (n,) of n cases,
    and the number of outlined slices that were dropped."""
    sessions = read_xml(series.reading)[1]
    while len(sessions) > LIDC_ANNOTATORS and [] in sessions:
        del sessions[max(i for i, session in enumerate(sessions) if session == [])]
    if len(sessions) > LIDC_ANNOTATORS:
        raise DataError(f"{series.reading} has {len(sessions)} readingSessions; a scan has "
                        f"{LIDC_ANNOTATORS} annotators")
    slices = {place: found._replace(z=round(found.z, 3)) for place, found in series.slices.items()
              if position_agrees(found)}
    places = outlined_places(sessions)
    if places and not slices:
        raise DataError("its outlined slices are not there, or in all of them SliceLocation and "
                        "ImagePositionPatient disagree")
    if len({(found.shape, found.spacing) for found in slices.values()}) > 1:
        raise DataError("its slices differ in size or PixelSpacing")

    outlined, nodules = Counter(), []
    for annotator, drawn in enumerate(sessions):
        for outlines in drawn:
            outlined.update(slices[place] for place in outlines if place in slices)
            voxels = fill_nodule(outlines, slices, border)
            if len(voxels):
                nodules.append((annotator, voxels))
    lesions = group_lesions(nodules)
    lines = [crop_lines(lesion, next(iter(outlined)).spacing, size) for lesion in lesions]
    images, labels, where = [], [], []
    for z in sorted({z for _, voxels in nodules for z in voxels[:, 0].tolist()}):
        found = max([found for found in outlined if found.z == z], key=outlined.get)
        hu = read_dicom(found.file, pixels=True).hu
        for number, lesion in enumerate(lesions):
            masks = np.zeros((LIDC_ANNOTATORS, size, size), np.uint8)
            for annotator, voxels in lesion:
                mask = np.zeros(hu.shape, np.uint8)
                mask[tuple(voxels[voxels[:, 0] == z, 1:].astype(int).T)] = 1
                masks[annotator] |= crop(mask, lines[number], 0, linear=False)
            if masks.any():
                image = crop(hu, lines[number], window[0], linear=True)
                image = (image - window[0]) / (window[1] - window[0])
                images.append(np.rint(255 * image.clip(0, 1)).astype(np.uint8))
                masks[len(sessions):] = IGNORE
                labels.append(masks)
                where.append((z, number))
    z, lesion = np.array(where).reshape(-1, 2).T
    return dict(images=np.array(images, np.uint8).reshape(-1, size, size), z=z,
                labels=np.array(labels, np.uint8).reshape(-1, LIDC_ANNOTATORS, size, size),
                lesion=lesion.astype(int), dropped=len(places - slices.keys()))


def position_agrees(found: CTSlice) -> bool:
    """Tells whether SliceLocation confirms z. DataError if a slice has no position or no scale."""
    if found.z is None or not math.isfinite(found.z) or len(found.spacing) != 2 or not all(
            0.1 <= mm <= 5 for mm in found.spacing):
        raise DataError(f"slice {found.uid} has ImagePositionPatient {found.z} and PixelSpacing "
                        f"{found.spacing}; a position and two numbers from 0.1 to 5 mm are needed")
    return found.location is None or abs(abs(found.location) - abs(found.z)) <= 0.01


def build_series(series: Series, work: Path, **settings) -> Path:
    """Writes the result of `cut_series` to a file of `work`, unless it is there. The file's name
    changes with everything that decides its content, this source code included."""
    files = [series.reading, *sorted({found.file for found in series.slices.values()})]
    stamps = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    digest = hashlib.sha256(Path(__file__).read_bytes() + ascii((settings, stamps)).encode())
    target = work / f"{digest.hexdigest()[:32]}.npz"
    if not target.exists():
        write_npz(target, cut_series(series, **settings))
    return target


# ----------------------------------------------------------------------------- the whole archive


def build_lidc(src, dst, *, size: int = 180, window: tuple[float, float] = LIDC_WINDOW,
               border: str = "exclude", workers: int = 1) -> None:
    """Cuts LIDC-IDRI, as the archive serves it, from the folder `src` into `dst`, an .npz.

    Folders may nest in any way; a series and its XML file are matched by their UIDs. `dst` appears
    whole or not at all. Finished series are kept in the folder `dst`.work, so rerun to resume;
    delete it when `dst` is there. A bad file or series is reported and skipped.
    """
    src, dst = Path(src), Path(dst)
    if not src.is_dir() or dst.suffix != ".npz":
        raise DataError(f"{src} -> {dst}: give a folder, and a file name that ends in .npz")
    if dst.exists():
        raise DataError(f"{dst} is there: delete it, or give another name")
    if size < 2 or not -math.inf < window[0] < window[1] < math.inf:
        raise DataError(f"size {size}, window {window}: give at least 2 pixels, and a lower and a "
                        "higher number of HU")
    optional_package("pydicom", src)
    work = dst.with_name(dst.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    for half in work.glob(".*.tmp"):  # what a kill left
        half.unlink()

    refused: list[str] = []
    tasks = find_series(src, workers, refused)
    build = functools.partial(build_series, work=work, size=size, window=window, border=border)
    files = {file: task.patient for task, file in run(build, tasks, workers, "series", refused)}
    for line in sorted(refused):
        say(f"refused: {line}")
    write_npz(work / "result.npz", join_series(files))
    (work / "result.npz").rename(dst)
    say(f"wrote {dst}")


def run(function: Callable, items: list, workers: int, what: str, refused: list[str]) -> list:
    """Returns (item, function(item)) of every item for which it does not fail; the others go to
    `refused`, with the reason. Shows the progress. Threads are enough: one core cuts the whole
    archive in about seven minutes."""
    def attempt(item):
        try:
            return item, function(item), ""
        except MemoryError:
            raise
        except Exception as error:  # damaged bytes can raise nearly anything
            return item, None, str(error) if isinstance(error, DataError) else error_line(error)

    progress, results = Progress(len(items)), []
    with ThreadPool(max(workers, 1)) as pool:
        for done, (item, result, fault) in enumerate(pool.imap(attempt, items), start=1):
            if fault:
                refused.append(f"{item}: {fault}")
            else:
                results.append((item, result))
            progress.update(done, what)
    progress.say(f"{len(items)} {what}")
    return results


def find_series(src: Path, workers: int, refused: list[str]) -> list[Series]:
    """Finds the series to cut. What else is there goes to `refused`, with the reason."""
    def look(file: str):
        """Returns a slice of a CT scan, or a reading's series and outlined places, or None."""
        if not file.lower().endswith(".xml"):
            return read_dicom(file)
        reading = read_xml(file)
        return (reading[0], outlined_places(reading[1])) if reading else None

    files = sorted(str(path) for path in src.rglob("*") if path.is_file())  # no pipe, no dead link
    readings, scans = {}, {}
    for file, found in run(look, files, workers, "files", refused):
        if isinstance(found, CTSlice):
            scans.setdefault(found.series, []).append(found)
        elif found:
            readings.setdefault(found[0], {})[file] = found[1]
    if astray := readings.keys() - scans.keys():
        refused.append(f"{len(astray)} XML files: no slices of series {min(astray)}, ...")

    tasks = []
    for uid, slices in scans.items():
        outlined = readings.get(uid, {})
        files = list(outlined)
        if any(read_xml(file) != read_xml(files[0]) for file in files[1:]):
            # Of LIDC-IDRI-0101 the archive keeps the first reading beside the corrected one.
            files = [file for file in files if "correction" in Path(file).name]
            files = files if len(files) == 1 else []
        if files:
            # The patient's name becomes that of a folder.
            patient = re.sub(r"[^\w-]+", "_", slices[0].patient) or uid
            tasks.append(Series(uid, patient, files[0], find_slices(outlined[files[0]], slices)))
        else:
            why = "its XML files contradict each other" if outlined else "no XML of its annotators"
            refused.append(f"series {uid} ({slices[0].patient}): {why}")
    return sorted(tasks, key=lambda task: (task.patient, task.uid))


def find_slices(places: set[tuple], slices: list[CTSlice]) -> dict[tuple, CTSlice]:
    """Finds the slice of each place (slice UID, z) of a reading; some places have none."""
    several, located = Counter(uid for uid, _ in places), {}
    for uid, z in places:
        found = [found for found in slices if found.uid == uid]
        if several[uid] > 1:
            found = [found for found in found + slices if found.z is not None
                     and abs(found.z - z) <= 0.01]
        if found:
            located[uid, z] = found[0]  # of copies, the first
    return located


def join_series(series: dict[Path, str]) -> dict[str, np.ndarray]:
    """Joins the series {file: patient} to images, labels, groups and names, and prints a table."""
    scans, names, groups, lesions = [], [], [], Counter()
    for file, patient in series.items():
        with np.load(file) as loaded:
            scan = dict(loaded)
        # Some patients have two scans: the second continues the numbers of the first.
        names += [f"{patient}/z{z}_c{lesions[patient] + number}"
                  for z, number in zip(scan["z"], scan["lesion"])]
        groups += [patient] * len(scan["z"])
        lesions[patient] += scan["lesion"].max(initial=-1) + 1
        scans.append(scan)
    if not names:
        raise DataError("nothing to cut: no series with both its DICOM files and its XML file")
    images, labels = (np.concatenate([scan[key] for scan in scans]) for key in ("images", "labels"))
    highest = labels.max((2, 3))  # 255: no such annotator; 0: nothing marked
    empty = (highest == 0).sum(1) / (highest != IGNORE).sum(1)
    say(f"{'':6}{'patients':>10}{'lesions':>9}{'slices':>8}{'empty masks':>13}")
    for split, rows in split_groups(groups, val=0.2).items():
        patients = {groups[i] for i in rows}
        share = empty[rows].mean() if rows else 0
        say(f"{split:6}{len(patients):10}{sum(lesions[patient] for patient in patients):9}"
            f"{len(rows):8}{share:13.1%}")
    say(f"{sum(int(scan['dropped']) for scan in scans)} outlined slices dropped: not there, or "
        "SliceLocation and ImagePositionPatient disagree")
    return dict(images=images, labels=labels, groups=np.array(groups), names=np.array(names))
