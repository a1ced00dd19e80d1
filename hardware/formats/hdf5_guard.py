"""Looks through an HDF5 file from outside before anything in it is read.

A kilobyte of HDF5 can declare gigabytes, point at other files, or contain itself; readers follow all of that.
A string of variable length is the worst: the library allocates what its length field says, up to 4 GiB,
before it looks whether the file holds that much. So those fields are read from the raw file first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import MIB, require_file

MAX_FILE_BYTES = 1024 * MIB
MAX_DECLARED_BYTES = 2048 * MIB
MAX_COMPRESSION, FREE_BYTES = 1032, MIB
"""What deflate can save at most, and what may be declared without any of it being stored."""
MAX_OBJECTS = 500_000
MAX_STRINGS = 1_000_000
MAX_DEPTH = 8
STRING_REFERENCE = np.dtype([("length", "<u4"), ("heap", "<u8"), ("index", "<u4")])
"""A variable-length string as stored, in a file whose addresses have 8 bytes."""
REMEDY = "export it again, or ask whoever made it for a plain HDF5 file"


def require_plain_hdf5(path: Path) -> None:
    """Refuse an HDF5 file whose reading could follow links or take absurd memory.

    Only groups and data sets of numbers and strings are let through, each reached by exactly one hard link
    and stored in this file, their declared total size within ``MAX_DECLARED_BYTES``, and strings no longer in
    total than the file.

    Raises:
        SpikeguardError: if it is missing, too large or not HDF5; ``RuleViolations`` names what is refused.
    """
    require_file(path, MAX_FILE_BYTES)
    try:
        with h5py.File(path, "r") as file:
            problems = [*_layout_violations(file)] or list(_Walk(path, file).violations())
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, NotImplementedError) as error:
        raise SpikeguardError(f"{path} is not a readable HDF5 file ({error}); {REMEDY}") from error
    if problems:
        raise RuleViolations(str(path), problems)


def _layout_violations(file: h5py.File) -> Iterator[Violation]:
    properties = file.id.get_create_plist()
    if properties.get_sizes() != (8, 8) or properties.get_userblock() != 0:
        actual = f"{properties.get_sizes()}, user block {properties.get_userblock()}"
        yield Violation("/", "addresses have 8 bytes from the start of the file", actual, "(8, 8), 0", REMEDY)


@dataclass
class _Walk:
    """One pass over a file, counting what reading it would allocate."""

    path: Path
    file: h5py.File
    declared: int = 0
    strings: int = 0
    objects: int = 0

    def violations(self) -> Iterator[Violation]:
        """Everything in the file that is refused."""
        seen = {_address(self.file)}
        pending: list[tuple[h5py.Group, int]] = [(self.file, 1)]
        while pending:
            group, depth = pending.pop()
            if depth > MAX_DEPTH:
                yield Violation(group.name, "groups are nested little", f"{depth} deep", f"{MAX_DEPTH}", REMEDY)
                continue
            for name in group:
                self.objects += 1
                if self.objects > MAX_OBJECTS:
                    yield Violation(group.name, "file holds few objects", "more", f"{MAX_OBJECTS:,}", REMEDY)
                    return
                where = f"{group.name.rstrip('/')}/{name}"
                link = group.get(name, getlink=True)
                if not isinstance(link, h5py.HardLink):
                    yield Violation(where, "is in this file", type(link).__name__, "no links", REMEDY)
                    continue
                item = group[name]
                if _address(item) in seen:
                    yield Violation(where, "is reached once", "a second hard link", "one", REMEDY)
                    continue
                seen.add(_address(item))
                if isinstance(item, h5py.Group):
                    pending.append((item, depth + 1))
                elif isinstance(item, h5py.Dataset):
                    yield from self._count(item, where)
                else:
                    yield Violation(where, "is a group or data set", type(item).__name__, "no other", REMEDY)
        size = self.path.stat().st_size
        if self.declared > MAX_DECLARED_BYTES:
            yield Violation("/", "declared size", f"{self.declared:,} bytes", f"{MAX_DECLARED_BYTES:,}", REMEDY)
        if self.strings > size:
            yield Violation("/", "strings fit the file", f"{self.strings:,} bytes", f"{size:,}", REMEDY)

    def _count(self, item: h5py.Dataset, where: str) -> Iterator[Violation]:
        """Refuse an unusual data set; add up what the others would allocate."""
        kind = item.dtype.kind
        is_string = h5py.check_string_dtype(item.dtype) is not None
        if item.external is not None or item.is_virtual:
            yield Violation(where, "is stored in this file", "elsewhere", "no external or virtual data", REMEDY)
        elif not (kind in "fiub" or is_string):
            yield Violation(where, "holds numbers or strings", str(item.dtype), "float, integer, string", REMEDY)
        elif item.compression not in (None, "gzip", "lzf"):
            yield Violation(where, "compression is known", str(item.compression), "none, gzip, lzf", REMEDY)
        elif kind == "O":
            elements, offset = int(item.size or 0), item.id.get_offset()
            if offset is None or elements > MAX_STRINGS:
                actual = f"{elements:,} {'strings' if offset else 'strings in chunks'}"
                limit = f"up to {MAX_STRINGS:,}, contiguous"
                yield Violation(where, "strings are few and stored plainly", actual, limit, REMEDY)
                return
            references = np.fromfile(self.path, STRING_REFERENCE, elements, offset=offset)
            self.strings += int(references["length"].astype(np.uint64).sum())
        else:
            declared, stored = _declared_bytes(item), int(item.id.get_storage_size())
            self.declared += declared
            if declared > FREE_BYTES + MAX_COMPRESSION * stored:
                actual, limit = f"{declared:,} bytes of {stored:,} stored", f"{MAX_COMPRESSION} times as much"
                yield Violation(where, "what is declared is stored", actual, limit, REMEDY)


def _declared_bytes(item: h5py.Dataset) -> int:
    """What reading would allocate: the array, or one chunk of it if that is larger."""
    elements = int(item.size or 0)
    if item.chunks:
        chunk = 1
        for size in item.chunks:
            chunk *= int(size)
        elements = max(elements, chunk)
    return elements * int(item.dtype.itemsize)


def _address(item: h5py.HLObject) -> tuple[int, int]:
    info = h5py.h5o.get_info(item.id)
    return int(info.fileno), int(info.addr)
