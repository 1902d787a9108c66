"""sources/files.py and sources/pickles.py: what is read is right, and nothing in a file can run,
crash, hang or fill the memory."""

import itertools
import os
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sources.files
from data_files import LPS, arrays, load_npz, records, refused, save_picture, stored, write, \
    write_folder
from helpers import FORKSERVER
from sources.files import DataError
from sources.pickles import read_pickle


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function, named", [(os.mkdir, "mkdir"), (eval, "eval"),
                                             (np.load, "load"), (np.memmap, "memmap")])
def test_hostile_pickles_are_refused_before_they_run(tmp_path, function, named):
    target = tmp_path / "made-by-the-pickle"
    argument = f"__import__('os').mkdir({str(target)!r})" if function is eval else str(target)
    table = records(3)
    table["case-1"]["image"] = Hostile(function, argument)
    path = write(tmp_path / "a.pickle", table)
    refused(path, named, "not run", call=lambda: data.load("lidc", path=path))
    assert not target.exists()


def test_globals_inside_numpys_own_modules_are_refused_too(tmp_path):
    path = tmp_path / "a.pickle"
    path.write_bytes(b"cnumpy._core.multiarray\nfromfile\n(S'x'\ntR.")
    refused("numpy._core.multiarray.fromfile", call=lambda: data.load("lidc", path=path))
    path.write_bytes(b"c_codecs\ndecode\n(S'x'\nS'zlib'\ntR.")
    refused("_codecs.decode", call=lambda: data.load("lidc", path=path))


def test_damaged_npz(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays())
    raw = path.read_bytes()
    for stump in (raw[:200], b"", b"PK\x03\x04"):
        path.write_bytes(stump)
        refused(path, call=lambda: data.load("npz", path=path))
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    refused(path, call=lambda: data.load("npz", path=path))


def test_sixteen_bits_held_in_32(tmp_path):
    images, _ = write_folder(tmp_path, np.uint16)
    for i in range(6):
        (tmp_path / f"images/case {i}.png").unlink()
        save_picture(tmp_path / f"images/case {i}.tif", images[i].astype(np.int32))
    whole = data.load("folder", "all", path=tmp_path)
    np.testing.assert_array_equal(whole.images[:, 0], images / np.float32(65535))
    save_picture(tmp_path / "images/case 0.tif", np.full((8, 7), 65536, np.int32))
    refused("case 0", "int32", "uint16", call=lambda: data.load("folder", "all", path=tmp_path))


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # more than twice that is an error
    refused("images/case", "bomb", call=lambda: data.load("folder", path=tmp_path))


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(0, 0, 0), (1, 0, 1), (1, 1, 1)])
def test_nifti_in_any_order_and_back(tmp_path, axes, flips):
    nibabel = pytest.importorskip("nibabel")
    world = np.random.default_rng(0).integers(-900, 900, (4, 5, 6)).astype(np.int16)
    affine = np.array([[-1.0, 0, 0, 9], [0, -2, 0.1, 7], [0, -0.1, 3, -5], [0, 0, 0, 1]])
    voxels, matrix = stored(world, affine, axes, flips)
    nibabel.save(nibabel.Nifti1Image(voxels, matrix), tmp_path / "in.nii.gz")
    array, source = sources.files.read_nifti(tmp_path / "in.nii.gz")
    np.testing.assert_array_equal(array, world.T[None])
    sources.files.write_nifti(tmp_path / "out.nii.gz", np.stack([array[0], array[0] / 2]), source)
    back = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj)[..., 0], voxels)
    np.testing.assert_array_equal(np.asarray(back.dataobj)[..., 1], voxels / 2)
    np.testing.assert_allclose(back.affine, matrix, atol=1e-6)


@pytest.mark.parametrize("shape, want", [((4, 5), (1, 5, 4)), ((4, 5, 1), (1, 5, 4)),
                                         ((4, 1, 6), (1, 6, 4)), ((4, 5, 6, 3), (3, 6, 5, 4))])
def test_nifti_of_a_slice_and_of_channels(tmp_path, shape, want):
    nibabel = pytest.importorskip("nibabel")
    voxels = np.random.default_rng(0).random(shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, LPS), tmp_path / "in.nii")
    array, source = sources.files.read_nifti(tmp_path / "in.nii")
    assert array.shape == want
    sources.files.write_nifti(tmp_path / "out.nii.gz", array, source)
    back = np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj)
    assert back.size == voxels.size and (back.squeeze() == voxels.squeeze()).all()


# ----------------------------------------------------------------------------- forged pickles


PLAIN = {"a": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "t": np.arange(24).reshape(2, 3, 4)
         .transpose(1, 2, 0), "b": np.array([True, False]), "z": np.zeros((0, 6)), "be": np.arange(
             3, dtype=">i2"), "f2": np.ones((3, 2), np.float16)[:, ::-1], "u": np.str_("ab"),
         "s": np.float64(2), "l": [1, -7, 2.5, None, True, (1,), (1, 2, 3, 4), b"xx", b"", 2**40],
         5: "ü", "names": np.array(["ab", "c"])}


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_and_plain_values(tmp_path, protocol):
    raw = pickle.dumps(PLAIN, protocol)
    spellings = {raw}
    if protocol < 4:  # module names stand in the file as plain lines
        spellings = {raw.replace(b"numpy._core.", b"numpy.core."),
                     raw.replace(b"numpy.core.", b"numpy._core.")}
    for spelling in spellings:
        (tmp_path / "a.pickle").write_bytes(spelling)
        got = read_pickle(tmp_path / "a.pickle")
        assert list(got) == list(PLAIN)
        for key, want in pickle.loads(raw).items():  # Python's own, which may swap bytes
            if isinstance(want, (np.ndarray, np.generic)):
                assert got[key].dtype == want.dtype and got[key].shape == want.shape
                np.testing.assert_array_equal(got[key], want)
            else:
                assert got[key] == want and type(got[key]) is type(want)


def array_of(dtype_kind=b"f8", state=b"I3\nV<\nNNNI-1\nI-1\nI0\nt",
             raw=b"I1\n(I1\nt%sI0\nV12345678\nt", build=b"b"):
    """A pickle {"k": array} of protocol 0, to be forged part by part."""
    dtype = b"cnumpy\ndtype\n(V" + dtype_kind + b"\nI0\nI1\ntR(" + state + b"b"
    start = b"(dVk\ncnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR("
    return start + raw % dtype + build + b"s."


def shared_lists(depth):
    """A list that would be 2^depth numbers if it were written out."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


NEST = 200_000
FORGED = {
    "an object dtype": array_of(b"O8"),
    "a void dtype": array_of(b"V8"),
    "a void dtype with an object field": array_of(
        b"V8", b"I3\nV|\nN(Vx\nt(dVx\n(cnumpy\ndtype\n(VO8\nI0\nI1\ntRI0\ntsI8\nI1\nI1\nt"),
    "fields in a plain dtype": array_of(
        b"f8", b"I3\nV<\nN(Vx\nt(dVx\n(cnumpy\ndtype\n(Vf8\nI0\nI1\ntRI0\ntsI8\nI1\nI1\nt"),
    "an array state in a dtype": array_of(b"f8", b"I1\n(I1\ntNI0\nVx\nt"),
    "too few bytes": array_of(raw=b"I1\n(I2\nt%sI0\nV12345678\nt"),
    "a huge shape": array_of(raw=b"I1\n(L4611686018427387904L\nL4L\nt%sI0\nV\nt"),
    "a negative shape": array_of(raw=b"I1\n(I-1\nI-1\nt%sI0\nV12345678\nt"),
    "a long empty shape": array_of(raw=b"I1\n(L1099511627776L\nI0\nt%sI0\nV\nt"),
    "a list as data": array_of(raw=b"I1\n(I1\nt%sI0\n(lt"),
    "another version": array_of(raw=b"I9\n(I1\nt%sI0\nV12345678\nt"),
    "no state": array_of(build=b"0"),
    "state of a dict": b"(dVk\n(d(dVx\nI1\nsbs.",
    "state of a list": b"(dVk\n(l(dVx\nI1\nsbs.",
    "state of a name": b"(dVk\ncnumpy\nndarray\n(dVx\nI1\nsbs.",
    "state of an ordered dict": b"(dVk\nccollections\nOrderedDict\n(tR(dVitems\nI1\nsbs.",
    "a name alone": b"cnumpy\nndarray\n.",
    "a class made": b"\x80\x02cnumpy\nndarray\n(I4\nt\x81.",
    "a class made with keywords": b"\x80\x04cnumpy\nndarray\n)}\x92.",
    "an instance": b"(inumpy\nndarray\n.",
    "an object": b"(cnumpy\nndarray\no.",
    "an extension": b"\x80\x02\x82\x01.",
    "an extension of four bytes": b"\x80\x02\x84\x01\x00\x00\x00.",
    "a persistent id": b"Px\n.",
    "a buffer from elsewhere": b"\x80\x05\x97.",
    "a set": b"\x80\x04\x8f.",
    "a call of a list": b"(l(tR.",
    "a nested tuple as a key": b"\x80\x02}" + b"K\x01" + b"\x85" * 60 + b"K\x01s.",
    "2^60 shared tuples as a key": b"\x80\x02}q\xffK\x01q\x00" + b"".join(
        b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"h\xffh%cK\x01s." % 60,
    "2^60 shared lists as a series": pickle.dumps({"k": {**records(1)["case-0"],
                                                         "series_uid": shared_lists(60)}}),
    "a long number as a series": pickle.dumps({"k": {**records(1)["case-0"],
                                                     "series_uid": 10**5000}}),
    "deep lists": b"\x80\x02" + b"]" * NEST + b"a" * (NEST - 1) + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * NEST + b".",
    "a long key": b"\x80\x02}X" + struct.pack("<I", 10**6) + b"x" * 10**6 + b"K\x01s.",
    "a long number": b"\x80\x02}\x8b" + struct.pack("<I", 10**5) + b"\x7f" * 10**5 + b"K\x01s.",
    "more bytes than there are": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x",
    "more changeable bytes than there are": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x",
    "an unknown memo": b"g9\n.",
    "a mark too few": b"t.",
    "nothing on the stack": b"R.",
    "no end": b"(l",
    "a picture": b"\x89PNG\r\n",
}


def read_in_little_memory(files, out):
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
    with open(out, "w") as lines:
        for file in files:
            try:
                data.load("lidc", "all", file)
                print("read", file, file=lines)
            except DataError as error:
                print("refused", error, file=lines)


def refused_in_one_line(files):
    """Every file as LIDC in one other process, which a crash would end early; memory up to 4 GB."""
    out = files[0].with_suffix(".txt")
    process = FORKSERVER.Process(target=read_in_little_memory, args=(files, out))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0
    lines = out.read_text().splitlines()
    assert len(lines) == len(files)
    for file, line in zip(files, lines):
        assert line.startswith(f"refused {file}: "), line
    return lines


def test_forged_pickles_are_one_line_each(tmp_path):
    files = []
    for number, raw in enumerate(FORGED.values()):
        files.append(tmp_path / f"{number}.pickle")
        files[-1].write_bytes(raw)
    (tmp_path / "good.pickle").write_bytes(array_of())  # the pattern itself is right
    good = read_pickle(tmp_path / "good.pickle")
    assert good["k"].tolist() == [struct.unpack("d", b"12345678")[0]]
    lines = dict(zip(FORGED, refused_in_one_line(files)))
    assert "objects or records" in lines["a void dtype with an object field"]
    assert "a key is no text" in lines["2^60 shared tuples as a key"]
    assert "series_uid is a list" in lines["2^60 shared lists as a series"]
    assert "NEWOBJ_EX" in lines["a class made with keywords"]


def test_damaged_pickles_are_one_line_each(tmp_path):
    """Every 23rd byte of a good file, in three protocols, replaced or left out."""
    for protocol in (0, 2, 5):
        raw = pickle.dumps(records(2), protocol)
        path = tmp_path / "a.pickle"
        for at in range(0, len(raw), 23):
            for spoiled in (raw[:at] + bytes([raw[at] ^ 0x15]) + raw[at + 1:],
                            raw[:at] + raw[at + 1:]):
                path.write_bytes(spoiled)
                try:
                    data.load("lidc", "all", path)
                except DataError as error:
                    assert "\n" not in str(error)


# --------------------------------------------------------------------------- npz, pipes, pictures


def npy(shape, descr="|u1", content=b""):
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize("member, fragment", [
    (npy((40000, 40000)), "npz"), (npy((2**62, 2)), "npz"),
    (npy((-1, 5)), "npz"), (npy((2,), "|O"), "Object arrays"), (b"no array", "npz"),
    (npy((3, 3), content=b"12"), "npz")])
def test_npz_members_that_are_no_arrays_of_their_size(tmp_path, member, fragment):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", member)
        archive.writestr("labels.npy", npy((1, 1, 2, 2), content=bytes(4)))
    refused(path, fragment, call=lambda: data.load("npz", "all", path))


def test_npz_that_expands_a_thousand_times_is_refused(tmp_path):
    """300 MB of zeros in 300 kB; arrays of 256 MiB or less are read whatever their compression."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w") as member:
            member.write(npy((300, 1000, 1000)))
            for _ in range(300):
                member.write(bytes(10**6))
        archive.writestr("labels.npy", npy((300, 1, 1000, 1000)))
    refused(path, "300,000,000", call=lambda: sources.files.check_claim(path, 300_000_000))
    refused(path, "300,000,", call=lambda: data.load("npz", "all", path))
    sources.files.check_claim(path, 2**28)
    # A directory that lies about a size: no more than that is expanded.
    size = struct.pack("<I", zipfile.ZipFile(path).getinfo("images.npy").file_size)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 5000)))
    refused(path, "CRC", call=lambda: data.load("npz", "all", path))


def test_odd_values_in_npz(tmp_path):
    for odd in (np.nan, np.inf, 2.5):
        refused("num_classes", call=lambda: load_npz(tmp_path, **arrays(), num_classes=odd))
    np.savez(tmp_path / "em.npz", images=np.zeros((10, 4, 4)), instances=-np.ones((10, 4, 4), int))
    refused("em.npz", "-1", call=lambda: data.load("em", path=tmp_path / "em.npz", tile=0))
    table = records()
    table["case-1"]["masks"] = np.array(1)
    path = write(tmp_path / "a.pkl", table)
    refused("case-1", "masks", call=lambda: data.load("lidc", "all", path))


def test_pipes_are_refused_not_waited_for(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "images/case 1.png").unlink()
    os.mkfifo(tmp_path / "images/case 1.png")
    refused("case 1.png", "regular", call=lambda: data.load("folder", "all", tmp_path))
    os.mkfifo(tmp_path / "split.json")
    (tmp_path / "images/case 1.png").unlink()
    save_picture(tmp_path / "images/case 1.png", np.zeros((8, 7), np.uint8))
    refused("split.json", "regular", call=lambda: data.load(
        "folder", path=tmp_path, split_file=tmp_path / "split.json"))


def test_names_that_are_not_utf8_become_printable(tmp_path):
    write_folder(tmp_path)
    for folder in ("images", "labels/anna", "labels/ben"):
        os.rename(tmp_path / folder / "case 1.png",
                  os.fsencode(tmp_path / folder) + b"/caf\xe9.png")
    whole = data.load("folder", "all", tmp_path)
    assert sorted(whole.names)[0] == "caf\\udce9" and whole.groups == whole.names
    "".join(whole.names).encode("utf-8")


def test_a_warning_far_from_unit_scale(tmp_path, capsys):
    given = arrays()
    load_npz(tmp_path, **given)
    assert capsys.readouterr().err == ""
    load_npz(tmp_path, **given | {"images": given["images"] * 255})
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "own.npz" in warning and "divide" in warning
    twelve_bits = (4095 * given["images"].clip(0, 1)).astype(np.uint16)
    load_npz(tmp_path, **given | {"images": twelve_bits})
    assert "12 bits" in capsys.readouterr().err


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPS"])
def test_nifti_arrays_are_contiguous(tmp_path, axes):
    nibabel = pytest.importorskip("nibabel")
    affine = np.diag([1.0 if a in "RAS" else -1.0 for a in axes] + [1.0])
    nibabel.save(nibabel.Nifti1Image(np.arange(24.0).reshape(2, 3, 4), affine), tmp_path / "a.nii")
    array, _ = sources.files.read_nifti(tmp_path / "a.nii")
    assert torch.from_numpy(array).shape == (1, 4, 3, 2)  # refuses negative strides


def test_pictures_scaled_to_floats(tmp_path):
    """8 and 16 bits to [0, 1], floats as they are, NaN refused."""
    for name, array, want in (("8.png", np.full((2, 3), 51, np.uint8), 0.2),
                              ("16.png", np.full((2, 3), 13107, np.uint16), 0.2),
                              ("f.tif", np.full((2, 3), 0.2, np.float32), 0.2)):
        save_picture(tmp_path / name, array)
        image = sources.files.as_float_image(sources.files.read_picture(tmp_path / name), name)
        assert image.shape == (1, 2, 3) and image.dtype == np.float32
        np.testing.assert_allclose(image, want, rtol=1e-6)
    save_picture(tmp_path / "n.tif", np.full((2, 3), np.nan, np.float32))
    refused("n.tif", "finite", call=lambda: sources.files.as_float_image(
        sources.files.read_picture(tmp_path / "n.tif"), "n.tif"))


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6])
def test_pictures_that_viewers_turn_are_refused(tmp_path, ending, orientation):
    """Also as a label and in a data set; 0 and 1 mean that nothing is turned."""
    write_folder(tmp_path)
    file = tmp_path / f"images/case 0.{ending}"
    (tmp_path / "images/case 0.png").unlink()
    exif = Image.Exif()
    exif[0x112] = orientation
    save_picture(file, np.arange(56, dtype=np.uint8).reshape(8, 7), exif=exif)
    if orientation in (0, 1):
        assert sources.files.read_picture(file).shape == (1, 8, 7)
        return
    for call in (lambda: data.load("folder", "all", tmp_path),
                 lambda: sources.files.read_picture(file), lambda: sources.files.read_label(file)):
        refused(file, f"EXIF rotation (orientation {orientation})", "upright", call=call)
