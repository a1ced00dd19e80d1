from __future__ import annotations

import gzip
import lzma
import tracemalloc
from pathlib import Path

import pytest

from hardware.errors import SpikeguardError
from pipeline.data.packed import read_unpacked
from tests.pipeline.data.files import PACKERS

CONTENT = bytes(range(256)) * 40
LIMIT = 20_000


def written(folder: Path, ending: str, content: bytes) -> Path:
    path = folder / f"file{ending}"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", PACKERS)
def test_what_was_packed_is_read(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path, ending, PACKERS[ending](CONTENT))
    assert read_unpacked(path, LIMIT) == CONTENT
    assert read_unpacked(path, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("ending", PACKERS)
def test_one_byte_too_many_is_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(SpikeguardError, match="more than the 10,239"):
        read_unpacked(written(tmp_path, ending, PACKERS[ending](CONTENT)), len(CONTENT) - 1)


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_a_bomb_is_not_unpacked(tmp_path: Path, ending: str) -> None:
    """40 MB in some kilobytes, which must never be in memory."""
    path = written(tmp_path, ending, PACKERS[ending](bytes(40_000_000)))
    assert path.stat().st_size < 80_000
    tracemalloc.start()
    with pytest.raises(SpikeguardError, match="unpacks to more than"):
        read_unpacked(path, 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_xz_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**30}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}])
    small = compressor.compress(CONTENT) + compressor.flush()
    assert read_unpacked(written(tmp_path, ".xz", small), LIMIT) == CONTENT
    large = _with_dictionary_size(small, filters)
    with pytest.raises(SpikeguardError, match="cannot be unpacked"):
        read_unpacked(written(tmp_path, ".xz", large), LIMIT)


def _with_dictionary_size(content: bytes, filters: list[dict[str, int]]) -> bytes:
    """The same file, its block header asking for another dictionary."""
    import zlib

    start = 12  # after the stream header
    length = (content[start] + 1) * 4
    header = bytearray(content[start : start + length - 4])
    properties = lzma._encode_filter_properties(filters[0])  # type: ignore[attr-defined]
    position = header.index(b"\x21\x01") + 2  # filter LZMA2 with one byte of properties
    header[position : position + 1] = properties
    checksum = zlib.crc32(header).to_bytes(4, "little")
    return content[:start] + bytes(header) + checksum + content[start + length :]


@pytest.mark.parametrize("ending", [".gz", ".xz"])
@pytest.mark.parametrize("kept", [0, 1, 10, 0.5, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, ending: str, kept: float) -> None:
    packed = PACKERS[ending](CONTENT)
    end = int(kept * len(packed)) if isinstance(kept, float) else kept
    with pytest.raises(SpikeguardError, match="is truncated"):
        read_unpacked(written(tmp_path, ending, packed[:end]), LIMIT)


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_a_spoilt_file_and_one_of_another_kind_are_refused(tmp_path: Path, ending: str) -> None:
    packed = bytearray(PACKERS[ending](CONTENT))
    packed[len(packed) // 2] ^= 0xFF
    for content in (bytes(packed), CONTENT, PACKERS[{".gz": ".xz", ".xz": ".gz"}[ending]](CONTENT)):
        with pytest.raises(SpikeguardError, match="cannot be unpacked"):
            read_unpacked(written(tmp_path, ending, content), LIMIT)


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_what_comes_after_the_end_is_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(SpikeguardError, match="goes on after its end"):
        read_unpacked(written(tmp_path, ending, PACKERS[ending](CONTENT) * 2), LIMIT)


def test_a_checksum_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(CONTENT))
    packed[-6] ^= 1
    with pytest.raises(SpikeguardError, match="cannot be unpacked"):
        read_unpacked(written(tmp_path, ".gz", bytes(packed)), LIMIT)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpikeguardError, match=r"nowhere\.gz does not exist"):
        read_unpacked(tmp_path / "nowhere.gz", LIMIT)
