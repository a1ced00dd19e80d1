"""Unpickles plain values only, for a data set that is published as pickles.

A pickle is a program: unrestricted, it calls whatever it names. Here it can make numbers, text, bytes, lists, tuples,
dictionaries and arrays of unsigned bytes, and nothing else. Three guards stand in its way, each for what the others
let through: the opcodes are read through first, and all but those of plain values refused; names are looked up
in ``ADMITTED`` alone; and what is found there is not numpy's but a stand-in that does nothing but check
and keep, as numpy trusts the state it is handed.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import SpikeguardError

ENDS = frozenset({"PROTO", "STOP"})
NUMBERS = frozenset({"NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG1"})
TEXTS = frozenset({"SHORT_BINSTRING", "BINSTRING", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES"})
TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
CONTAINERS = frozenset({"MARK", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"})
OBJECTS = frozenset({"GLOBAL", "REDUCE", "BUILD"})
STORES = frozenset({"BINPUT", "LONG_BINPUT"})
RECALLS = frozenset({"BINGET", "LONG_BINGET"})
PLAIN = ENDS | NUMBERS | TEXTS | TUPLES | CONTAINERS | OBJECTS | STORES | RECALLS
"""Opcodes that binary pickles of plain values and arrays are made of, up to protocol 3."""
NDARRAY = "numpy.ndarray"
MAX_SHOWN = 100


class _Array:
    """Stands in for ``numpy.core.multiarray._reconstruct`` and for the array it makes."""

    def __init__(self, kind: object, _shape: object, _code: object) -> None:
        if kind is not NDARRAY:
            raise pickle.UnpicklingError("an array is no numpy.ndarray")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array holds something else than plain bytes")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran_order else "C")


class _Dtype:
    """Stands in for ``numpy.dtype``; unsigned bytes are the only type there is."""

    def __init__(self, code: object, _align: object = False, _copy: object = False) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array is of type {code!r:.20}, expected unsigned bytes")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, _order, *structure, _size, _alignment, _flags = state
        if any(part is not None for part in structure):
            raise pickle.UnpicklingError("an array has fields")


ADMITTED: Mapping[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}"[:MAX_SHOWN]) from None


def load_plain_pickle(content: bytes, subject: str) -> dict[str, Any]:
    """Unpickle a dictionary of plain values by name.

    Args:
        content: the pickle, already limited in size.
        subject: the file it comes from, for the message.

    Returns:
        Values by key; strings of Python 2 are bytes, but keys are text. Arrays are uint8 and not writable.

    Raises:
        SpikeguardError: if the pickle is spoilt, or holds or does anything else.
    """
    try:
        _require_plain(content)
        values = _Unpickler(io.BytesIO(content), fix_imports=False, encoding="bytes").load()
        if not isinstance(values, dict):
            raise pickle.UnpicklingError(f"it holds {type(values).__name__}, expected a dictionary")
        return {_text(key): _plain(value) for key, value in values.items()}
    except Exception as error:  # a spoilt pickle raises whatever the opcode raises that it spoils
        raise SpikeguardError(
            f"{subject} is no pickle of plain arrays and text ({error}); fetch the original"
        ) from error


def _require_plain(content: bytes) -> None:
    """Refuse opcodes of anything but plain values, and two that are plain but can take memory or time without end."""
    tuples: set[int] = set()
    stored = 0
    before = ""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in PLAIN:
            raise pickle.UnpicklingError(f"it uses opcode {opcode.name}")
        if opcode.name in STORES and argument is not None:
            # Writers count up; the unpickler makes room for as many values as the largest number says.
            stored += 1
            if argument > stored:
                raise pickle.UnpicklingError(f"it stores value {stored} as number {argument}")
            if before in TUPLES:
                tuples.add(argument)
            else:
                tuples.discard(argument)
        # Tuples of one tuple twice, thirty deep, have a billion leaves to hash.
        if opcode.name in RECALLS and argument in tuples:
            raise pickle.UnpicklingError("it uses a tuple twice")
        before = opcode.name


def _text(key: object) -> str:
    if isinstance(key, bytes):
        return key.decode()
    if not isinstance(key, str):
        raise pickle.UnpicklingError(f"a key is {type(key).__name__}, expected text")
    return key


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        values: NDArray[np.uint8] = value.values
        return values
    return value
