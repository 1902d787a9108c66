"""LIDC from archives written here against masks worked by hand, kills, hostile input; and real
DICOM files if pydicom is installed.

pydicom is not needed: `read_synthetic` stands in for `read_dicom`, the only function that opens a
DICOM file, and reads slices from .npz files written here. Everything else is the real code.
"""

import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from matplotlib.path import Path as Polygon

import data
import sources.lidc_archive
from sources.base import split_groups
from sources.files import DataError
from sources.lidc_archive import CTSlice, build_lidc, fill

reads = []  # (file, whether its pixels were read): what `read_synthetic` was asked for


def read_synthetic(path, pixels=False):
    reads.append((path, pixels))
    if not str(path).endswith(".slice"):
        return None
    with np.load(path) as file:
        text, numbers = file["text"].tolist(), [None if math.isnan(v) else v for v in file["mm"]]
        return CTSlice(path, *text, tuple(file["shape"].tolist()),
                       tuple(file["spacing"].tolist()), *numbers, file["hu"] if pixels else None)


def write_slice(path, uid, series, patient, z, hu, *, location=math.nan, spacing=(0.5, 0.5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.savez(file, text=[uid, series, patient], mm=[z, location], spacing=spacing,
                 shape=hu.shape, hu=np.float32(hu))


def roi(uid, points, inclusion="TRUE", z=0):
    edges = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>"
                    for x, y in points)
    return (f"<roi><imageZposition>{z}</imageZposition><imageSOP_UID>{uid}</imageSOP_UID>"
            f"<inclusion>{inclusion}</inclusion>{edges}</roi>")


def square(left, top, right, bottom):
    """An outline's corners; the nodule is left + 1 .. right - 1, top + 1 .. bottom - 1."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


BOX = square(2, 2, 8, 8)  # 25 pixels


def nodule(*rois):
    return f"<unblindedReadNodule><noduleID>1</noduleID>{''.join(rois)}</unblindedReadNodule>"


def session(*nodules):
    return f"<readingSession>{''.join(nodules)}</readingSession>"


def xml(series, *sessions, namespace=' xmlns="http://www.nih.gov"', root="LidcReadMessage"):
    return (f'<?xml version="1.0" encoding="UTF-8"?>\n<{root}{namespace}><ResponseHeader>'
            f"<SeriesInstanceUid>{series}</SeriesInstanceUid></ResponseHeader>"
            f"{''.join(sessions)}</{root}>")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def scan(folder, series, patient, *sessions, slices=3, seed=0, shape=(40, 48), **options):
    """A series of slices `series`.0, .1, ... at z = -10, -9, ...; its XML; the slices' HU."""
    hu = np.random.default_rng(seed).integers(-1000, 400, (slices, *shape)).astype(np.float32)
    for i in range(slices):
        write_slice(folder / f"1-{i:03}.slice", f"{series}.{i}", series, patient, i - 10.0, hu[i],
                    location=10.0 - i, **options)
    if sessions:
        write(folder / "069.xml", xml(series, *sessions))
    return hu


def build(src, dst, read=read_synthetic, **options):
    with mock.patch.multiple(sources.lidc_archive, read_dicom=read, optional_package=mock.Mock()):
        build_lidc(src, dst, **{"size": 16, **options})


def built(src, dst, **options):
    """{name: (image, labels)} of what build_lidc makes."""
    build(src, dst, **options)
    with np.load(dst) as file:
        return dict(zip(file["names"].tolist(), zip(file["images"], file["labels"])))


def box(shape, top, left, bottom, right):
    """A mask that is 1 in rows top .. bottom and columns left .. right, both included."""
    mask = np.zeros(shape, np.uint8)
    mask[top:bottom + 1, left:right + 1] = 1
    return mask


def grey(hu, low=-1000, high=400):
    return np.rint(255 * ((hu - low) / (high - low)).clip(0, 1)).astype(np.uint8)


# ------------------------------------------------------------------------------ filling outlines


def drawn(points, shape=(6, 8)):
    inside, outline = fill(points, shape)
    assert not (inside & outline).any()
    return ["".join("#" if i else "o" if o else "." for i, o in zip(*rows))
            for rows in zip(inside, outline)]


def test_an_outline_runs_outside_the_nodule():
    """Corners alone, every pixel of the ring, or either way round: all but the ring is inside."""
    wanted = ["........", ".ooooo..", ".o###o..", ".o###o..", ".ooooo..", "........"]
    corners = square(1, 1, 5, 4)
    ring = ([(x, 1) for x in range(1, 6)] + [(5, 2), (5, 3)] + [(x, 4) for x in range(5, 0, -1)]
            + [(1, 3), (1, 2), (1, 1)])
    for points in (corners, corners[::-1], ring, corners[2:] + corners[:2]):
        assert drawn(points) == wanted


@pytest.mark.parametrize("points, wanted", [
    ([(3, 0), (6, 3), (3, 6), (0, 3)],  # diagonal edges pass through pixel centres
     ["...o....", "..o#o...", ".o###o..", "o#####o.", ".o###o..", "..o#o...", "...o...."]),
    ([(0, 0), (6, 0), (6, 6), (4, 6), (4, 2), (2, 2), (2, 6), (0, 6)],  # an arch
     ["ooooooo.", "o#####o.", "o#ooo#o.", "o#o.o#o.", "o#o.o#o.", "o#o.o#o.", "ooo.ooo."]),
    ([(0, 0), (4, 4), (4, 0), (0, 4)],  # crosses itself: both lobes are inside
     ["o...o...", "oo.oo...", "o#o#o...", "oo.oo...", "o...o...", "........", "........"]),
    ([(0, 0), (5, 0), (0, 3)],  # slanting edge between centres: exact, no rounding
     ["oooooo..", "o###....", "o#......", "o.......", "........", "........", "........"]),
    ([(1, 1), (6, 1)],  # there and back: an outline that holds nothing
     ["........", ".oooooo.", "........", "........", "........", "........", "........"]),
])
def test_filled_by_hand(points, wanted):
    assert drawn(points, (7, 8)) == wanted


def test_random_polygons_are_filled_like_matplotlibs():
    """An independent point-in-polygon rule; centres on the polygon are looked at on their own."""
    draw = random.Random(0)
    grid = np.stack(np.meshgrid(np.arange(30), np.arange(20)), -1).reshape(-1, 2)
    for _ in range(60):
        points = [(draw.randrange(30), draw.randrange(20)) for _ in range(draw.randrange(3, 9))]
        inside, outline = fill(points, (20, 30))
        edges = zip(points, points[1:] + points[:1])
        near = np.min([_distance(grid, *map(np.array, edge)) for edge in edges], 0).reshape(20, 30)
        assert (outline == (near < 1e-9)).all()
        reference = Polygon([*points, points[0]], closed=True).contains_points(grid).reshape(20, 30)
        assert (inside == (reference & ~outline))[~outline].all()


def _distance(points, a, b):
    along = ((points - a) @ (b - a) / max((b - a) @ (b - a), 1)).clip(0, 1)
    return np.linalg.norm(points - a - along[:, None] * (b - a), axis=1)


# ------------------------------------------------------------------------------ a whole archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Three patients and a bad series. Returns the folder and the scans' HU."""
    src = tmp_path_factory.mktemp("archive of TCIA") / "Päckchen 1"
    # One lesion. Reader 0 draws two slices, one with a hole; 1 draws part; 2 draws nothing but a
    # small nodule (a single point) and a non-nodule; 3 draws it in two pieces.
    first = scan(src / "LIDC-IDRI-0001/01-01-2000/3000566", "1.1", "LIDC-IDRI-0001",
                 session(nodule(roi("1.1.0", square(10, 10, 20, 18)),
                                roi("1.1.0", square(13, 12, 17, 16), "FALSE"),
                                roi("1.1.1", square(10, 10, 20, 18)))),
                 session(nodule(roi("1.1.1", square(15, 9, 23, 15)))),
                 session(nodule(roi("1.1.2", [(30, 30)])), "<nonNodule><imageSOP_UID>1.1.2"
                         "</imageSOP_UID><locus><xCoord>3</xCoord></locus></nonNodule>"),
                 session(nodule(roi("1.1.1", square(11, 11, 14, 14)),
                                roi("1.1.1", square(16, 11, 19, 14)))), seed=1)
    # Two annotators drew apart (their boxes do not touch): two lesions. Only three annotators.
    second = scan(src / "B", "1.2", "LIDC-IDRI-0002",
                  session(nodule(roi("1.2.1", square(5, 5, 10, 10)))),
                  session(nodule(roi("1.2.1", square(10, 5, 15, 10)))), session(), seed=2)
    # Odd spacing: rows 1.0 mm, columns 0.7 mm apart.
    third = scan(src / "C", "1.3", "LIDC-IDRI-0003",
                 session(nodule(roi("1.3.0", square(10, 10, 16, 15)))), session(), session(),
                 session(nodule(roi("1.3.0", square(11, 8, 18, 14)))), seed=3, spacing=(1.0, 0.7))
    scan(src / "D", "1.4", "LIDC-IDRI-0004", session(nodule(roi("1.4.1", square(1, 1, 9, 9)))),
         seed=4)
    write(src / "D/1-001.slice", b"PK\x03\x04 damaged")
    return src, (first, second, third)


def test_masks_are_those_worked_by_hand(archive, tmp_path, capsys):
    src, (hu, *_) = archive
    cases = built(src, tmp_path / "lidc.npz")
    told = capsys.readouterr().out
    assert "refused: series 1.4" in told and "LIDC-IDRI-0004" in told
    assert len(cases) == 5 and sum(name.startswith("LIDC-IDRI-0001") for name in cases) == 2
    # The box of all masks is columns 11..22, rows 10..17: its middle, (11 + 22 + 1) / 2 = 17 and
    # (10 + 17 + 1) / 2 = 14, is the crop's pixel (8, 8). The crop shows columns 9..24, rows 6..21.
    frame = slice(6, 22), slice(9, 25)
    for z, slice_number in ((-10.0, 0), (-9.0, 1)):
        image, labels = cases[f"LIDC-IDRI-0001/z{z}_c0"]
        assert np.array_equal(image, grey(hu[slice_number])[frame])
        outer = box((40, 48), 11, 11, 17, 19)
        if slice_number == 0:  # the hole takes its own outline away
            wanted = [outer - box((40, 48), 12, 13, 16, 17), *[np.zeros_like(outer)] * 3]
        else:
            wanted = [outer, box((40, 48), 10, 16, 14, 22), np.zeros_like(outer),
                      box((40, 48), 12, 12, 13, 13) | box((40, 48), 12, 17, 13, 18)]
        assert np.array_equal(labels, np.stack(wanted)[(slice(None), *frame)])


def test_annotators_who_drew_apart_make_two_lesions(archive, tmp_path):
    src, (_, hu, _) = archive
    cases = built(src, tmp_path / "lidc.npz")
    # Boxes of columns 6..9 and 11..14: crops are centred on column 8 and 13, row 8.
    for number, centre in ((0, 8), (1, 13)):
        image, labels = cases[f"LIDC-IDRI-0002/z-9.0_c{number}"]
        assert np.array_equal(image, grey(hu[1])[0:16, centre - 8:centre + 8])
        mask = box((40, 48), 6, centre - 2, 9, centre + 1)[0:16, centre - 8:centre + 8]
        assert np.array_equal(labels[number], mask) and not labels[1 - number].any()
        assert not labels[2].any() and (labels[3] == 255).all()  # read it; was not there


def test_odd_spacing_is_resampled_as_stated(archive, tmp_path):
    """Against loops over the crop's pixels, straight from the statement in data.py."""
    src, (*_, hu) = archive
    image, labels = built(src, tmp_path / "lidc.npz", size=20)["LIDC-IDRI-0003/z-10.0_c0"]
    # The box of both masks: rows 9..14 and columns 11..17.
    row, column = math.floor((9 + 14 + 1) / 2 / 0.5), math.floor((11 + 17 + 1) / 2 * 0.7 / 0.5)
    masks = box((40, 48), 11, 11, 14, 15), box((40, 48), 9, 12, 13, 17)
    for i in range(20):
        for j in range(20):
            y = (row - 10 + i + 0.5) * 0.5 / 1.0 - 0.5
            x = (column - 10 + j + 0.5) * 0.5 / 0.7 - 0.5
            top, left = math.floor(y), math.floor(x)
            b, r = y - top, x - left
            value = ((1 - b) * ((1 - r) * hu[0, top, left] + r * hu[0, top, left + 1])
                     + b * ((1 - r) * hu[0, top + 1, left] + r * hu[0, top + 1, left + 1]))
            assert abs(int(image[i, j]) - 255 * min(max((value + 1000) / 1400, 0), 1)) < 0.501
            near = round(y), round(x)
            assert labels[0, i, j] == masks[0][near] and labels[3, i, j] == masks[1][near]
    assert labels[0].sum() == 4 * 2 * round(5 * 0.7 / 0.5)  # the area stays: 4 x 3.5 mm


def test_what_is_read_back_is_whole(archive, tmp_path):
    build(archive[0], tmp_path / "lidc.npz")
    whole = data.load("lidc", "all", path=tmp_path / "lidc.npz")
    assert whole.images.shape == (5, 1, 16, 16) and whole.labels.shape == (5, 4, 16, 16)
    assert sorted(set(whole.groups)) == [f"LIDC-IDRI-000{i}" for i in (1, 2, 3)]
    parts = data.load("lidc", ("train", "val", "test"), path=tmp_path / "lidc.npz")
    assert sorted(sum((part.names for part in parts), [])) == sorted(whole.names)


def test_the_table_is_that_of_the_papers(archive, tmp_path, capsys):
    src, _ = archive
    build(src, tmp_path / "lidc.npz")
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    whole = data.load("lidc", "all", path=tmp_path / "lidc.npz")
    for part, cases in split_groups(whole.groups, val=0.2).items():
        _, patients, lesions, slices, empty = rows[part]
        assert int(patients) == 1 and int(slices) == len(cases)
        assert int(lesions) == len({whole.names[i].split("_c")[1] for i in cases})
        masks = [[mask for mask in whole.labels[i] if (mask != 255).any()] for i in cases]
        share = np.mean([np.mean([not mask.any() for mask in case]) for case in masks])
        assert float(empty.strip("%")) == pytest.approx(100 * share, abs=0.06)


def test_size_and_window_are_obeyed(archive, tmp_path):
    src, (_, hu, _) = archive
    cases = built(src, tmp_path / "a.npz", size=10, window=(-200.0, 100.0))
    image, labels = cases["LIDC-IDRI-0002/z-9.0_c0"]
    assert image.shape == (10, 10) and labels.shape == (4, 10, 10)
    assert np.array_equal(image, grey(hu[1], -200, 100)[3:13, 3:13])


def test_past_the_border_there_is_air(tmp_path):
    hu = scan(tmp_path / "src", "1", "p", session(nodule(roi("1.0", square(0, 0, 4, 4)))))
    image, labels = built(tmp_path / "src", tmp_path / "lidc.npz")["p/z-10.0_c0"]
    assert not image[:6].any() and not image[:, :6].any()
    assert np.array_equal(image[6:, 6:], grey(hu[0])[:10, :10])
    assert labels[0, 7:10, 7:10].all() and labels[0].sum() == 9


def test_lesions_join_across_annotators_only_and_on_and_on(tmp_path):
    """0 overlaps 1, 1 overlaps 2: one lesion. Two nodules of one annotator are not joined alone."""
    far = roi("1.0", square(30, 20, 34, 24)), roi("1.0", square(32, 22, 36, 26))
    scan(tmp_path / "src", "1", "p",
         session(nodule(roi("1.0", BOX)), nodule(far[0]), nodule(far[1])),
         session(nodule(roi("1.0", square(6, 2, 12, 8)))),
         session(nodule(roi("1.0", square(10, 2, 16, 8)))))
    cases = built(tmp_path / "src", tmp_path / "lidc.npz", size=40)
    assert sorted((labels == 1).any((1, 2)).sum() for _, labels in cases.values()) == [1, 1, 3]


def test_boxes_in_other_slices_do_not_overlap(tmp_path):
    scan(tmp_path / "src", "1", "p", session(nodule(roi("1.0", BOX))),
         session(nodule(roi("1.1", BOX))))
    assert {"p/z-10.0_c0", "p/z-9.0_c1"} == built(tmp_path / "src", tmp_path / "l.npz").keys()
    # A third annotator who drew both slices makes one lesion of all.
    scan(tmp_path / "src", "1", "p", session(nodule(roi("1.0", BOX))),
         session(nodule(roi("1.1", BOX))),
         session(nodule(*[roi(f"1.{i}", BOX) for i in range(2)])))
    assert {"p/z-10.0_c0", "p/z-9.0_c0"} == built(tmp_path / "src", tmp_path / "m.npz").keys()


def test_a_patients_second_scan_numbers_its_lesions_on(tmp_path):
    drawn = nodule(roi("1.0", BOX)), nodule(roi("2.0", BOX))
    for number, shape in zip("12", drawn):
        scan(tmp_path / "src" / number, number, "p", session(shape), seed=int(number))
    assert {"p/z-10.0_c0", "p/z-10.0_c1"} == built(tmp_path / "src", tmp_path / "l.npz").keys()


def test_slices_whose_places_disagree_are_dropped(tmp_path, capsys):
    """The sign may differ, as in the archive; a missing SliceLocation is no disagreement."""
    src = tmp_path / "src"
    drawn = nodule(*[roi(f"1.{i}", BOX) for i in range(4)])
    hu = scan(src, "1", "p", session(drawn), slices=4)
    write_slice(src / "1-001.slice", "1.1", "1", "p", -9.0, hu[1], location=9.5)
    write_slice(src / "1-002.slice", "1.2", "1", "p", -8.0, hu[2])
    cases = built(src, tmp_path / "lidc.npz")
    assert cases.keys() == {"p/z-10.0_c0", "p/z-8.0_c0", "p/z-7.0_c0"}
    assert "1 outlined slices dropped" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- resuming


def test_a_rerun_resumes_and_overwrites_nothing(archive, tmp_path):
    """Finished series are not read again, and the file is the same bit for bit."""
    src, dst = archive[0], tmp_path / "lidc.npz"
    build(src, dst)
    content = dst.read_bytes()
    with pytest.raises(DataError, match="is there: delete it, or give another name"):
        build(src, dst)
    dst.unlink()
    reads.clear()
    build(src, dst)
    assert {Path(file).parent.name for file, pixels in reads if pixels} <= {"D"}
    assert dst.read_bytes() == content


def test_what_changed_is_cut_again(archive, tmp_path):
    """A series that changed, and every series if a setting did."""
    src, _ = archive
    copy = tmp_path / "src"
    shutil.copytree(src, copy)
    before = built(copy, tmp_path / "lidc.npz")
    hu = scan(copy / "B", "1.2", "LIDC-IDRI-0002",
              session(nodule(roi("1.2.1", square(5, 5, 10, 10)))), seed=9)
    (tmp_path / "lidc.npz").unlink()
    reads.clear()
    after = built(copy, tmp_path / "lidc.npz")
    assert {Path(file).parent.name for file, pixels in reads if pixels} <= {"B", "D"}
    assert np.array_equal(after["LIDC-IDRI-0002/z-9.0_c0"][0], grey(hu[1])[0:16, 0:16])
    assert before.keys() - after.keys() == {"LIDC-IDRI-0002/z-9.0_c1"}
    for change in (dict(size=18), dict(window=(-900.0, 400.0)), dict(border="include")):
        (tmp_path / "lidc.npz").unlink()
        reads.clear()
        built(copy, tmp_path / "lidc.npz", **change)
        assert len({Path(file).parent.name for file, pixels in reads if pixels} - {"D"}) == 3


@pytest.mark.parametrize("owner, method, name", [
    (os, "fsync", ""), (zipfile.ZipFile, "open", "groups.npy"), (os, "replace", "result.npz"),
    (Path, "rename", "result.npz")])
def test_killed_while_it_writes(owner, method, name, archive, tmp_path, monkeypatch):
    """In the middle of a series and of the result; before each of the last renames."""
    real = getattr(owner, method)

    def die(*arguments, **options):
        if any(str(getattr(value, "filename", value)).endswith(name) for value in arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    src, dst = archive[0], tmp_path / "lidc.npz"
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, die)
        child = multiprocessing.get_context("fork").Process(target=build, args=(src, dst))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL and not dst.exists()
    build(src, dst)
    build(src, tmp_path / "whole.npz")
    assert dst.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def slow_read(path, pixels=False):
    time.sleep(0.004)
    return read_synthetic(path, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_twenty_times_it_completes(archive, tmp_path, workers):
    """Killed at random moments, DST is absent or whole; a rerun completes."""
    src, dst = archive[0], tmp_path / "lidc.npz"
    options, draw, caught = dict(read=slow_read, workers=workers), random.Random(workers), 0
    start = time.monotonic()
    build(src, tmp_path / "whole.npz", **options)
    length, wanted = time.monotonic() - start, (tmp_path / "whole.npz").read_bytes()
    for _ in range(20):
        child = multiprocessing.get_context("fork").Process(
            target=build, args=(src, dst), kwargs=options)
        child.start()
        time.sleep(length * draw.random())
        caught += child.is_alive()
        child.kill()
        child.join()
        if dst.exists():
            assert dst.read_bytes() == wanted
            dst.unlink()
    build(src, dst, **options)
    assert caught and dst.read_bytes() == wanted and not list(tmp_path.rglob("*.tmp"))


# --------------------------------------------------------------------------------------- workers


def test_workers_make_the_same(archive, tmp_path, capsys):
    src, _ = archive
    build(src, tmp_path / "one.npz")
    build(src, tmp_path / "two.npz", workers=3)
    build(src, tmp_path / "none.npz", workers=0)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    one, two = capsys.readouterr().out.replace("two.npz", "one.npz").split("one.npz\n")[:2]
    assert [line for line in one.splitlines() if "left" not in line] == [
        line for line in two.splitlines() if "left" not in line]


def test_ctrl_c_says_that_the_same_command_resumes(archive, tmp_path):
    src, dst, script = archive[0], tmp_path / "l.npz", tmp_path / "script.py"
    script.write_text(f"""import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run as a shell's job
sys.path[:0] = {[str(Path(__file__).parent), str(Path(data.__file__).parent)]}
import data, sources.lidc_archive, test_lidc_archive as t
sources.lidc_archive.read_dicom = t.patient_read
sources.lidc_archive.optional_package = lambda *_: None
sys.exit(data.main(["build-lidc", {str(src)!r}, {str(dst)!r}, "--workers", "2"]))
""")
    with subprocess.Popen([sys.executable, script], text=True, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        message = process.stderr.read()
    assert "rerun to resume" in message and message.count("\n") == 1 and not dst.exists()
    build(src, dst)


def patient_read(path, pixels=False):
    if pixels:
        Path(sys.argv[0]).with_name("started").touch()
        time.sleep(1)
    return read_synthetic(path, pixels)


# --------------------------------------------------------------------------------- hostile input


def told(capsys, src, dst, **options):
    """What `build_lidc` refused, beside a good scan that it must still build."""
    scan(src / "good", "9", "good", session(nodule(roi("9.1", BOX))), seed=5)
    cases = built(src, dst, **options)
    assert "good/z-9.0_c0" in cases
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("refused: ")], cases


BOMB = ('<?xml version="1.0"?><!DOCTYPE r [<!ENTITY a "aaaaaaaaaa">'
        + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi"))
        + "]><LidcReadMessage>&i;</LidcReadMessage>")
DRAWN = session(nodule(roi("1.1", BOX)))


@pytest.mark.parametrize("text, fragment", [
    (xml("1", DRAWN)[:-40], "unclosed token"),
    (b"", "no element found"),
    (b"\x00\xff\x00", "syntax error"),
    (BOMB, "amplification"),
    (BOMB.encode("utf-16"), "amplification"),
    (xml("1", DRAWN).replace("?>", '?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///dev/zero">]>').replace(
        ">TRUE<", ">&e;<"), "undefined entity"),
    (xml("1", DRAWN).replace("Uid>1</", "Uid></"), "names no SeriesInstanceUid"),
    (xml("1", DRAWN).replace("<xCoord>2<", "<xCoord>two<"), "a roi is not as LIDC writes it"),
    (xml("1", DRAWN).replace(">TRUE<", ">MAYBE<"), "a roi is not as LIDC writes it"),
    (xml("1", DRAWN).replace("imageSOP_UID", "imageUID"), "a roi is not as LIDC writes it"),
])
def test_bad_xml_is_named_and_its_series_left_out(text, fragment, tmp_path, capsys):
    scan(tmp_path / "src", "1", "p")
    write(tmp_path / "src/bad.xml", text)
    refused, cases = told(capsys, tmp_path / "src", tmp_path / "lidc.npz")
    assert len(cases) == 1 and len(refused) == 2
    assert "bad.xml" in refused[0] and fragment in refused[0]
    assert refused[1] == "refused: series 1 (p): no XML of its annotators"


@pytest.mark.parametrize("points, fragment", [
    (square(2, 2, 48, 8), "leaves its slice of 40 x 48"), (square(-1, 2, 8, 8), "leaves its slice"),
    (square(2, 2, 10**30, 8), "leaves its slice")])
def test_outlines_stay_in_their_slice(points, fragment, tmp_path, capsys):
    scan(tmp_path / "src", "1", "p", session(nodule(roi("1.1", points))))
    refused, cases = told(capsys, tmp_path / "src", tmp_path / "lidc.npz")
    assert len(cases) == 1 and len(refused) == 1 and fragment in refused[0]
    assert refused[0].startswith("refused: series 1 (p): ")


def test_other_xml_other_namespaces_and_other_files(tmp_path, capsys):
    for number, namespace in ("1", ""), ("2", ' xmlns="http://example.org/other"'):
        scan(tmp_path / "src" / number, number, "p" + number)
        drawn = session(nodule(roi(f"{number}.1", BOX)))
        write(tmp_path / f"src/{number}.xml", xml(number, drawn, namespace=namespace))
    write(tmp_path / "src/x-ray/a.xml", xml("3", DRAWN, root="IdriReadMessage"))
    write(tmp_path / "src/b.xml", "<html/>")
    write(tmp_path / "src/LICENSE", "text")
    refused, cases = told(capsys, tmp_path / "src", tmp_path / "lidc.npz")
    assert not refused and cases.keys() == {"p1/z-9.0_c0", "p2/z-9.0_c0", "good/z-9.0_c0"}


def test_missing_slices_are_left_out_and_counted(tmp_path, capsys):
    src = tmp_path / "src"
    scan(src, "1", "p", session(nodule(*[roi(f"1.{i}", BOX) for i in range(5)])))
    (src / "1-000.slice").unlink()
    refused, cases = told(capsys, src, tmp_path / "a.npz")
    assert not refused and cases.keys() == {"p/z-9.0_c0", "p/z-8.0_c0", "good/z-9.0_c0"}
    for i in range(1, 3):
        (src / f"1-00{i}.slice").unlink()
    refused, cases = told(capsys, src, tmp_path / "b.npz")
    assert len(cases) == 1 and len(refused) == 1  # with no file the series is not there at all
    assert "1 XML files: no slices of series 1" in refused[0]


def test_duplicate_slices(tmp_path, capsys):
    """Of copies the first is read; of two slices at one place, the outlined one."""
    src = tmp_path / "src"
    for number, uid in ("1", "1.1"), ("2", "2.9"):
        hu = scan(src / number, number, "p" + number, session(nodule(roi(f"{number}.1", BOX))))
        write_slice(src / number / "copy.slice", uid, number, "p" + number, -9.0, hu[0])
    refused, cases = told(capsys, src, tmp_path / "lidc.npz")
    assert not refused and cases.keys() == {"p1/z-9.0_c0", "p2/z-9.0_c0", "good/z-9.0_c0"}
    for number in "12":
        assert np.array_equal(cases[f"p{number}/z-9.0_c0"][0][3:, 3:], grey(hu[1])[:13, :13])


def test_of_two_images_at_one_z_the_one_outlined_most_is_shown(tmp_path, capsys):
    """As in patients 0017 and 0659, where annotators outlined different images of the same z."""
    src = tmp_path / "src"
    drawn = [session(nodule(roi(uid, BOX))) for uid in ("1.1", "1.9", "1.9")]
    hu = scan(src, "1", "p", *drawn)
    write_slice(src / "other.slice", "1.9", "1", "p", -9.0, hu[2])
    refused, cases = told(capsys, src, tmp_path / "lidc.npz")
    image, labels = cases["p/z-9.0_c0"]
    assert not refused and np.array_equal(image[3:, 3:], grey(hu[2])[:13, :13])
    assert (labels[:3] == 1).sum((1, 2)).tolist() == [25, 25, 25]


def test_an_outline_is_where_its_image_is(tmp_path, capsys):
    """One z under a UID does not matter, however wrong. Of several (patient 0396: z 1423 and 1420
    under one UID) each belongs to the slice at that z, or to none."""
    src, small = tmp_path / "src", square(3, 3, 7, 7)  # 9 pixels
    scan(src, "1", "p", session(nodule(roi("1.0", BOX, z=77))),
         session(nodule(roi("1.1", BOX, z=-9), roi("1.1", small, z=-8))),
         session(nodule(roi("1.1", small, z=3))))
    write_slice(src / "1-003.slice", "1.3", "1", "p", 4.0, np.zeros((40, 48)))
    _, cases = told(capsys, src, tmp_path / "lidc.npz")
    sizes = {name: (labels == 1).sum((1, 2)).tolist() for name, (_, labels) in cases.items()}
    assert sizes == {"p/z-10.0_c0": [25, 0, 0, 0], "p/z-9.0_c1": [0, 25, 0, 0],
                     "p/z-8.0_c1": [0, 9, 0, 0], "good/z-9.0_c0": [25, 0, 0, 0]}


def test_surplus_sessions_without_outlines_are_left_out(tmp_path, capsys):
    """Eight sessions, as in 188/011.xml, where the second of the first four drew nothing."""
    drawn, empty = session(nodule(roi("1.1", BOX))), session()
    scan(tmp_path / "src", "1", "p", drawn, empty, drawn, drawn, *[empty] * 4)
    refused, cases = told(capsys, tmp_path / "src", tmp_path / "lidc.npz")
    assert (cases["p/z-9.0_c0"][1] == 1).sum((1, 2)).tolist() == [25, 0, 25, 25] and not refused


def test_outlines_belong_to_the_nodule_on_request(tmp_path):
    hu = scan(tmp_path / "src", "1", "p", session(nodule(
        roi("1.0", square(10, 10, 20, 18)), roi("1.0", square(13, 12, 17, 16), "FALSE"))))
    image, labels = built(tmp_path / "src", tmp_path / "a.npz", border="include")["p/z-10.0_c0"]
    frame = slice(6, 22), slice(7, 23)  # the middle of columns 10..20 and rows 10..18 is (15, 14)
    wanted = box((40, 48), 10, 10, 18, 20) - box((40, 48), 13, 14, 15, 16)
    assert np.array_equal(labels[0], wanted[frame]) and np.array_equal(image, grey(hu[0])[frame])


def test_several_xml_files_of_one_series(tmp_path, capsys):
    """The same reading twice counts once; the archive's corrected reading wins; else refused."""
    other = session(nodule(roi("1.1", square(4, 4, 8, 8))))
    for name, second, drawn in (("twice.xml", DRAWN, 25), ("again.xml", other, None),
                                ("a-resubmitted-correction.xml", other, 9)):
        src = tmp_path / name
        scan(src, "1", "p", DRAWN)
        changed = xml("1", second).replace("</ResponseH", "<Version>2</Version></ResponseH")
        write(src / "xml only" / name, changed)
        refused, cases = told(capsys, src, tmp_path / f"{name}.npz")
        if drawn:
            assert not refused and (cases["p/z-9.0_c0"][1][0] == 1).sum() == drawn
        else:
            assert len(cases) == 1 and len(refused) == 1 and "contradict" in refused[0]


def test_xml_of_another_series(tmp_path, capsys):
    scan(tmp_path / "src", "1", "p")
    write(tmp_path / "src/a.xml", xml("7", DRAWN))
    refused, cases = told(capsys, tmp_path / "src", tmp_path / "lidc.npz")
    assert len(cases) == 1 and len(refused) == 2
    assert "1 XML files: no slices of series 7" in refused[0]
    assert refused[1] == "refused: series 1 (p): no XML of its annotators"


def test_series_that_contradict_themselves(tmp_path, capsys):
    def drawn(number):
        return session(nodule(*[roi(f"{number}.{i}", BOX) for i in range(2)]))

    src = tmp_path / "src"
    hu = scan(src / "1", "1", "p", drawn(1))
    write_slice(src / "1/1-001.slice", "1.1", "1", "p", -9.0, hu[1], spacing=(0.6, 0.6))
    scan(src / "2", "2", "p", *[drawn(2)] * 5)
    scan(src / "3", "3", "p", drawn(3))
    write_slice(src / "3/1-001.slice", "3.1", "3", "p", math.nan, hu[1])
    for number, spacing in (4, (0.0, 0.5)), (5, (0.5,)), (6, (math.nan, 0.5)):
        scan(src / f"{number}", f"{number}", "p", drawn(number), spacing=spacing)
    refused, cases = told(capsys, src, tmp_path / "lidc.npz")
    fragments = ("differ in size or PixelSpacing", "5 readingSessions", "ImagePositionPatient None",
                 "PixelSpacing (0.0, 0.5)", "PixelSpacing (0.5,)", "PixelSpacing (nan, 0.5)")
    assert len(cases) == 1
    for number, line, fragment in zip(range(1, 7), refused, fragments, strict=True):
        assert line.startswith(f"refused: series {number} (p): ") and fragment in line


def test_pipes_links_and_odd_names(tmp_path, capsys):
    src = tmp_path / "src ä 中" / "nested [1]"
    scan(src / "deep/er", "1", "../p/../../evil", DRAWN)
    (src / "deep/er/up").symlink_to(src)
    (src / "deep/dead").symlink_to(tmp_path / "nothing")
    os.mkfifo(src / "pipe.dcm")
    with open(os.fsencode(src) + b"/\xff.xml", "wb") as file:
        file.write(b"<a")
    refused, cases = told(capsys, src, tmp_path / "out [x]" / "ü.npz")
    assert cases.keys() == {"_p_evil/z-9.0_c0", "good/z-9.0_c0"} and len(refused) == 1


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        assert data.main([*map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    src = tmp_path / "src"
    assert "give a folder" in refused("build-lidc", tmp_path / "none", tmp_path / "a.npz")
    src.mkdir()
    assert "ends in .npz" in refused("build-lidc", src, tmp_path / "a.npy")
    assert "at least 2 pixels" in refused("build-lidc", src, tmp_path / "a.npz", "--size", 1)
    assert "window" in refused("build-lidc", src, tmp_path / "a.npz", "--window", 400, -1000)
    write(tmp_path / "other.npz", "mine")
    assert "other.npz is there" in refused("build-lidc", src, tmp_path / "other.npz")
    assert (tmp_path / "other.npz").read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pydicom", None)
        assert "pip install pydicom" in refused("build-lidc", src, tmp_path / "a.npz")
    pytest.importorskip("pydicom")
    assert "nothing to cut" in refused("build-lidc", src, tmp_path / "a.npz", "--workers", 1)


# -------------------------------------------------------------------------------- the real thing


def write_dicom(path, uid, series, z, stored, **changes):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = uid
    file.SeriesInstanceUID, file.PatientID, file.Modality = series, "LIDC-IDRI-0007", "CT"
    file.PixelSpacing, file.ImagePositionPatient = ["0.5", "0.5"], ["-166", "-171.7", str(z)]
    file.SliceLocation, file.RescaleSlope, file.RescaleIntercept = str(z), "2", "-1024"
    file.Rows, file.Columns = stored.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 1
    file.PixelData = stored.astype("<i2").tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(file, name)
        else:
            setattr(file, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, file, enforce_file_format=True)


def test_real_dicom_files_through_the_command_line(tmp_path, capsys):
    pytest.importorskip("pydicom")
    src, dst = tmp_path / "LIDC-IDRI", tmp_path / "lidc.npz"
    stored = np.random.default_rng(0).integers(-100, 900, (4, 40, 48))
    for i in range(4):
        write_dicom(src / "s" / f"1-{i}.dcm", f"1.2.{i}", "1.2", i - 0.5, stored[i])
    write_dicom(src / "s/1-2.dcm", "1.2.2", "1.2", 1.5, stored[2], SliceLocation="7")
    write_dicom(src / "s/1-3.dcm", "1.2.3", "1.2", 2.5, stored[3], SliceLocation=None)
    write_dicom(src / "t/1-0.dcm", "1.3.0", "1.3", 1, stored[0], RescaleSlope=None)
    write_dicom(src / "x/1-0.dcm", "1.4.0", "1.4", 1, stored[0], Modality="CR")
    write(src / "half.dcm", b"half a header")
    whole = (src / "s/1-0.dcm").read_bytes()
    write(src / "u/cut.dcm", whole[:len(whole) // 2].replace(b"1.2.0", b"1.5.0").replace(
        b"1.2\0", b"1.5\0"))
    for series in ("1.2", "1.3", "1.5"):
        write(src / f"{series}.xml", xml(series, session(nodule(*[
            roi(f"{series}.{i}", BOX) for i in range(4)]))))
    assert data.main(["build-lidc", str(src), str(dst), "--size", "16", "--workers", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "refused" in line]
    assert len(lines) == 3 and "half.dcm: InvalidDicomError" in lines[0]
    assert "series 1.3" in lines[1] and "RescaleSlope" in lines[1] and "series 1.5" in lines[2]
    with np.load(dst) as file:
        cases = dict(zip(file["names"].tolist(), zip(file["images"], file["labels"])))
    assert cases.keys() == {f"LIDC-IDRI-0007/z{z}_c0" for z in (-0.5, 0.5, 2.5)}
    for i in (0, 1, 3):
        image, labels = cases[f"LIDC-IDRI-0007/z{i - 0.5}_c0"]
        assert np.array_equal(image[3:, 3:], grey(2.0 * stored[i] - 1024)[:13, :13])
        assert (labels[0] == 1).sum() == 25 and (labels[1:] == 255).all()
