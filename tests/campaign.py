"""A campaign against the codebase: damaged inputs, kills and full disks.

    python tests/campaign.py inputs --count 10000      # mutated files and command lines
    python tests/campaign.py kills --count 350         # SIGKILL and SIGTERM at random moments
    python tests/campaign.py disk                      # a disk that fills up at a checkpoint

Whatever a user may hand over or live through has to end well: a result, or one line that says what
is wrong. A case fails if it ends in a traceback, a crash of the interpreter, more than one line,
more than 20 seconds or more than 4 GB, if damaged bytes of a checkpoint are loaded as other
weights, or if a file appears outside of the case's own folder.

Inputs run in worker processes that have imported everything once, as an unprivileged user when this
script is started by root. Case number i is a function of i alone, so `--only i` repeats it.
"""

import argparse
import codecs
import contextlib
import gzip
import importlib.util
import io
import json
import os
import pickle
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest.mock
import zipfile
from collections import Counter
from pathlib import Path

import matplotlib

codecs.lookup("latin1")  # the unprivileged user may not be able to read the standard library
ROOT = Path(__file__).resolve().parents[1]
SECONDS, GIGABYTES = 20, 4  # a case may take at most
NOBODY = 65534

# ---- damage --------------------------------------------------------------------------------------

EXTREMES = [b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"]
VALUES = [None, [], {}, "", "x", -1, 0, 2, 2**31, 2**63, 10**30, 1e300, float("nan"), float("inf"),
          True, "x" * 10_000, [[[[1]]]], {"a": {"b": 1}}, "../../x", "\udcff", "\x00", [1, "a"]]


def damaged(rng, content: bytes) -> bytes:
    """The bytes after one to four random injuries."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(content) + 1), rng.choice([1, 2, 8, 64])
        kind = rng.randrange(7)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = rng.randbytes(length)
        elif kind == 4:
            content[at:at] = content[at : at + length]
        elif kind == 5:
            content[at : at + 4] = rng.choice(EXTREMES)
        else:
            content[at : at + length] = rng.randbytes(length)
    return bytes(content)


def damaged_zip(rng, content: bytes) -> bytes:
    """A zip file whose checksums are right although one member's bytes are damaged."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    if rng.random() < 0.1:
        del members[name]
    else:
        members[name] = damaged(rng, members[name])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def damaged_value(rng, value):
    """A JSON value with one place replaced, removed or doubled."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        value = value.copy()
        key = rng.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = damaged_value(rng, value[key])
        return value
    return rng.choice(VALUES)


def damage_file(rng, path: Path) -> None:
    """Damage a file in the way that hurts its format most, or its bytes."""
    content, plainly = path.read_bytes(), rng.random() < 0.4
    if path.suffix in (".npz", ".pt") and not plainly:
        content = damaged_zip(rng, content)
    elif path.suffix == ".gz" and not plainly:
        content = gzip.compress(damaged(rng, gzip.decompress(content)))
    elif path.suffix == ".json" and not plainly:
        content = json.dumps(damaged_value(rng, json.loads(content))).encode()
    elif path.suffix == ".jsonl" and not plainly:
        lines = [json.loads(line) for line in content.splitlines()]
        lines = damaged_value(rng, lines)
        lines = lines if isinstance(lines, list) else [lines]
        content = "\n".join(map(json.dumps, lines)).encode()
    else:
        content = damaged(rng, content)
    path.write_bytes(content)


# ---- what is damaged, and what then reads it -----------------------------------------------------
# A kind has `make(folder)`, called once a worker, and `run(rng, folder)` on a fresh copy of that
# folder. It returns the exit status of a command line, or None.


def arrays():
    """Twelve small images with three annotators, as numpy arrays."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = rng.random((12, 16, 16), dtype=np.float32)
    labels = (rng.random((12, 3, 16, 16)) > 0.5).astype(np.uint8)
    return images, labels


def make_pickle(folder):
    """The layout of the LIDC pickle."""
    images, labels = arrays()
    table = {f"case{i}": {"image": images[i].astype(float), "masks": list(labels[i]),
                          "series_uid": f"uid{i}"} for i in range(12)}
    for protocol in range(6):
        (folder / f"{protocol}.pickle").write_bytes(pickle.dumps(table, protocol))


def run_pickle(rng, folder):
    """`data.load` of a damaged pickle, or of one with odd values in it."""
    import data

    path = folder / f"{rng.randrange(6)}.pickle"
    if rng.random() < 0.3:
        table = pickle.loads(path.read_bytes())
        case = rng.choice(sorted(table))
        table[case][rng.choice(["image", "masks", "series_uid"])] = odd_array(rng)
        path.write_bytes(pickle.dumps(table, rng.randrange(6)))
    else:
        damage_file(rng, path)
    data.load("lidc", "all", path)


def odd_array(rng):
    """What may stand where an array should, in a pickle or an .npz."""
    import numpy as np

    return rng.choice([
        np.zeros((0,)), np.zeros((16, 16), bool), np.zeros((16, 16), complex), np.array("text"),
        np.full((16, 16), np.nan), np.full((16, 16), 1e38), np.zeros((3, 16, 16)), np.array(3.0),
        np.zeros((16, 16), "datetime64[s]"), np.zeros((1, 1)), np.full((16, 16), 254, np.uint8),
        np.array([b"bytes"]), np.array(np.inf), np.full((3, 16, 16), -1), [1, 2], "text", 5])


def make_npz(folder):
    """A user's own .npz, an .npz of instances, and a Synapse slice's layout."""
    import numpy as np

    images, labels = arrays()
    np.savez(folder / "own.npz", images=images, labels=labels, num_classes=2,
             groups=[f"p{i // 2}" for i in range(12)], names=[f"n{i}" for i in range(12)],
             weights=np.full((12, 3), 1 / 3))
    np.savez_compressed(folder / "em.npz", images=(images * 255).astype(np.uint8),
                        instances=labels[:, 0].astype(np.uint16) * np.arange(12)[:, None, None])


def run_npz(rng, folder):
    """`data.load` of a damaged .npz, or of one with an odd array in it."""
    import numpy as np

    import data

    name = rng.choice(["own", "em"])
    path = folder / f"{name}.npz"
    if rng.random() < 0.4:
        with np.load(path) as file:
            content = dict(file)
        odd = odd_array(rng)
        content[rng.choice([*content, "other"])] = np.asarray(odd)
        np.savez(path, **content)
    else:
        damage_file(rng, path)
    options = {"tile": 0} if name == "em" else {}
    data.load("em" if name == "em" else "npz", "all", path, **options)


def make_folder(folder):
    """Pictures: images/NAME.* and labels/ANNOTATOR/NAME.*, tables of groups and of files, a split
    file; and .npy."""
    import numpy as np
    from PIL import Image

    images, labels = arrays()
    for name in ("images", "labels/a", "labels/b"):
        (folder / name).mkdir(parents=True)
    for i in range(6):
        end = ".png" if i % 2 else ".tif"
        Image.fromarray((images[i] * 255).astype("uint8")).save(folder / f"images/n{i}{end}")
        for a, annotator in enumerate("ab"):
            Image.fromarray(labels[i, a]).save(folder / f"labels/{annotator}/n{i}{end}")
        for place, array in (("scan", images[i]), ("by-a", labels[i, 0]), ("by-b", labels[i, 1])):
            (folder / f"p{i}" / place).mkdir(parents=True)
            np.save(folder / f"p{i}" / place / "x.npy", array)
    (folder / "groups.csv").write_text("".join(f"n{i},p{i}\n" for i in range(6)))
    (folder / "cases.csv").write_text("image,label_a,label_b,group,split\n" + "".join(
        f"images/n{i}{'.png' if i % 2 else '.tif'},p{i}/by-a/x.npy,p{i}/by-b/x.npy,p{i},"
        f"{('train', 'val', 'test')[i % 3]}\n" for i in range(6)))
    (folder / "split.json").write_text(json.dumps(
        {"train": ["n0", "n1"], "val": ["n2", "n3"], "test": ["n4", "n5"]}))


def run_folder(rng, folder):
    """`data.load` of a folder in which one file is damaged, odd or missing."""
    from PIL import Image

    import data

    files = sorted(f for f in folder.rglob("*") if f.is_file())
    file = rng.choice(files)
    kind = rng.random()
    if kind < 0.1 and file.suffix in (".png", ".tif"):
        mode = rng.choice(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK"])
        mode = "L" if file.suffix == ".png" and mode in ("I", "F", "CMYK") else mode
        Image.new(mode, rng.choice([(16, 16), (1, 1), (16, 5), (3000, 2)])).save(file)
    elif kind < 0.15:
        file.unlink()
        if rng.random() < 0.5:
            os.mkfifo(file)
    elif kind < 0.2:
        name = rng.choice(["x", "é😀", "a b", ".hidden", "n0.PNG"])
        file.rename(file.with_name(name + file.suffix))
    else:
        damage_file(rng, file)
    options = rng.choice([{}, {}, {"csv": "cases.csv"}, dict(
        image="{group}/scan/{name}.npy", label="{group}/by-{annotator}/{name}.npy"), dict(
        image=rng.choice(TEXTS), label=rng.choice(TEXTS)), {"layout": rng.choice(TEXTS)}])
    if rng.random() < 0.4 and not options:
        options = {"split_file": str(folder / "split.json")}
    data.load("folder", rng.choice(["all", "train"]), folder, **options)


def make_nifti(folder):
    """Volumes as NIfTI, plain and compressed."""
    import nibabel
    import numpy as np

    images, labels = arrays()
    for name in ("images", "labels/a"):
        (folder / name).mkdir(parents=True)
    for i, axes in enumerate([(1, 1, 1), (-1, 1, 1), (-1, -1, 1), (1, 1, -1)]):
        affine = np.diag([*axes, 1.0])
        for place, array in (("images", images[:4]), ("labels/a", labels[:4, 0])):
            nibabel.save(nibabel.Nifti1Image(array, affine), folder / place / f"n{i}.nii.gz")


def run_nifti(rng, folder):
    """`data.load` of a folder of volumes, one of them damaged."""
    import data

    damage_file(rng, rng.choice(sorted(folder.rglob("*.nii.gz"))))
    data.load("folder", "all", folder)


def make_hdf5(folder):
    """HDF5 made from the LIDC pickle."""
    import h5py

    images, labels = arrays()
    with h5py.File(folder / "lidc.h5", "w") as file:
        for split in ("train", "val", "test"):
            file[f"{split}/images"], file[f"{split}/labels"] = images, labels
            file[f"{split}/uids"] = [f"{split}{i}".encode() for i in range(12)]


def run_hdf5(rng, folder):
    """`data.load` of a damaged HDF5 file."""
    import data

    damage_file(rng, folder / "lidc.h5")
    data.load("lidc", "all", folder / "lidc.h5")


XML = """<?xml version="1.0"?><LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader>
<SeriesInstanceUid>1.2</SeriesInstanceUid></ResponseHeader>{}</LidcReadMessage>"""
SESSION = """<readingSession><unblindedReadNodule><noduleID>n</noduleID><roi>
<imageZposition>0.0</imageZposition><imageSOP_UID>1.2.0</imageSOP_UID><inclusion>TRUE</inclusion>
{}</roi></unblindedReadNodule></readingSession>"""
EDGES = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>"
                for x, y in [(4, 4), (9, 4), (9, 9), (4, 9), (4, 4)])


def make_archive(folder):
    """One CT series of the archive: three slices and four readings."""
    import numpy as np
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    (folder / "src").mkdir()
    for z in range(3):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID = f"1.2.{z}"
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, f"1.2.{z}"
        file.SeriesInstanceUID, file.PatientID, file.Modality = "1.2", "LIDC-IDRI-0001", "CT"
        file.Rows = file.Columns = 16
        file.PixelSpacing, file.ImagePositionPatient = [0.7, 0.7], [0, 0, z]
        file.SliceLocation, file.RescaleSlope, file.RescaleIntercept = z, 1, -1000
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
        file.PixelData = np.full((16, 16), 1000, np.uint16).tobytes()
        file.save_as(folder / "src" / f"{z}.dcm", enforce_file_format=True)
    (folder / "src" / "reading.xml").write_text(XML.format(SESSION.format(EDGES) * 4))


def run_archive(rng, folder):
    """`data.py build-lidc` of an archive with one damaged file."""
    import data

    damage_file(rng, rng.choice(sorted((folder / "src").iterdir())))
    return data.main(["build-lidc", str(folder / "src"), str(folder / "out.npz"), "--size", "16",
                      "--workers", "1"])


# A run that takes a second.
TINY = ["--model", "ssn", "--data", "shapes", "--data-args", "n=10", "size=32", "--quick",
        "--batch-size", "2", "--device", "cpu", "--model-args", "channels=(4,4)", "convs=1",
        "mc_samples=2", "rank=1"]


def make_run(folder):
    """Two finished runs of a few steps, and pictures to predict."""
    import numpy as np
    from PIL import Image

    import train

    with unittest.mock.patch("matplotlib.figure.Figure.savefig"):  # most of the time, else
        for name in ("run", "other"):
            train.main([*TINY, "--steps", "2", "--out", str(folder / name)])
    pixels = np.random.default_rng(0).random((16, 16))
    Image.fromarray((pixels * 255).astype("uint8")).save(folder / "a.png")
    Image.fromarray(pixels.astype("float32")).save(folder / "b.tif")


def run_checkpoint(rng, folder):
    """`models.load` of a checkpoint with damaged bytes: refused, or the very same weights; of one
    with damaged contents and right checksums: refused, or any weights."""
    import torch

    import models

    path = folder / "run" / "best.pt"
    before = models.load(path).state_dict()
    if rng.random() < 0.5:
        damage_file(rng, path)
        models.load(path)
        return
    path.write_bytes(damaged(rng, path.read_bytes()))
    after = models.load(path).state_dict()
    same = before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before)
    assert same, "a damaged checkpoint was loaded with other weights"


def run_resume(rng, folder):
    """`train.py --resume` of a run in which one file is damaged."""
    import train

    names = ["last.pt", "config.json", "log.jsonl", "split.json", "best.pt"]
    damage_file(rng, folder / "run" / rng.choice(names))
    return train.main(["--resume", str(folder / "run"), "--steps", "3", "--device", "cpu"])


def run_compare(rng, folder):
    """`evaluate.py --compare` of runs in which one file is damaged."""
    import evaluate

    damage_file(rng, folder / rng.choice(["run", "other"]) /
                rng.choice(["metrics.json", "per_case.csv", "config.json", "log.jsonl"]))
    return evaluate.main([str(folder / "run"), "--compare", str(folder / "other")])


def run_image(rng, folder):
    """`evaluate.py --image` of a damaged picture."""
    import evaluate

    path = folder / rng.choice(["a.png", "b.tif"])
    damage_file(rng, path)
    return evaluate.main([str(folder / "run"), "--image", str(path), "--samples", "2",
                          "--out", str(folder / "out"), "--device", "cpu"])


TEXTS = ["", "0", "-1", "1", "nan", "inf", "-inf", "1e999", "x", "../..", "\x00",
         "99999999999999999999", "[" * 3000, "1+" * 3000 + "1", "()", "(1,)", "('a',)", "None",
         "a=b", "é😀", "\udcff", "1,2", "cuda:9", "mps", "{}", "True", "1.5", "/dev/null",
         "x" * 5000]
TRAIN = ["--model", "--data", "--path", "--steps", "--batch-size", "--lr", "--seed", "--precision",
         "--image-size", "--annotators", "--model-args", "--data-args", "--out", "--resume",
         "--device", "--lr-drops"]
FIELDS = ["rank", "channels", "convs", "mc_samples", "num_classes", "dims", "in_channels", "n",
          "size", "seed", "name", "split", "path", "hide", "unknown", "latents", "deepmedic"]


def run_command(rng, folder):
    """A command line with a few odd values; the files it writes stay in the case's folder."""
    import data
    import evaluate
    import train

    def value():
        if rng.random() < 0.5:
            return rng.choice(TEXTS)
        return f"{rng.choice(FIELDS)}={rng.choice(TEXTS)}"

    program = rng.choice(["train", "train", "train", "evaluate", "data"])
    if program == "train":
        given = {"--model": "ssn", "--data": "toy1d", "--steps": "1", "--batch-size": "1",
                 "--device": "cpu", "--out": "new"}
        given |= {rng.choice(TRAIN): value() for _ in range(rng.randint(1, 3))}
        if given["--steps"] not in ("1",):
            given["--steps"] = rng.choice(["0", "-1", "x", "nan", "1.5"])
        return train.main([item for pair in given.items() for item in pair])
    if program == "evaluate":
        option = rng.choice(["--samples", "--split", "--cases", "--weights", "--cluster", "--image",
                             "--compare", "--path", "--out", "--device", "--ood-data",
                             "--likelihood-samples"])
        return evaluate.main([str(folder / rng.choice(["run", "none"])), option, value()])
    option = rng.choice(["--data", "--path", "--data-args", "--split", "--out"])
    given = {"--data": "toy1d", "--out": "show.png", option: value()}
    return data.main(["show", *(item for pair in given.items() for item in pair)])


KINDS = {  # name: (make, run, packages that it needs, share of the cases)
    "pickle": (make_pickle, run_pickle, (), 5), "npz": (make_npz, run_npz, (), 4),
    "folder": (make_folder, run_folder, (), 4), "nifti": (make_nifti, run_nifti, ("nibabel",), 2),
    "hdf5": (make_hdf5, run_hdf5, ("h5py",), 2),
    "archive": (make_archive, run_archive, ("pydicom",), 2),
    "checkpoint": (make_run, run_checkpoint, (), 3), "resume": (make_run, run_resume, (), 2),
    "compare": (make_run, run_compare, (), 1), "image": (make_run, run_image, (), 1),
    "command": (make_run, run_command, (), 2),
}


def available() -> list[str]:
    """The kinds whose packages are installed."""
    return [kind for kind, (_, _, packages, _) in KINDS.items()
            if all(importlib.util.find_spec(package) for package in packages)]


# ---- workers -------------------------------------------------------------------------------------


def judge(run, rng, folder) -> tuple[str, str]:
    """(outcome, detail) of one case: accepted, refused, or what is wrong with it."""
    from common import UserError

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(rng, folder)
    except UserError as error:
        lines = str(error).splitlines()
        return ("refused", "") if len(lines) == 1 else ("not one line", repr(str(error)))
    except SystemExit as error:  # argparse prints its usage and one line
        return ("refused", "") if error.code in (0, 2) else ("exit status", str(error.code))
    except BaseException as error:
        at = [frame for frame in traceback.extract_tb(error.__traceback__)
              if "site-packages" not in frame.filename]
        return "traceback", f"{type(error).__name__}: {error} at {at[-1].filename}:{at[-1].lineno}"
    if status in (None, 0):
        return "accepted", ""
    lines = [line for line in err.getvalue().splitlines() if line and "warning" not in line.lower()]
    if status in (2, 130) and len(lines) == 1:
        return "refused", ""
    return "not one line", f"status {status}: {lines}"


def work(folder: Path) -> None:
    """A worker: reads "kind number" from standard input, writes one line of JSON a case."""
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT))
    import torch

    import evaluate

    torch.set_num_threads(1)
    case = folder / "case"
    makers = {KINDS[kind][0] for kind in available()}
    with contextlib.redirect_stdout(io.StringIO()):
        for make in makers:
            (folder / "made" / make.__name__).mkdir(parents=True)
            make(folder / "made" / make.__name__)
    evaluate.report = lambda *args, **kwargs: {}  # a resumed run need not be judged each time
    # One case of every kind imports what is imported late: an unprivileged user may not be allowed
    # to read the folder that Python is installed in.
    for number, kind in enumerate(available()):
        fresh_copy(folder / "made" / KINDS[kind][0].__name__, case)
        judge(KINDS[kind][1], random.Random(number), case)
    if os.geteuid() == 0:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    resource.setrlimit(resource.RLIMIT_AS, (3 * GIGABYTES * 2**30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    present = set(os.listdir(folder))
    for line in sys.stdin:
        kind, number = line.split()
        make, run, _, _ = KINDS[kind]
        fresh_copy(folder / "made" / make.__name__, case)
        outcome, detail = judge(run, random.Random(f"{kind} {number}"), case)
        if set(os.listdir(folder)) != present:
            outcome, detail = "outside", f"{os.listdir(folder)}; {outcome} {detail}"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if peak > GIGABYTES:
            outcome, detail = "memory", f"{peak:.1f} GB; {outcome} {detail}"
        print(json.dumps([outcome, detail[:300]]), file=protocol, flush=True)
        if peak > GIGABYTES:
            return


def fresh_copy(made: Path, case: Path) -> None:
    """`case`, anew, with the files of `made`, as the working folder."""
    os.chdir(made)
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(made, case)
    os.chdir(case)


def inputs(count: int, kinds=None, workers: int = 2, only=None,
           quiet: bool = False) -> tuple[Counter, list[str]]:
    """Run `count` cases, or the one `only` = (kind, number): ({(kind, outcome): cases}, a line for
    every failure)."""
    kinds = [kind for kind in (kinds or available()) for _ in range(KINDS[kind][3])]
    cases = [only] if only else [(kinds[i % len(kinds)], i) for i in range(count)]
    jobs, done, failures = queue.Queue(), Counter(), []
    for case in cases:
        jobs.put(case)
    start = time.monotonic()

    def serve(index):
        worker = None
        while True:
            try:
                kind, number = jobs.get_nowait()
            except queue.Empty:
                break
            if worker is None:
                folder = Path(tempfile.mkdtemp(prefix="campaign-", dir=home))
                environment = os.environ | dict(HOME=str(folder), MPLCONFIGDIR=str(home / "mpl"),
                                                TMPDIR=str(home / "tmp"), OMP_NUM_THREADS="1",
                                                PYTHONDONTWRITEBYTECODE="1")
                worker = subprocess.Popen(
                    [sys.executable, __file__, "work", str(folder)], text=True, env=environment,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                fresh = True
            hung = threading.Event()
            limit = SECONDS + (120 if fresh else 0)  # the first case of a worker waits for imports
            timer = threading.Timer(limit, lambda: (hung.set(), worker.kill()))
            timer.start()
            try:
                print(kind, number, file=worker.stdin, flush=True)
                answer = worker.stdout.readline()
            except BrokenPipeError:
                answer = ""
            timer.cancel()
            fresh = False
            if answer:
                outcome, detail = json.loads(answer)
            else:
                outcome = "hang" if hung.is_set() else "crash"
                detail = "" if hung.is_set() else f"exit status {worker.wait()}"
            if not answer or outcome in ("memory", "outside"):
                worker.kill()
                worker = None
            done[kind, outcome] += 1
            if outcome not in ("accepted", "refused"):
                failures.append(f"--only {kind} {number}: {outcome}: {detail}")
            total = sum(done.values())
            if not quiet and total % 50 == 0:
                left = (time.monotonic() - start) / total * (len(cases) - total)
                print(f"{total}/{len(cases)}  {len(failures)} failures  {left:.0f} s left",
                      flush=True)
        if worker is not None:
            worker.stdin.close()
            worker.wait()

    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        home.chmod(0o755)
        shutil.copytree(matplotlib.get_cachedir(), home / "mpl")  # its list of fonts takes seconds
        (home / "tmp").mkdir()
        for name in ("mpl", "tmp"):
            (home / name).chmod(0o777)
        threads = [threading.Thread(target=serve, args=(i,)) for i in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return done, failures


# ---- kills and full disks ------------------------------------------------------------------------


def in_child(arguments, seconds=None, number=None, file_size=None) -> tuple[int, list[str]]:
    """(exit status, lines on standard error) of train.main in a forked child process, to which the
    signal `number` is sent after `seconds`, and whose files may grow to `file_size` bytes."""
    import signal

    import evaluate
    import train

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(write, 2)
        evaluate.report = lambda *args, **kwargs: {}
        train.plot_curves = lambda *args: None  # it would take most of the time
        train.LOG_EVERY, train.SAVE_EVERY = 5, 0.0  # a checkpoint at every step
        if file_size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        status = 70
        try:
            status = train.main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    if number is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
    with os.fdopen(read) as pipe:
        lines = pipe.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, lines


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight of a run's last checkpoint, and of its optimiser's state."""
    import torch

    import models

    content = torch.load(folder / "last.pt", weights_only=True)
    state = models.load(folder / "last.pt").state_dict()
    found = {name: tensor.numpy().tobytes() for name, tensor in state.items()}
    for index, moments in content["optimizer"]["state"].items():
        found |= {f"{index}.{name}": moment.numpy().tobytes() for name, moment in moments.items()}
    return found


def kills(count: int) -> list[str]:
    """Runs that are killed again and again and resumed must end with the weights of one that was
    not: a line for every chain in which they do not."""
    import signal

    failures, done, chain = [], 0, 0
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        start = time.monotonic()
        status, lines = in_child([*TINY, "--steps", "60", "--out", str(whole)])
        assert status == 0, lines
        length, expected = time.monotonic() - start, weights(whole)
        while done < count:
            chain += 1
            folder, status = Path(place) / f"chain{chain}", None
            while status != 0:
                number = signal.SIGTERM if chain % 7 == 0 else signal.SIGKILL
                given = ["--resume", str(folder)] if (folder / "config.json").exists() else \
                    [*TINY, "--steps", "60", "--out", str(folder)]
                # In the end a chain must be let through, or it would never finish.
                number = number if done < count else None
                status, lines = in_child(given, rng.uniform(0.0, length), number)
                done += status != 0
                # Four of five runs should be stopped by their signal, on a machine busy or idle.
                length *= 0.85 if status == 0 else 1.03
                expects = (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM)
                if status not in expects:
                    failures.append(f"chain {chain}: exit status {status}: {lines[-3:]}")
                    break
            if status == 0 and weights(folder) != expected:
                failures.append(f"chain {chain}: other weights than without kills")
            left = [f.name for f in folder.iterdir() if f.name.endswith(".tmp")]
            if status == 0 and left:
                failures.append(f"chain {chain}: left behind: {left}")
            print(f"{done}/{count} kills, {chain} chains, {len(failures)} failures, "
                  f"{time.monotonic() - start:.0f} s", flush=True)
    return failures


def disk() -> list[str]:
    """A checkpoint that does not fit: one line, the checkpoint before it whole, and the run can be
    resumed when there is room. A line for every failure."""
    failures = []
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        assert in_child([*TINY, "--steps", "20", "--out", str(whole)])[0] == 0
        expected, full = weights(whole), (whole / "last.pt").stat().st_size
        sizes = [0, 1, 100, 1000, 4096, *(int(full * part) for part in
                                          (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999))]
        for size in sizes:
            folder = Path(place) / f"size{size}"
            status, lines = in_child([*TINY, "--steps", "20", "--out", str(folder)], file_size=size)
            if status != 2 or len(lines) != 1:
                failures.append(f"{size} bytes: exit status {status}: {lines[-3:]}")
            given = ["--resume", str(folder)] if (folder / "config.json").exists() else \
                [*TINY, "--steps", "20", "--out", str(folder)]
            status, lines = in_child(given)
            if status or weights(folder) != expected:
                failures.append(f"{size} bytes: resumed: exit status {status}: {lines[-3:]}")
    print(f"{len(sizes)} sizes of disk, {len(failures)} failures")
    return failures


def main() -> int:
    """The command line; exit status 1 if anything failed."""
    if sys.argv[1:2] == ["work"]:
        work(Path(sys.argv[2]))
        return 0
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["inputs", "kills", "disk"])
    p.add_argument("--count", type=int, default=1000)
    p.add_argument("--kinds", nargs="+", choices=KINDS, help="default: all whose packages are here")
    p.add_argument("--only", nargs=2, metavar=("KIND", "NUMBER"), help="repeat one case")
    p.add_argument("--workers", type=int, default=2)
    args = p.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.what == "inputs":
        done, failures = inputs(args.count, args.kinds, args.workers, args.only)
        print("| kind | cases | accepted | refused | failures |\n|---|---|---|---|---|")
        for kind in dict.fromkeys(kind for kind, _ in sorted(done)):
            row = Counter({outcome: n for (k, outcome), n in done.items() if k == kind})
            good = row["accepted"] + row["refused"]
            print(f"| {kind} | {row.total()} | {row['accepted']} | {row['refused']} | "
                  f"{row.total() - good} |")
    else:
        import torch

        torch.set_num_threads(1)  # children are forked: no thread of torch may exist yet
        failures = kills(args.count) if args.what == "kills" else disk()
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
