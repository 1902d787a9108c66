"""Pickles of NumPy arrays and plain containers, read without calling anything that a file names.

Python's unpickler imports what a file asks for and lets it set any object's state; a forged dtype
alone makes NumPy follow pointers out of the file. Here it has only the operations that arrays and
plain values need. The few names that arrays need stand for the functions below, which check kind,
shape and number of bytes; all other names and operations are refused.
"""

import pickle
import pickletools
import re
from functools import partial
from math import prod

import numpy as np

from sources.files import readable

KIND = re.compile(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,3}")  # of a dtype: no objects, no fields
NO_NUMBERS = "an array of objects or records; give numbers"
KEY_LENGTH = 1000  # characters
OPERATIONS = (
    "PROTO FRAME STOP MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE "
    "NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
    "SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT GLOBAL STACK_GLOBAL REDUCE").split()


def read_pickle(file):
    """Returns the content of a pickle of any protocol, by Python 2 or 3 and any NumPy: dict, list,
    tuple, str, bytes, numbers, None and arrays. Raises DataError for all else."""
    with readable(file, "pickle of arrays"), open(file, "rb") as raw:
        return ArrayUnpickler(raw, encoding="latin1").load()


def _expect(condition: bool, fault: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(fault)


def _refuse(name: str, unpickler) -> None:
    raise pickle.UnpicklingError(f"it calls for {name}, which no array needs; not run")


class ArrayUnpickler(pickle._Unpickler):  # the one in Python, whose operations can be replaced
    """Reads arrays and plain values. Whatever can be called in it comes from `find_class`."""

    def find_class(self, module, name):
        """Returns what stands for a name that a file gives."""
        _expect((module, name) in NAMES, f"it calls for {module:.50}.{name:.50}, which no array "
                "needs and which could run anything; it was not run")
        return NAMES[module, name]

    def load_bytearray8(self):
        """Reads a bytearray, without setting memory aside for bytes that are not there."""
        self.load_binbytes8()
        self.stack[-1] = bytearray(self.stack[-1])

    def load_dict(self):
        """Makes a dict of all items since the last mark."""
        items = self.pop_mark()
        self.append({})
        self.set_items(items)

    def load_setitem(self):
        """Sets one item of the dict below it on the stack."""
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self):
        """Sets all items since the last mark in the dict below them."""
        self.set_items(self.pop_mark())

    def set_items(self, items: list):
        """Sets `items`, which are key, value, key, value, ..., in the dict on top of the stack."""
        _expect(type(self.stack[-1]) is dict and len(items) % 2 == 0,
                "it sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2]):
            # Only flat keys: hashing nested tuples that share their parts can take forever.
            _expect(isinstance(key, (str, bytes, int, float)), "a key is no text and no number")
            _expect(all(type(item) is not int or abs(item) < 2**64 for item in (key, value)),
                    "a number of more than 64 bits")
            _expect(len(str(key)) <= KEY_LENGTH, "a key is very long")
            self.stack[-1][key] = value

    def load_build(self):
        """Sets the state of a dtype or a new array, which are all that have one."""
        state, target = self.stack.pop(), self.stack[-1]
        _expect(isinstance(state, tuple), "it sets a state")
        if isinstance(target, np.dtype):
            # version, byte order, nothing where fields and sub-arrays would be, sizes and flags
            _expect(len(state) >= 5 and state[1] in ("<", ">", "|", "=")
                    and state[2:5] == (None,) * 3, NO_NUMBERS)
            target.__setstate__((3, *state[1:5], target.itemsize, target.alignment, target.flags))
        else:
            _expect(type(target) is np.ndarray and target.shape == (0,) and target.flags.owndata,
                    "it sets a state")
            _expect(len(state) == 5 and state[0] == 1, "an array of an unknown layout")
            _, shape, dtype, fortran, raw = state
            raw = raw.encode("latin1") if isinstance(raw, str) else raw  # written by Python 2
            _check_size(shape, dtype, raw)
            target.__setstate__((1, shape, dtype, bool(fortran), bytes(raw)))

    dispatch = {ord(operation.code): pickle._Unpickler.dispatch[ord(operation.code)]
                if operation.name in OPERATIONS else partial(_refuse, operation.name)
                for operation in pickletools.opcodes}
    dispatch |= {pickle.BYTEARRAY8[0]: load_bytearray8, pickle.DICT[0]: load_dict,
                 pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
                 pickle.BUILD[0]: load_build}


# ------------------------------------------------------------- what the names in a pickle stand for


def _check_size(shape, dtype, raw) -> None:
    _expect(isinstance(dtype, np.dtype) and isinstance(raw, (bytes, bytearray)), NO_NUMBERS)
    _expect(isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
            and prod(shape) * dtype.itemsize == len(raw)
            and max(shape, default=0) <= max(len(raw), 2**16), "an array of a wrong size")


def _dtype(kind, *_):
    _expect(isinstance(kind, str) and KIND.fullmatch(kind), NO_NUMBERS)
    return np.dtype(kind, copy=True)


def _new_array(*_):
    return np.empty(0, np.int8)


def _scalar(dtype, raw):
    return _from_buffer(raw, dtype, (), "C")[()]


def _from_buffer(raw, dtype, shape, order, axes=None):
    _check_size(shape, dtype, raw)
    array = np.ndarray(shape, dtype, raw, order="F" if order == "F" else "C")
    return array.transpose(axes) if order == "K" else array  # axes stored in another order


def _bytes(text="", encoding="latin1"):
    return text.encode("latin1")


NAMES = {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): _dtype,
         # How protocols 0 to 2 spell bytes, and empty ones.
         ("_codecs", "encode"): _bytes, ("__builtin__", "bytes"): _bytes}
for package in ("numpy.core", "numpy._core"):  # before version 2 of NumPy, and since
    NAMES |= {(f"{package}.multiarray", "_reconstruct"): _new_array,
              (f"{package}.multiarray", "scalar"): _scalar,
              (f"{package}.numeric", "_frombuffer"): _from_buffer}
