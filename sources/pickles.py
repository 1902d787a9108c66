"""Pickles of NumPy arrays and plain containers, read without calling anything that a file names.

Python's unpickler imports what a file asks for and lets it set any object's state; a forged dtype
alone makes NumPy follow pointers out of the file. Here the standard library only cuts the file into
operations (`pickletools.genops`); the few that arrays need are carried out below on plain values,
and all others are refused. Arrays are built from a checked kind, shape and number of bytes.
"""

import mmap
import pickle
import pickletools
import re
from math import prod

import numpy as np

from sources.files import readable

# What a pickle may name; each stands for a rule in `_reduce` and is never called.
NAMES = {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): "dtype",
         # How protocols 0 to 2 spell bytes, and empty ones.
         ("_codecs", "encode"): "bytes", ("__builtin__", "bytes"): "bytes"}
for package in ("numpy.core", "numpy._core"):  # before version 2 of NumPy, and since
    NAMES |= {(f"{package}.multiarray", "_reconstruct"): "array",
              (f"{package}.multiarray", "scalar"): "scalar",
              (f"{package}.numeric", "_frombuffer"): "buffer"}
KIND = re.compile(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,3}")  # of a dtype: no objects, no fields
NO_NUMBERS = "an array of objects or records; give numbers"
KEY_LENGTH = 1000  # characters
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = ("INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
            "SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES "
            "SHORT_BINBYTES BINBYTES8 BYTEARRAY8").split()
# How many items an operation takes from the stack; MARKED ones take all since the last mark.
TAKES = {"APPEND": 1, "SETITEM": 2, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "STACK_GLOBAL": 2,
         "REDUCE": 2, "BUILD": 2}
MARKED = ("LIST", "DICT", "TUPLE", "APPENDS", "SETITEMS")


class Name(str):
    """One of `NAMES` on the stack."""


class Unfinished:
    """A dtype (kind such as "f8") or an "array" that waits for its state, the operation BUILD."""

    def __init__(self, kind: str):
        self.kind, self.memo_keys = kind, []  # where it was stored meanwhile


def read_pickle(file):
    """The content of a pickle of any protocol, by Python 2 or 3 and any NumPy: dict, list, tuple,
    str, bytes, numbers, None and arrays. DataError for all else; nothing in the file is run."""
    with readable(file, "pickle of arrays"), open(file, "rb") as raw, \
            mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _run(pickletools.genops(content))


def _run(operations):
    """Carries out the operations, as `pickle.py` does: a stack, marks in it, and a memo."""
    stack, marks, memo = [], [], {}
    for operation, value, _ in operations:
        name = operation.name
        start = marks.pop() if name in MARKED else len(stack) - TAKES.get(name, 0)
        _expect(start >= 0, "it takes more than there is")
        items = stack[start:]
        del stack[start:]
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in LITERALS:
            _expect(type(value) is not int or abs(value) < 2**64, "a number of more than 64 bits")
            stack.append(value)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            key = len(memo) if name == "MEMOIZE" else value
            memo[key] = stack[-1]
            if isinstance(stack[-1], Unfinished):
                stack[-1].memo_keys.append(key)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name in ("EMPTY_LIST", "LIST"):
            stack.append(items)
        elif name in ("APPEND", "APPENDS"):
            _expect(isinstance(stack[-1], list), "it appends to something that is no list")
            stack[-1].extend(items)
        elif name in ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(items))
        elif name in ("EMPTY_DICT", "DICT"):
            stack.append({})
            _set_items(stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            _set_items(stack[-1], items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_name(*(value.split(" ", 1) if value else items)))
        elif name == "REDUCE":
            stack.append(_reduce(*items))
        elif name == "BUILD":
            stack.append(_build(*items))
            for key in items[0].memo_keys:
                memo[key] = stack[-1]
        else:
            raise pickle.UnpicklingError(f"it calls for {name}, which no array needs; not run")
    raise pickle.UnpicklingError("it ends early")


def _expect(condition: bool, fault: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(fault)


def _set_items(table, items: list) -> None:
    """items: key, value, key, value, ..."""
    _expect(type(table) is dict and len(items) % 2 == 0, "it sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2]):
        # Only flat keys: hashing nested tuples that share their parts can take for ever.
        _expect(isinstance(key, (str, bytes, int, float)), "a key is neither a text nor a number")
        _expect(len(str(key)) <= KEY_LENGTH, "a key is very long")
        table[key] = value


def _name(module, attribute) -> Name:
    _expect(isinstance(module, str) and isinstance(attribute, str), "it calls for what is no name")
    _expect((module, attribute) in NAMES, f"it calls for {module:.50}.{attribute:.50}, which no "
            "array needs and which could run anything; it was not run")
    return Name(NAMES[module, attribute])


def _reduce(function, arguments):
    """What calling `function` gives, as far as arrays need it."""
    _expect(isinstance(function, Name) and isinstance(arguments, tuple), "it calls what is no name")
    if function == "dtype" and arguments and isinstance(arguments[0], str):
        _expect(KIND.fullmatch(arguments[0]), NO_NUMBERS)
        return Unfinished(arguments[0])
    if function == "bytes" and len(arguments) in (0, 2):
        return arguments[0].encode("latin1") if arguments else b""
    if function == "array" and isinstance(arguments[0], Name) and arguments[0] == "ndarray":
        return Unfinished("array")
    if function == "scalar" and len(arguments) == 2:
        return _array((), *arguments, "C")[()]
    if function == "buffer" and len(arguments) in (4, 5):
        raw, dtype, shape, order, *axes = arguments
        array = _array(shape, dtype, raw, "F" if order == "F" else "C")
        return array.transpose(axes[0]) if order == "K" else array  # axes stored in another order
    raise pickle.UnpicklingError(f"it calls {function} with arguments that no array needs")


def _build(waiting, state):
    """The dtype or array with this state, in the layouts that NumPy writes."""
    _expect(isinstance(waiting, Unfinished) and isinstance(state, tuple), "it sets a state")
    if waiting.kind == "array":
        _expect(len(state) == 5 and state[0] == 1, "an array of an unknown layout")
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # written by Python 2
        return _array(shape, dtype, raw, "F" if fortran else "C")
    # (version, byte order, nothing where fields and sub-arrays would be, sizes and flags: unused)
    _expect(len(state) >= 5 and state[1] in ("<", ">", "|", "=") and state[2:5] == (None,) * 3,
            NO_NUMBERS)
    return np.dtype(state[1] + waiting.kind)


def _array(shape, dtype, raw, order: str) -> np.ndarray:
    _expect(isinstance(dtype, np.dtype) and isinstance(raw, (bytes, bytearray)), NO_NUMBERS)
    _expect(isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
            and prod(shape) * dtype.itemsize == len(raw)
            and max(shape, default=0) <= max(len(raw), 2**16), "an array of a wrong size")
    return np.ndarray(shape, dtype, raw, order=order)
