"""Reads files that may be compressed, never unpacking more than asked for."""

from __future__ import annotations

import lzma
import zlib
from pathlib import Path

from hardware.errors import SpikeguardError
from hardware.files import MIB, read_bytes

PACKED = ("", ".gz", ".xz")
"""Endings a file may have: as it is, gzip, xz."""
GZIP_FORMAT = 31  # zlib's code for a gzip header and checksum around 32 KiB of history
MAX_XZ_MEMORY = 256 * MIB  # xz -9 needs 65 MiB to unpack; a header may ask for 4 GiB


def read_unpacked(path: Path, limit: int) -> bytes:
    """Contents of a file, unpacked if its name ends in ``.gz`` or ``.xz``.

    Args:
        path: of the file.
        limit: bytes it may have, packed and unpacked; unpacking stops there.

    Raises:
        SpikeguardError: if it is missing, too large, truncated or spoilt.
    """
    content = read_bytes(path, limit)
    if path.suffix not in PACKED[1:]:
        return content
    unpacker = (
        zlib.decompressobj(GZIP_FORMAT)
        if path.suffix == ".gz"
        else lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)
    )
    try:
        unpacked = unpacker.decompress(content, limit + 1)
    except (zlib.error, lzma.LZMAError) as error:
        raise SpikeguardError(f"{path} cannot be unpacked ({error}); fetch an intact copy") from error
    if len(unpacked) > limit:
        raise SpikeguardError(f"{path} unpacks to more than the {limit:,} bytes allowed here; is it the right file?")
    if not unpacker.eof or unpacker.unused_data:
        state = "goes on after its end" if unpacker.eof else "is truncated"
        raise SpikeguardError(f"{path} {state}; fetch an intact copy")
    return unpacked
