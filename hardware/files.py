"""Reading and writing files: atomic writes, checksums, arrays without pickle, size limits before parsing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import SpikeguardError

MIB = 2**20
MAX_JSON_BYTES = 16 * MIB
MAX_ARRAYS_BYTES = 4096 * MIB


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; it takes ``path``'s place when the block ends well, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder; it takes ``path``'s place (an old one is removed) when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: sorted keys, finite numbers only."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON of at most ``MAX_JSON_BYTES``.

    Raises:
        SpikeguardError: if the file is missing, too large or not JSON.
    """
    try:
        return json.loads(read_bytes(path, MAX_JSON_BYTES))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SpikeguardError(f"{path} is not JSON ({error}); write it again with the tool that made it") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a whole file after checking its size.

    Raises:
        SpikeguardError: if it is missing or larger than ``limit`` bytes.
    """
    require_file(path, limit)
    return path.read_bytes()


def require_file(path: Path, limit: int) -> None:
    """Refuse a missing file, or one larger than ``limit`` bytes."""
    if not path.is_file():
        raise SpikeguardError(f"{path} does not exist; check the path or export the bundle again")
    size = path.stat().st_size
    if size > limit:
        raise SpikeguardError(f"{path} has {size:,} bytes, more than the {limit:,} allowed here; is it the right file?")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write plain arrays to a compressed .npz atomically; the same arrays give the same bytes."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        _write_archive(file, arrays)


def arrays_as_bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """What :func:`write_arrays` writes."""
    buffer = io.BytesIO()
    _write_archive(buffer, arrays)
    return buffer.getvalue()


def _write_archive(file: IO[bytes], arrays: Mapping[str, NDArray[Any]]) -> None:
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"array {name} holds Python objects")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asanyarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue(), zipfile.ZIP_DEFLATED)


def read_arrays(path: Path, limit: int = MAX_ARRAYS_BYTES) -> dict[str, NDArray[Any]]:
    """Read an .npz of plain arrays; no pickles, and its unpacked size is checked before anything is unpacked.

    Raises:
        SpikeguardError: if the file is missing, not an .npz, too large, or holds Python objects.
    """
    require_file(path, limit)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > limit:
            raise SpikeguardError(f"{path} unpacks to {unpacked:,} bytes, more than the {limit:,} allowed here")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, OSError) as error:
        raise SpikeguardError(f"{path} is not a readable .npz of plain arrays ({error})") from error
