"""LIDC-IDRI from the archive's own DICOM and XML files."""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
import torch
from PIL import Image

from common import IGNORE
from sources.base import measure_case, split_groups
from sources.files import DataError, error_line, size_text, write_atomically


LIDC_READERS = 4


LIDC_PIXEL = 0.5  # mm


LIDC_WINDOW = (-1000.0, 400.0)  # HU


class CTSlice(NamedTuple):
    """What `read_dicom` takes from a file."""

    uid: str  # SOPInstanceUID
    series: str  # SeriesInstanceUID
    patient: str
    modality: str
    shape: tuple[int, ...]  # rows, columns
    spacing: tuple[float, ...]  # mm between rows, mm between columns
    z: float | None  # ImagePositionPatient[-1], mm
    location: float | None  # SliceLocation, mm
    hu: np.ndarray | None  # (H, W) float32, Hounsfield units


def read_dicom(path, pixels: bool = False) -> CTSlice | None:
    """The slice in a DICOM file, its pixels only where asked for; None for any other file.

    The one place that needs pydicom (ImportError says how to get it). A damaged file raises what
    pydicom raises.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ImportError("reading DICOM files takes pydicom: pip install pydicom") from error
    with warnings.catch_warnings():  # remarks on values that nobody reads here
        warnings.simplefilter("ignore")
        try:
            file = pydicom.dcmread(path, stop_before_pixels=not pixels)
        except pydicom.errors.InvalidDicomError:
            return None
        if "SOPInstanceUID" not in file or "SeriesInstanceUID" not in file:
            return None  # a DICOMDIR

        def numbers(name: str) -> tuple[float, ...]:
            value = file.get(name)
            return tuple(np.array([] if value is None else value, float).ravel().tolist())

        hu = None
        if pixels:
            stored = file.pixel_array.astype(np.float32)
            hu = stored * np.float32(file.RescaleSlope) + np.float32(file.RescaleIntercept)
        return CTSlice(str(file.SOPInstanceUID), str(file.SeriesInstanceUID),
                       str(file.get("PatientID", "")), str(file.get("Modality", "")),
                       (int(file.get("Rows", 0)), int(file.get("Columns", 0))),
                       numbers("PixelSpacing"), *(numbers("ImagePositionPatient")[-1:] or [None]),
                       *(numbers("SliceLocation") or [None]), hu)


def _reading(raw: bytes):
    """A reader's XML -> (series UID, sessions), or None where it is no reading of a CT scan.

    sessions[reader][nodule] = {slice UID: [(part of the nodule, not a hole; [(x, y), ...]), ...]}.
    Names count, whatever their namespace.
    """
    def refuse(*_):
        raise DataError("declares a document type: no reading needs one, and entities can explode")

    guard = expat.ParserCreate()
    guard.StartDoctypeDeclHandler = refuse  # comes before any entity
    guard.Parse(raw, True)
    root = ElementTree.fromstring(raw)
    if root.tag.rpartition("}")[2] != "LidcReadMessage":
        return None  # of a chest X-ray (IdriReadMessage), or something else altogether
    series = [field.text.strip() for field in root.findall("{*}ResponseHeader/*") if field.text
              and field.tag.rpartition("}")[2].lower() == "seriesinstanceuid"]
    if not series:
        raise DataError("names no SeriesInstanceUid")
    try:
        sessions = [[_outlines(nodule) for nodule in session.findall("{*}unblindedReadNodule")]
                    for session in root.findall("{*}readingSession")]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError("a roi is not as LIDC writes it (imageSOP_UID, inclusion TRUE or FALSE, "
                        "edgeMaps of whole xCoord and yCoord)") from error
    return series[0], [[nodule for nodule in drawn if nodule] for drawn in sessions]


def _outlines(nodule: ElementTree.Element) -> dict[str, list]:
    """{slice UID: [(part of the nodule, points)]} of a nodule >= 3 mm; {} for a smaller one."""
    outlines = {}
    for roi in nodule.findall("{*}roi"):
        points = [(int(edge.findtext("{*}xCoord")), int(edge.findtext("{*}yCoord")))
                  for edge in roi.findall("{*}edgeMap")]
        part = {"TRUE": True, "FALSE": False}[roi.findtext("{*}inclusion").strip().upper()]
        if len(points) > 1:
            outlines.setdefault(roi.findtext("{*}imageSOP_UID").strip(), []).append((part, points))
    return outlines


def _fill(points: list[tuple[int, int]], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The closed polygon of `points` (x, y): pixel centres inside it and on it, both (H, W) bool.

    Exact. A centre is inside if the ray to its right crosses the polygon an odd number of times.
    """
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


class _Nodule(NamedTuple):
    """What one reader drew of one lesion."""

    reader: int
    pixels: dict[float, np.ndarray]  # z in mm: (P, 2) rows and columns

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest (z, row, column)."""
        ends = [(z, *end) for z, at in self.pixels.items() for end in (at.min(0), at.max(0))]
        return np.min(ends, 0), np.max(ends, 0)


def _nodule(reader: int, outlines: dict[str, list], slices: dict[str, CTSlice]) -> _Nodule:
    """The masks of a nodule in those of its slices that there are."""
    pixels = {}
    for uid in outlines.keys() & slices.keys():
        mask, hole = np.zeros((2, *slices[uid].shape), bool)
        for part, points in outlines[uid]:
            inside, outline = _fill(points, slices[uid].shape)
            if part:
                mask |= inside
            else:
                hole |= inside | outline
        drawn = np.argwhere(mask & ~hole)
        if len(drawn):
            pixels[slices[uid].z] = np.concatenate([drawn, pixels.get(slices[uid].z, drawn[:0])])
    return _Nodule(reader, pixels)


def _lesions(nodules: list[_Nodule]) -> list[list[_Nodule]]:
    """Nodules of different readers are one lesion where their tightest boxes overlap."""
    boxes, lesion = [nodule.box() for nodule in nodules], list(range(len(nodules)))
    for i, j in itertools.combinations(range(len(nodules)), 2):
        overlap = np.maximum(boxes[i][0], boxes[j][0]) <= np.minimum(boxes[i][1], boxes[j][1])
        if nodules[i].reader != nodules[j].reader and overlap.all():
            lesion = [lesion[i] if number == lesion[j] else number for number in lesion]
    return [[nodule for nodule, number in zip(nodules, lesion) if number == wanted]
            for wanted in dict.fromkeys(lesion)]


def _crop_lines(lesion: list[_Nodule], spacing: Sequence[float], size: int) -> list[np.ndarray]:
    """Where the crop's rows and columns lie in the slice: two (size,), in pixels of the slice."""
    lows, highs = zip(*[nodule.box() for nodule in lesion])
    lines = []
    for low, high, mm in zip(np.min(lows, 0)[1:], np.max(highs, 0)[1:], spacing):
        step = LIDC_PIXEL / mm
        middle = math.floor((low + high + 1) / 2 / step)  # pixel k covers k to k + 1 steps
        lines.append((middle - size // 2 + np.arange(size) + 0.5) * step - 0.5)
    return lines


def _crop(image: np.ndarray, lines: list[np.ndarray], outside: float, linear: bool) -> np.ndarray:
    """`image` (H, W) at the crossings of `lines`, to the nearest pixel or linear between pixels."""
    there = [(line >= -0.5) & (line < length - 0.5) for line, length in zip(lines, image.shape)]
    for axis, line in enumerate(lines):
        last = image.shape[axis] - 1
        if linear:
            low = np.floor(line.clip(0, last)).astype(int)
            share = np.expand_dims(line.clip(0, last) - low, 1 - axis).astype(image.dtype)
            image = (image.take(low, axis) * (1 - share)
                     + image.take((low + 1).clip(max=last), axis) * share)
        else:
            image = image.take(np.rint(line).astype(int).clip(0, last), axis)
    return np.where(np.outer(*there), image, outside).astype(image.dtype)


class _Series(NamedTuple):
    """A scan to be cut."""

    uid: str
    patient: str
    reading: str  # XML file
    files: dict[str, list[str]]  # outlined slice UID: its DICOM files, more than one if copied


def _cut(task: _Series, size: int, window: tuple[float, float], read: Callable):
    """One series -> arrays of its n cases and `dropped`, the number of outlined slices left out."""
    sessions = _reading(Path(task.reading).read_bytes())[1]
    if len(sessions) > LIDC_READERS:
        raise DataError(f"{task.reading} has {len(sessions)} readingSessions; a scan has "
                        f"{LIDC_READERS} readers")
    outlined = {uid for nodules in sessions for nodule in nodules for uid in nodule}
    slices = {uid: read(files[0]) for uid, files in sorted(task.files.items())}
    slices = {uid: found._replace(z=round(found.z, 3)) for uid, found in slices.items()
              if _agrees(found)}
    if outlined and not slices:
        raise DataError("its outlined slices are not there, or in all of them SliceLocation and "
                        "ImagePositionPatient disagree")
    if len({(found.shape, found.spacing) for found in slices.values()}) > 1:
        raise DataError("its slices differ in size or PixelSpacing")

    nodules = [_nodule(reader, nodule, slices)
               for reader, drawn in enumerate(sessions) for nodule in drawn]
    lesions = _lesions([nodule for nodule in nodules if nodule.pixels])
    lines = [_crop_lines(lesion, next(iter(slices.values())).spacing, size) for lesion in lesions]
    images, labels, where = [], [], []
    for z in sorted({z for nodule in nodules for z in nodule.pixels}):
        hu = _pixels([file for uid, found in slices.items() if found.z == z
                      for file in task.files[uid]], read)
        for number, lesion in enumerate(lesions):
            masks = _masks(lesion, z, hu.shape, lines[number])
            if masks.any():
                masks[len(sessions):] = IGNORE
                images.append(_grey(_crop(hu, lines[number], window[0], linear=True), window))
                labels.append(masks)
                where.append((z, number))
    count = len(where)
    return dict(images=np.array(images, np.uint8).reshape(count, size, size),
                labels=np.array(labels, np.uint8).reshape(count, LIDC_READERS, size, size),
                z=np.array([z for z, _ in where]), dropped=len(outlined - slices.keys()),
                lesion=np.array([number for _, number in where], int))


def _masks(lesion: list[_Nodule], z: float, shape, lines: list[np.ndarray]) -> np.ndarray:
    """The readers' crops of a lesion at z, (A, size, size); empty for those who drew nothing."""
    masks = np.zeros((LIDC_READERS, *map(len, lines)), np.uint8)
    for nodule in lesion:
        if z in nodule.pixels:
            mask = np.zeros(shape, np.uint8)
            mask[tuple(nodule.pixels[z].T)] = 1
            masks[nodule.reader] |= _crop(mask, lines, 0, linear=False)
    return masks


def _grey(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Hounsfield units -> uint8, the window's ends to 0 and 255."""
    share = (hu - window[0]) / (window[1] - window[0])
    return np.rint(255 * share.clip(0, 1)).astype(np.uint8)


def _agrees(found: CTSlice) -> bool:
    """Whether the slice's two places agree; DataError where it has no place or no scale."""
    if found.z is None or not math.isfinite(found.z):
        raise DataError(f"slice {found.uid} has no ImagePositionPatient")
    if len(found.spacing) != 2 or not all(0.1 <= mm <= 5 for mm in found.spacing):
        raise DataError(f"slice {found.uid} has the PixelSpacing {found.spacing}; two numbers of "
                        "0.1 to 5 mm can be")
    return found.location is None or abs(abs(found.location) - abs(found.z)) <= 0.01


def _pixels(files: list[str], read: Callable) -> np.ndarray:
    """The Hounsfield units at one place of the scan, in `files` that must not contradict."""
    first, *others = [read(file, pixels=True).hu for file in files]
    if first.ndim != 2 or not np.isfinite(first).all():
        raise DataError(f"{files[0]}: its pixels are {size_text(first.shape)}, or not all are finite")
    if not all(np.array_equal(first, other) for other in others):
        raise DataError(f"several slices at one place, and not the same: {', '.join(files)}")
    return first


def build_lidc(src, dst, *, size: int = 180, window: tuple[float, float] = LIDC_WINDOW, png=None,
               workers: int = 1, read: Callable = read_dicom) -> None:
    """LIDC-IDRI as the archive serves it, in `src` -> `dst`, an .npz for `load("lidc")`.

    Folders may nest in any way; a series and its XML are matched by their UIDs. `png` names a
    folder for the same crops as PNGs, in the layout of the HPU-Net release. `dst` and `png` appear
    whole or not at all. What is done is kept in `dst`.work, so a run that was stopped goes on
    there; it may be deleted once `dst` is there. A bad file or series is told and left out.

    `read` is what reads a file. Raises DataError for what the user can mend.
    """
    src, dst, png = Path(src), Path(dst), png and Path(png)
    if not src.is_dir() or dst.suffix != ".npz":
        raise DataError(f"{src} -> {dst}: give a folder, and a file name that ends in .npz")
    if size < 2 or not -math.inf < window[0] < window[1] < math.inf or workers < 1:
        raise DataError(f"size {size}, window {window}, {workers} workers: give at least 2 pixels, "
                        "a lower and a higher number of HU, and at least 1 worker")
    work, settings = dst.with_name(dst.name + ".work"), [str(src.resolve()), size, *window]
    report = work / "report.json"
    known = json.loads(report.read_text()) if report.exists() else {"settings": None}
    there = [place for place in (dst, png) if place and place.exists()]
    if there and known["settings"] != settings:
        raise DataError(f"{there[0]} is there, and not known to be built like this (from {src}, "
                        f"size {size}, window {window}): delete it, or give another name")
    if dst in there and (not png or png in there):
        print(*known["lines"], f"{dst} is there: nothing to do", sep="\n")
        return
    work.mkdir(parents=True, exist_ok=True)
    for folder, prefix in ((work, "."), (dst.parent, f".{dst.name}."),
                           *([(png.parent, f".{png.name}.")] if png else [])):
        _clear(folder, prefix)

    with _Workers(workers) as pool:
        refused, calls = [], []
        files = list(_walk(src, work, refused))
        for start in range(0, len(files), 256):
            stamps = [_stamp(file) for file in files[start:start + 256]]
            calls.append((stamps, work / f"files-{_key(stamps)}.json", read))
        refused += itertools.chain(*pool.each(_look, calls, "blocks of 256 files"))
        tasks, unmatched = _match([target for _, target, _ in calls])
        calls = []
        for task in tasks:
            stamps = [_stamp(file) for file in (task.reading, *sum(task.files.values(), []))]
            key = _key("cut-1", size, window, task, stamps)
            calls.append((task, work / f"series-{key}.npz", size, window, read))
        refused += [*unmatched, *filter(None, pool.each(_build_series, calls, "series"))]
    cases = _Cases([(task.patient, target) for task, target, *_ in calls if target.exists()])
    if not cases.names:
        raise DataError("; ".join([f"{src}: nothing to cut", *map(": ".join, refused[:3])]))
    made = [target.name for target in cases.targets]
    if there and known["made"] != made:
        raise DataError(f"{src} has changed since {there[0]} was built: delete it, or give another "
                        "name")

    lines = [f"refused: {name}: {reason}" for name, reason in sorted(refused)] + cases.table()
    lines = [line.encode(errors="backslashreplace").decode() for line in lines]  # odd file names
    content = json.dumps({"settings": settings, "made": made, "lines": lines})
    write_atomically(report, lambda name: Path(name).write_text(content))
    if png and not png.exists():
        cases.write_png(png)
    if not dst.exists():
        write_atomically(dst, cases.write_npz)
    print(*lines, f"wrote {dst}" + (f" and {png}" if png else ""), sep="\n")


def _clear(folder: Path, prefix: str) -> None:
    """Remove what a kill left half-written."""
    for half in folder.glob(".*.tmp"):
        if half.name.startswith(prefix):
            shutil.rmtree(half) if half.is_dir() else half.unlink()


def _walk(src: Path, work: Path, refused: list) -> Iterator[str]:
    """Every file under `src`, links followed, each folder once; nothing of `work`."""
    def refuse(error: OSError):
        refused.append((error.filename, error.strerror))

    seen = {(os.stat(work).st_dev, os.stat(work).st_ino)}
    for folder, folders, names in os.walk(src, onerror=refuse, followlinks=True):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders.sort()
        for file in sorted(os.path.join(folder, name) for name in names):
            if os.path.isfile(file):  # no pipe, no dead link
                yield file


def _stamp(file: str) -> tuple[str, int, int]:
    """What changes when a file does: name, bytes, time."""
    return file, os.stat(file).st_size, os.stat(file).st_mtime_ns


def _key(*parts) -> str:
    return hashlib.sha1(json.dumps(parts).encode()).hexdigest()[:16]


class _Workers:
    """Processes that share out calls; one worker is this process itself."""

    def __init__(self, count: int):
        self.pool = None if count == 1 else ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), _begin_worker)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def each(self, function: Callable, calls: list[tuple], what: str) -> Iterator:
        """The results of function(*call) as they come, with a progress line."""
        if not self.pool:
            results = (function(*call) for call in calls)
        else:
            futures = [self.pool.submit(function, *call) for call in calls]
            results = (future.result() for future in as_completed(futures))
        try:
            yield from _progress(results, len(calls), what)
        except BrokenProcessPool as error:
            raise DataError("a worker was killed, for want of memory perhaps: run it again, with "
                            "fewer --workers; what is done is kept") from error


def _begin_worker() -> None:
    """Leaves Ctrl-C to the parent and dies with it, however it dies; one thread a worker."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)


def _progress(results: Iterable, total: int, what: str) -> Iterator:
    """One updating line on a terminal, a plain line every ten seconds in a pipe."""
    start = shown = time.monotonic()
    terminal = sys.stdout.isatty()
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - shown > (0.2 if terminal else 10) or terminal and done == total:
            shown, left = now, (now - start) / done * (total - done)
            text = f"{done}/{total} {what}, {left // 60:.0f}m{left % 60:02.0f}s left"
            print("\r\x1b[K" * terminal + text, end="" if terminal and done < total else "\n",
                  flush=True)


def _look(stamps: list, target: Path, read: Callable) -> list[tuple[str, str]]:
    """What CT slices and readings are in these files, into `target`; the bad ones: (name, why)."""
    if target.exists() and not json.loads(target.read_text())["refused"]:
        return []
    slices, readings, refused = [], [], []
    for file, length, _ in stamps:
        try:
            if not file.lower().endswith(".xml"):
                found = read(file)
                if found is None and file.lower().endswith(".dcm"):
                    raise DataError("is no DICOM file")
                if found and found.modality == "CT":
                    slices.append((found.uid, found.series, found.patient, file))
            elif length > 2**26:
                raise DataError("is larger than any reading")
            elif reading := _reading(Path(file).read_bytes()):
                series, sessions = reading
                uids = {uid for drawn in sessions for nodule in drawn for uid in nodule}
                readings.append((series, file, _key(sessions), sorted(uids)))
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # damaged bytes can raise nearly anything
            refused.append((file, _reason(error)))
    content = json.dumps({"slices": slices, "readings": readings, "refused": refused})
    write_atomically(target, lambda name: Path(name).write_text(content))
    return refused


def _match(targets: list[Path]) -> tuple[list[_Series], list[tuple[str, str]]]:
    """The series to cut, each with its reading and the files of its outlined slices; what is left
    over, with the reason."""
    readings, series, refused, astray = {}, {}, [], []
    for target in targets:
        for uid, *reading in json.loads(target.read_text())["readings"]:
            readings.setdefault(uid, []).append(reading)
    for target in targets:
        for slice_uid, uid, patient, file in json.loads(target.read_text())["slices"]:
            files = series.setdefault(uid, (patient, {}))[1]
            if any(slice_uid in outlined for _, _, outlined in readings.get(uid, ())):
                files.setdefault(slice_uid, []).append(file)
    tasks = []
    for uid, several in readings.items():
        if len({drawn for _, drawn, _ in several}) > 1:
            # Of LIDC-IDRI-0101 the archive keeps the first reading beside the corrected one.
            fixed = [reading for reading in several if "correction" in Path(reading[0]).name]
            if len(fixed) != 1:
                names = ", ".join(file for file, *_ in several)
                refused.append((f"series {uid}", f"XML files that contradict each other: {names}"))
                series.pop(uid, None)
                continue
            several = fixed
        if uid not in series:
            astray.append(several[0][0])
            continue
        patient, files = series.pop(uid)
        # The name becomes that of a folder.
        tasks.append(_Series(uid, re.sub(r"[^\w-]+", "_", patient) or uid, several[0][0], files))
    if astray:
        refused.append((", ".join(astray[:3] + ["..."] * (len(astray) > 3)),
                        f"{len(astray)} XML files whose series is not here"))
    refused += [(f"series {uid} ({patient})", "no XML of its readers")
                for uid, (patient, _) in series.items()]
    return sorted(tasks, key=lambda task: (task.patient, task.uid)), refused


def _build_series(task: _Series, target: Path, size, window, read) -> tuple[str, str] | None:
    """`_cut` and the measures of its cases, into `target`; where it is bad, its name and why."""
    if target.exists():
        return None
    try:
        arrays = _cut(task, size, window, read)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        return f"series {task.uid} ({task.patient})", _reason(error)
    there = (arrays["labels"] != IGNORE).any((2, 3))
    odds = torch.from_numpy(there / there.sum(1, keepdims=True))
    measures = [measure_case(*case, 2) for case in zip(torch.from_numpy(arrays["labels"]), odds)]
    arrays |= {key: np.array([case[key] for case in measures]) for key in ("empty", "diversity")}

    def save(name):
        with open(name, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(target, save)
    return None


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DataError) else error_line(error)


class _Cases:
    """The cases of all series in one order. Pixels stay on disk; one series at a time is read."""

    def __init__(self, series: list[tuple[str, Path]]):
        self.targets = [target for _, target in series]
        self.groups, self.names, self.dropped = [], [], 0
        empty, diversity, lesions = [], [], Counter()
        for patient, target in series:
            with np.load(target) as arrays:
                # Some patients have two scans: their lesions are numbered on.
                self.names += [f"{patient}/z{z}_c{lesions[patient] + number}"
                               for z, number in zip(arrays["z"], arrays["lesion"])]
                self.groups += [patient] * len(arrays["z"])
                lesions[patient] += arrays["lesion"].max(initial=-1) + 1
                empty.append(arrays["empty"])
                diversity.append(arrays["diversity"])
                self.dropped += int(arrays["dropped"])
        self.empty, self.diversity = map(np.concatenate, (empty or [[]], diversity or [[]]))
        self.lesions = lesions
        self.split = split_groups(self.groups, val=0.2)

    def table(self) -> list[str]:
        """What the papers report of their sets."""
        lines = [f"{'':6}{'patients':>10}{'lesions':>9}{'slices':>8}{'empty masks':>13}"
                 f"{'diversity':>11}"]
        for part, rows in self.split.items():
            patients = {self.groups[i] for i in rows}
            if rows:
                lines.append(f"{part:6}{len(patients):10}{sum(map(self.lesions.get, patients)):9}"
                             f"{len(rows):8}{self.empty[rows].mean():13.1%}"
                             f"{self.diversity[rows].mean():11.3f}")
        return lines + [f"{self.dropped} outlined slices dropped: not there, or SliceLocation and "
                        "ImagePositionPatient disagree"]

    def write_npz(self, name) -> None:
        """images, labels, groups and names, as the reader of .npz files takes them."""
        with zipfile.ZipFile(name, "w") as archive:
            for key in ("images", "labels", "groups", "names"):
                blocks = self._blocks(key)
                first = next(blocks)
                header = {"descr": first.dtype.str, "fortran_order": False,
                          "shape": (len(self.names), *first.shape[1:])}
                # ZipInfo's fixed date: the same cases make the same file, bit for bit.
                entry = zipfile.ZipInfo(f"{key}.npy")
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_2_0(file, header)
                    for block in itertools.chain([first], blocks):
                        file.write(block.tobytes())

    def _blocks(self, key: str) -> Iterator[np.ndarray]:
        if key in ("groups", "names"):
            yield np.array(getattr(self, key))
            return
        for target in self.targets:
            with np.load(target) as arrays:
                yield arrays[key]

    def write_png(self, folder: Path) -> None:
        """{train,val,test}/images/<name>.png and gt/<name>_l<reader>.png, foreground 255."""
        half = folder.with_name(f".{folder.name}.half.tmp")
        part_of = {i: part for part, rows in self.split.items() for i in rows}
        pixels = [itertools.chain.from_iterable(self._blocks(key)) for key in ("images", "labels")]
        for i, (name, image, masks) in enumerate(zip(self.names, *pixels)):
            pictures = {f"images/{name}": image}
            pictures |= {f"gt/{name}_l{reader}": mask * np.uint8(255)
                         for reader, mask in enumerate(masks) if (mask != IGNORE).any()}
            for place, picture in pictures.items():
                file = half / part_of[i] / f"{place}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(file)
        half.rename(folder)
