"""Folders of pictures, NIfTI volumes and .npy arrays, found by path templates or by a table.

    image = "{group}/{nodule}/images/{name}.png"
    label = "{group}/{nodule}/mask-{annotator}/{name}.png"

A field in braces stands for text within one file's or folder's name. The image's fields, joined,
are the case's name; the label's template repeats them, so that every label finds its image. Some
fields have a meaning:

    {group}      the patient or scene, through which no split cuts; without it, the case itself
    {split}      train, val or test (training, validation and testing are the same)
    {annotator}  of labels: who drew the label map
    {class}      of labels: each class has a binary file; where these overlap, the last one wins

A template that ends in a field takes files of every ending that can be read (`files.ENDINGS`).
"""

import csv as tables
import functools
import glob
import re
import threading
from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from common import say
from sources.base import Case, Listing, check_known, warn
from sources.files import (ENDINGS, DataError, count_slices, holds, read_array, readable,
                           same_grid, size_text, standardised)


class Layout(NamedTuple):
    """A known tree of files, and what its masks mean: see `read_folder`."""

    image: str
    label: str
    masks: str = "classes"
    empty: str = "stored"


# In LIDC every annotator saw every scan, so an annotator without a mask of a nodule drew nothing.
PRESETS = {
    "folders": Layout("images/{name}", "labels/{annotator}/{name}"),
    "single": Layout("images/{name}", "labels/{name}"),
    "hpunet": Layout("{split}/images/{group}/{name}.png",
                     "{split}/gt/{group}/{name}_l{annotator}.png", "binary", "nothing"),
    "kaggle-lidc": Layout("{group}/{nodule}/images/{name}.png",
                          "{group}/{nodule}/mask-{annotator}/{name}.png", "binary", "nothing"),
    "qubiq": Layout("{name}/image.nii.gz", "{name}/task{class}_seg{annotator}.nii.gz"),
    "curvas": Layout("{name}/image.nii.gz", "{name}/annotation_{annotator}.nii.gz")}
MARKS = tuple(re.sub(r"{\w+}", "*", layout.image) for layout in PRESETS.values())
OF_WINDOWS = "Thumbs.db", "desktop.ini"  # which Windows puts into folders of images
ENDING = f"(?i:{'|'.join(map(re.escape, ENDINGS))})"
# The fields annotator and class match as little text as possible, other fields as much.
FORMS = {"annotator": "[^/]+?", "class": "[^/]+?",
         "split": "(?i:train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)"}
SPLIT = {"": "", "tra": "train", "val": "val", "tes": "test"}  # by its first letters


class Template:
    """A path with fields in braces, as a pattern for `glob` and as a regular expression."""

    def __init__(self, text: str):
        parts = re.split(r"{([a-zA-Z_]\w*)}", text)  # text, field, text, field, ..., text
        self.text, self.fields = text, list(dict.fromkeys(parts[1::2]))
        self.any_ending = text.endswith("}")
        if (not self.fields or re.search(r"[{}\0]", "".join(parts[::2])) or text.startswith("/")
                or ".." in text.split("/") or "}{" in text
                or not text.lower().endswith(("}", *ENDINGS))):
            raise DataError(f"template {text[:99]!r}: give a path below the folder with fields in "
                            f"braces, with text between them, such as images/{{name}}.png; it ends "
                            f"in a field or in one of {', '.join(ENDINGS)}")
        pattern = ""
        for i, part in enumerate(parts):
            if i % 2 == 0:
                pattern += re.escape(part)
            elif part in parts[1:i:2]:  # a field that comes again has the same value
                pattern += f"(?P={part})"
            else:
                pattern += f"(?P<{part}>{FORMS.get(part, '[^/]+')})"
        self.pattern = re.compile(pattern + ENDING * self.any_ending)
        self.glob = "".join("*" if i % 2 else glob.escape(part) for i, part in enumerate(parts))

    def fits(self, root: Path) -> bool:
        """Tells whether any file below `root` has this form."""
        return any(map(self.pattern.fullmatch, glob.iglob(self.glob, root_dir=root)))

    def find(self, root: Path) -> dict[tuple[str, ...], Path]:
        """Finds {values of `fields`: file} of all files of this form, in alphabetical order."""
        found: dict[tuple[str, ...], Path] = {}
        for name in sorted(glob.glob(self.glob, root_dir=root)):
            file = root / name
            if match := self.pattern.fullmatch(name):
                other = found.setdefault(match.groups(), file)
                if other is not file:
                    raise DataError(f"{file}: {other.name} beside it has the same name; rename one")
            elif self.any_ending and not file.is_dir() and file.name not in OF_WINDOWS:
                raise DataError(f"{file}: not one of {', '.join(ENDINGS)}; convert or remove it")
        return found

    def explain(self, root: Path) -> str:
        """Says why nothing was found: the first path that was tried, and what is there."""
        here, globs = root, self.glob.split("/")
        for depth in range(1, len(globs)):
            below = sorted(glob.glob("/".join(globs[:depth]) + "/", root_dir=root))
            if not below:
                break
            here = root / below[0]
        part = self.text.split("/")[len(here.relative_to(root).parts)]
        return f"{root}: {self.text} matches nothing: tried {here / part}, and {holds(here)}"


class Row(NamedTuple):
    """A case that was found: its files, and what its path or the table says of it."""

    name: str
    group: str
    split: str
    image: Path
    labels: dict[str, dict[str, Path]]  # {annotator: {class: file}}; the class may be ""


def read_folder(path: Path, *, layout: str = "", image: str = "", label: str = "", csv: str = "",
                num_classes: int = 0,
                masks: Literal["auto", "classes", "binary"] = "auto",
                empty: Literal["auto", "stored", "nothing", "missing"] = "auto",
                slices: Literal["none", "axial"] = "none") -> Listing:
    """Lists the cases in a folder of any layout. sources/README.md explains the options, which are
    a layout of `PRESETS`, or two path templates, or a table, and what masks and empty masks mean.

    Without these, the first layout that fits the folder is taken. "auto" is what the layout says;
    for templates and tables, "classes" and "stored". Annotators are numbered in the order of their
    names, 2 before 10. Raises DataError in one line that names the path that was tried.
    """
    if csv and (layout or image or label):
        raise DataError(f"{path}: give csv= alone, without layout=, image= and label=")
    if csv:
        kind, chosen = "a table", Layout(f"{csv}:image", f"{csv}:label_{{annotator}}")
        rows = _rows_of_table(path, path / csv)
    else:
        kind, chosen = _choose(path, layout, image, label)
        rows = _rows_of_templates(path, Template(chosen.image), Template(chosen.label))
    groups = {row.name: row.group for row in rows}
    if (path / "groups.csv").exists() and all(row.group == row.name for row in rows):
        groups = _read_groups(path / "groups.csv", groups.keys())

    masks = chosen.masks if masks == "auto" else masks
    empty = chosen.empty if empty == "auto" else empty
    annotators = sorted({name for row in rows for name in row.labels}, key=_natural)
    classes = sorted({name for row in rows for files in row.labels.values() for name in files},
                     key=_natural)
    if len(classes) > 254:
        raise DataError(f"{path}: {len(classes)} values of {{class}}, such as {classes[0]!r}; 254 "
                        "are allowed")
    partly = [f"{row.name!r} by {name!r}" for row in rows for name, files in row.labels.items()
              if len(files) < len(classes)]
    if partly and empty != "nothing":
        warn(f"{path}: {len(partly)} label maps have files of some of the classes "
             f"{', '.join(classes)} only ({partly[0]}); where a file is missing, nothing is taken "
             "to be drawn")
    who = f"annotators {', '.join(annotators)}" if all(annotators) else "one annotator"
    ungrouped = all(name == group for name, group in groups.items())
    of = ("without groups: each counts as a patient of its own" if ungrouped
          else f"of {len(set(groups.values()))} groups (patients)")
    _say_once(f"{path}: read as {kind}: image={chosen.image} label={chosen.label}, {who}, "
              f"{len(rows)} images {of}")
    cases = []
    for row in rows:
        labels = {annotators.index(name): sorted((1 + classes.index(c), file)
                                                 for c, file in files.items())
                  for name, files in row.labels.items()}
        read = partial(read_case, row.image, labels, annotators=range(len(annotators)), empty=empty,
                       paint=masks == "binary" or any(classes), slices=slices)
        group, split = groups[row.name], SPLIT[row.split.lower()[:3]]
        if slices == "none":
            cases.append(Case(row.name, group, read, split))
        else:
            volume = Volume(read, count_slices(row.image))
            cases += [Case(f"{row.name}/z{z:04d}", group, partial(volume.slice, z), split)
                      for z in range(volume.left)]
    own = any(case.split for case in cases)
    return Listing(cases, num_classes, apart=own and num_classes > 0,
                   if_empty=f"nothing is at {chosen.image}" if own else "",
                   annotators=annotators if all(annotators) else ())


@functools.cache
def _say_once(text: str) -> None:
    """A set is read again for its test split, or where it has not all splits."""
    say(text)


def _choose(root: Path, name: str, image: str, label: str) -> tuple[str, Layout]:
    """Returns the layout that was asked for, or the one that the folder looks like, by its name."""
    if bool(image) != bool(label) or name and image:
        raise DataError(f"{root}: give two templates, image= and label=, or one layout=")
    if image:
        return "templates", Layout(image, label)
    if not name:
        like = [name for name, layout in PRESETS.items() if Template(layout.image).fits(root)]
        if not like:
            raise DataError(f"{root}: no images/NAME.png or other layout ({', '.join(PRESETS)}) is "
                            f"in it, {holds(root)}; give another --path, or --data-args with two "
                            "templates image= and label=, or csv=")
        with_labels = [name for name in like if Template(PRESETS[name].label).fits(root)]
        name = (with_labels or like)[0]
    return name, PRESETS[check_known("layout", name, PRESETS)]


def _rows_of_templates(root: Path, image: Template, label: Template) -> list[Row]:
    """Finds the cases that two templates describe."""
    own = {"annotator", "class"}
    if own & set(image.fields) or set(label.fields) - own != set(image.fields):
        raise DataError(f"{root}: image={image.text} label={label.text}: both need the same "
                        "fields, and the label may have {annotator} and {class} besides")
    images, labels = image.find(root), label.find(root)
    for template, found in ((image, images), (label, labels)):
        if not found:
            raise DataError(template.explain(root))
    drawn = {values: {} for values in images}  # {values: {annotator: {class: file}}}
    for values, file in labels.items():
        fields = dict(zip(label.fields, values))
        key = tuple(fields[field] for field in image.fields)
        if key not in drawn:
            tried = root / image.text.format(**fields)
            raise DataError(f"{file}: there is no image {tried} for it: {holds(tried.parent)}")
        files = drawn[key].setdefault(fields.get("annotator", ""), {})
        files[fields.get("class", "")] = file
    rows = []
    for values, file in images.items():
        name, fields = "/".join(values), dict(zip(image.fields, values))
        group, split = fields.get("group", name), fields.get("split", "")
        rows.append(Row(name, group, split, file, drawn[values]))
    return rows


def _rows_of_table(root: Path, file: Path) -> list[Row]:
    """Reads the cases that a table lists."""
    with readable(file, "table (CSV)"), open(file, newline="", encoding="utf-8-sig") as text:
        table = tables.DictReader(text)
        columns, lines = table.fieldnames or [], list(table)
    labels = [column for column in columns if re.fullmatch("label(_.+)?", column)]
    if "image" not in columns or not labels:
        raise DataError(f"{file}: has the columns {', '.join(columns[:20]) or '(none)'}; image, "
                        "and label or label_<annotator>, are needed")
    for column in ("image", "group", "split", "name", *labels):
        if columns.count(column) > 1:  # DictReader keeps the last one alone
            raise DataError(f"{file}: has {columns.count(column)} columns {column}; rename or "
                            "remove all but one")
    if "label" in labels and len(labels) > 1:
        raise DataError(f"{file}: has the columns {', '.join(labels[:20])}; give label alone, or "
                        "label_<annotator> for each annotator")
    if not lines:
        raise DataError(f"{file}: lists no images; add a line for each below the heading")
    rows = []
    for line in lines:
        image, split = line["image"], line.get("split") or ""
        if not image or split and not re.fullmatch(FORMS["split"], split):
            raise DataError(f"{file}: row {len(rows) + 1}: give an image, and as its split train, "
                            f"val or test, not {split!r}")
        name = line.get("name") or re.sub(f"{ENDING}$", "", image)
        drawn = {column: line[column] for column in labels if line[column]}
        for column, text in drawn.items():
            if not text.lower().endswith(ENDINGS):
                raise DataError(f"{file}: row {len(rows) + 1}: {column} is {text[:99]!r}; give a "
                                f"mask's file, which ends in one of {', '.join(ENDINGS)}, or leave "
                                "it empty where there is none")
        files = {column[6:]: {"": root / text} for column, text in drawn.items()}
        rows.append(Row(name, line.get("group") or name, split, root / image, files))
    if 0 < (without := sum(not row.split for row in rows)) < len(rows):
        raise DataError(f"{file}: {without} of {len(rows)} rows have no split; give all rows one, "
                        "or none")
    return rows


def _read_groups(file: Path, names: Set[str]) -> dict[str, str]:
    """Reads {name: group} from the table `file`, which has to list every image."""
    with readable(file, "table of lines name,group"):
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        rows = [[cell.strip() for cell in row] for row in tables.reader(filter(str.strip, lines))]
    if rows[:1] == [["name", "group"]]:
        del rows[0]
    if odd := [row for row in rows if len(row) != 2 or not all(row)]:
        raise DataError(f"{file}: {','.join(odd[0])!r} is not a line name,group; give both, and "
                        "for an image without a patient its own name as the group")
    listed = [re.sub(f"{ENDING}$", "", name) for name, _ in rows]
    if odd := sorted({*listed} ^ names) or [name for name in listed if listed.count(name) > 1]:
        fault = "there is no image of" if odd[0] not in names else (
            "lists more than once:" if odd[0] in listed else "does not list")
        raise DataError(f"{file}: {fault} {odd[0]!r}; list every image once, as name,group, "
                        "without a heading or with the heading name,group")
    return {name: group for name, (_, group) in zip(listed, rows)}


def _natural(name: str) -> str:
    """Returns a key by which the numbers in names are sorted by their value."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name)


def read_case(image: Path, labels: dict[int, list[tuple[int, Path]]], *, annotators: Sequence[int],
              paint: bool, empty: str, slices: str) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Reads a case of a folder, as `Case.read` does, from {annotator: [(class, file)]}. `paint`
    tells whether all that is not 0 in a file is of its class; the rest is as in `read_folder`."""
    dims = 3 if slices == "axial" else None
    array, grid = read_array(image, dims=dims)
    if not labels:
        raise DataError(f"{image}: no mask of any annotator has its name; add one, or leave the "
                        "image out")
    maps: dict[int, np.ndarray] = {}
    for annotator, files in labels.items():
        for value, file in files:
            mask, other = read_array(file, label=True, dims=dims)
            flat_masks = grid and slices == "none" and mask.ndim == 2
            if flat_masks and array.shape[0] == 1 and array.ndim == 4 and array.shape[1] <= 4:
                # QUBIQ's brain tumours: a slice whose channels are stored along z.
                array = standardised(array[0], np.ones(array.shape[2:], bool))
            if mask.shape != array.shape[-mask.ndim:]:
                raise DataError(f"{file} is {size_text(mask.shape)} and {image} "
                                f"{size_text(array.shape[-mask.ndim:])}; they must be of one size")
            if grid and other:
                same_grid(grid, other, file)
            maps[annotator] = mask if not paint else np.where(
                marked(mask, file), np.uint8(value), maps.get(annotator, np.uint8(0)))
    if maps and array.ndim == mask.ndim:  # an .npy without channels
        array = array[None]
    if empty == "missing":
        maps = {annotator: mask for annotator, mask in maps.items() if mask.any()}
    if maps and empty == "nothing":
        maps = {annotator: np.zeros_like(mask) for annotator in annotators} | maps
    return array, maps


def marked(mask: np.ndarray, file: Path) -> np.ndarray:
    """Returns where a binary mask (*S) is not 0. Raises DataError unless it holds finite numbers:
    NaN and the text "0" differ from 0 as well."""
    if mask.dtype.kind not in "buif" or not np.isfinite(mask).all():
        raise DataError(f"{file}: a black-and-white mask of {mask.dtype}, or some pixels are NaN "
                        "or infinite; give 0 for background and other numbers for foreground")
    return mask != 0


class Volume:
    """A volume that is read once for all its slices, and freed with the last of them."""

    def __init__(self, read, left: int):
        self.read, self.left, self.kept, self.lock = read, left, None, threading.Lock()

    def slice(self, z: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Returns slice z, as `Case.read` does."""
        with self.lock:
            self.kept = array, maps = self.kept or self.read()
            self.left -= 1
            self.kept = self.kept if self.left else None
        return array[:, z], {annotator: mask[z] for annotator, mask in maps.items()}
