"""Pickles that do harm: none may be carried out, and each is one clear error."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.errors import SpikeguardError
from pipeline.data.plain_pickle import load_plain_pickle
from tests.pipeline.data.files import python2_pickle

ARRAY = np.arange(12, dtype=np.uint8).reshape(3, 4)
GOOD = python2_pickle({"data": ARRAY, "labels": [1, 2, 300], "names": ["a", "b"], "text": "words"})


def refused(content: bytes) -> str:
    with pytest.raises(SpikeguardError, match=r"^file is no pickle of plain arrays and text") as caught:
        load_plain_pickle(content, "file")
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_plain_values_are_read() -> None:
    values = load_plain_pickle(GOOD, "file")
    assert np.array_equal(values.pop("data"), ARRAY)
    assert values == {"labels": [1, 2, 300], "names": [b"a", b"b"], "text": b"words"}


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("array", [ARRAY, np.asfortranarray(ARRAY), ARRAY[:0]])
def test_arrays_of_python_3_come_out_equal_or_are_refused(protocol: int, array: np.ndarray[Any, Any]) -> None:
    content = pickle.dumps({"data": array}, protocol)
    if protocol == 3:  # the only one that writes bytes as bytes, and frames nothing
        read = load_plain_pickle(content, "file")["data"]
        assert read.shape == array.shape
        assert np.array_equal(read, array)
    else:
        refused(content)


class Calls:
    """Unpickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_does_not_run_it(tmp_path: Path, protocol: int) -> None:
    victim = tmp_path / "victim"
    attacks = [
        Calls(os.system, f"touch {victim}"),
        Calls(eval, f"open({str(victim)!r}, 'w')"),
        Calls(open, str(victim), "w"),
        Calls(os.mkdir, str(victim)),
    ]
    for attack in attacks:
        for value in ({"data": attack}, attack, {"labels": [1, attack]}):
            content = pickle.dumps(value, protocol)
            refused(content)
            assert not victim.exists()
            if protocol == 2 and value is attack:  # it would have worked
                pickle.loads(content)
                assert victim.exists()
                victim.rmdir() if victim.is_dir() else victim.unlink()


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict(data=1),
        Fraction(1, 2),
        np.uint8(3),
        np.array([object()]),
        np.array([{"a": 1}], dtype=object),
        np.zeros(3),
        np.zeros(3, np.int64),
        np.zeros(3, "S1"),
        np.zeros(3, [("a", "u1")]),
        np.zeros(3, "M8[s]"),
        np.ma.zeros(3),
        np.matrix([1]),
        {1, 2},
        frozenset([1]),
        1.5,
        1j,
        bytearray(b"x"),
        len,
        Calls,
        np,
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
@pytest.mark.parametrize("protocol", [2, 3])
def test_anything_but_plain_values_is_refused(value: Any, protocol: int) -> None:
    content = b"\x80\x02}U\x04datacnumpy\nload\ns." if value is np else pickle.dumps({"data": value}, protocol)
    refused(content)


def array_pickle(code: bytes, dtype_state: bytes, rest: bytes) -> bytes:
    return (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + rest[:0] + b"K\x02\x85cnumpy\ndtype\nU" + bytes([len(code)]) + code + b"K\x00K\x01\x87R"
        b"(K\x03U\x01|" + dtype_state + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + rest + b"tbs."
    )


def test_arrays_written_by_hand() -> None:
    good = load_plain_pickle(array_pickle(b"u1", b"NNN", b"U\x02ab"), "file")
    assert good["data"].tolist() == [97, 98]
    assert "type b'O8'" in refused(array_pickle(b"O8", b"NNN", b"](K\x01K\x02e"))
    assert "type b'f8'" in refused(array_pickle(b"f8", b"NNN", b"U\x10" + bytes(16)))
    assert "fields" in refused(array_pickle(b"u1", b"NN}", b"U\x02ab"))
    assert "plain bytes" in refused(array_pickle(b"u1", b"NNN", b"](K\x01K\x02e"))
    assert "reshape" in refused(array_pickle(b"u1", b"NNN", b"U\x03abc"))


@pytest.mark.parametrize(
    "value",
    [
        b"cnumpy\nndarray\nJ\x00\x00\x00\x7f\x85R",  # an array of 2 GB
        b"cnumpy\ndtype\nU\x01O\x85R",
        b"cnumpy.core.multiarray\n_reconstruct\nNNN\x87R",
        b"cnumpy.core.multiarray\n_reconstruct\n}U\x08__dict__K\x01sb",  # state for a class of ours
        b"cnumpy\ndtype\n}U\x0c__setstate__Nsb",
        b"cnumpy\nndarray\n}U\x01xK\x01sb",
        b"cnumpy.core.multiarray\nscalar\n",
        b"cnumpy\n__builtins__\n",
        b"cnumpy\nndarray.__class__\n",
        b"cbuiltins\neval\nU\x011\x85R",
        b"c__builtin__\neval\nU\x011\x85R",
        b"ios\nsystem\n",
        b"(U\x04trueios\nsystem\n",
        b"\x82\x01",
        b"Pname\n",
        b"U\x04nameQ",
        b"K\x01R",
        b"K\x01K\x02b",
        b"2",
    ],
)
def test_hostile_opcodes_are_refused(value: bytes) -> None:
    refused(b"\x80\x02}U\x04data" + value + b"s.")


def test_a_pickle_that_is_no_dictionary_of_text_is_refused() -> None:
    assert "holds list" in refused(python2_pickle([1, 2]))
    assert "a key is int" in refused(python2_pickle({3: 4}))
    refused(python2_pickle({b"\xff": 4}))


def test_a_huge_memo_is_refused_before_it_is_made() -> None:
    content = b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b"."
    assert "stores value 1 as number 2147483647" in refused(content)


def test_announced_gigabytes_that_are_not_there_are_refused() -> None:
    for opcode, size in (
        (b"T", struct.pack("<i", 2**31 - 1)),
        (b"X", struct.pack("<I", 2**32 - 1)),
        (b"B", b"\xff" * 4),
    ):
        refused(b"\x80\x02}U\x04data" + opcode + size + b"abc" + b"s.")


def test_tuples_of_tuples_that_double_are_refused_at_once() -> None:
    """As a key they would be hashed leaf by leaf, a billion times a billion of them."""
    key = b")q\x01" + b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(1, 61))
    start = time.perf_counter()
    assert "a tuple twice" in refused(b"\x80\x02}" + key + b"K\x01s.")
    assert time.perf_counter() - start < 5


def test_every_truncation_is_refused() -> None:
    for end in range(len(GOOD)):
        refused(GOOD[:end])


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_spoilt_pickle_is_plain_or_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for position, value in changes:
        content[position] = value
    try:
        values = load_plain_pickle(bytes(content), "file")
    except SpikeguardError:
        return
    assert all(
        isinstance(value, np.ndarray | list | bytes | str | int | tuple | dict | None) for value in values.values()
    )


@given(st.binary(max_size=200))
def test_noise_is_refused(content: bytes) -> None:
    refused(content)


def test_the_writer_of_these_tests_writes_what_python_reads() -> None:
    values = pickle.Unpickler(io.BytesIO(GOOD), encoding="latin1").load()
    assert np.array_equal(values["data"], ARRAY)
    assert values["data"].dtype == np.uint8
