"""SVHN, cropped digits (format 2), from the MATLAB files its authors publish.

Y. Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import MIB, read_bytes
from pipeline.data.dataset import INTACT_COPY, Dataset, labelled

TRAIN, TEST = "train_32x32.mat", "test_32x32.mat"
MAX_BYTES = 512 * MIB  # the training images have 215 MiB unpacked
CLASSES = 10
HEADER_BYTES = 128
LITTLE_ENDIAN_5 = b"\x00\x01IM"  # version and byte order, at the end of the header
TAG = struct.Struct("<II")  # type and size of an element
MATRIX, COMPRESSED = 14, 15


def read_mat(path: Path) -> Dataset:
    """Read the images ``X`` (32, 32, 3, samples) and the labels ``y`` (samples, 1) of a MATLAB 5 file.

    Returns:
        Images ``(samples, 3, 32, 32)``; label 10, the digit 0, is class 0.

    Raises:
        SpikeguardError: if the file is missing, too large packed or unpacked, or holds something else.
    """
    from scipy.io import loadmat, whosmat

    content = io.BytesIO(_unpacked(path))
    try:
        declared = whosmat(content)
        _require_images(path, declared)
        content.seek(0)
        arrays = loadmat(content, variable_names=["X", "y"])
    except SpikeguardError:
        raise
    except Exception as error:  # a spoilt file makes scipy's reader raise almost anything
        raise SpikeguardError(f"{path} is not a readable MATLAB file ({error}); {INTACT_COPY}") from error
    labels = arrays["y"].ravel()
    if not np.isin(labels, np.arange(1, CLASSES + 1)).all():
        found = f"{labels.min()} .. {labels.max()}"
        remedy = "fetch the original, where 10 stands for the digit 0"
        raise RuleViolations(str(path), [Violation("y", "labels", found, f"1 .. {CLASSES}", remedy)])
    codes = np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1))
    return labelled(str(path), codes, labels.astype(np.int64) % CLASSES, CLASSES)


def _require_images(path: Path, declared: list[tuple[str, tuple[int, ...], str]]) -> None:
    """Judge names, shapes and types before the arrays are made: a small element may declare a large one."""
    found = [f"{name} {kind} {shape}" for name, shape, kind in declared]
    by_name = {name: (shape, kind) for name, shape, kind in declared}
    images, labels = by_name.get("X"), by_name.get("y")
    if (
        len(declared) != 2
        or images is None
        or labels is None
        or images[1] != "uint8"
        or images[0][:3] != (32, 32, 3)
        or labels[1] not in ("uint8", "int32", "double")
        or labels[0] != (*images[0][3:], 1)
        or labels[0][0] * 3 * 32 * 32 > MAX_BYTES
    ):
        limit = "X uint8 (32, 32, 3, samples), y (samples, 1)"
        remedy = "fetch the cropped digits (format 2)"
        raise RuleViolations(str(path), [Violation("arrays", "are images and labels", str(found), limit, remedy)])


def _unpacked(path: Path) -> bytes:
    """The file with its compressed elements replaced by what they hold, at most ``MAX_BYTES``."""
    content = read_bytes(path, MAX_BYTES)
    if content[HEADER_BYTES - 4 : HEADER_BYTES] != LITTLE_ENDIAN_5:
        raise SpikeguardError(f"{path} is not a MATLAB 5 file; fetch the original")
    try:
        return b"".join([content[:HEADER_BYTES], *_elements(content)])
    except (struct.error, zlib.error, ValueError) as error:
        raise SpikeguardError(f"{path} cannot be unpacked ({error}); {INTACT_COPY}") from error


def _elements(content: bytes) -> Iterator[bytes]:
    left = MAX_BYTES
    position = HEADER_BYTES
    while position < len(content):
        kind, size = TAG.unpack_from(content, position)
        position += TAG.size
        element = content[position : position + size]
        if len(element) < size:
            raise ValueError("it is truncated")
        position += size
        if kind != COMPRESSED:
            raise ValueError(f"an element is of type {kind}, expected a compressed one")
        unpacker = zlib.decompressobj()
        matrix = unpacker.decompress(element, left + 1)
        left -= len(matrix)
        if left < 0:
            raise ValueError(f"it unpacks to more than {MAX_BYTES:,} bytes")
        inner, length = TAG.unpack_from(matrix)
        # scipy would unpack a compressed element within, without a limit.
        if not unpacker.eof or inner != MATRIX or len(matrix) != TAG.size + length:
            raise ValueError("an element holds no whole matrix")
        yield matrix


def load_svhn(files: Mapping[str, Path]) -> tuple[Dataset, Dataset]:
    """SVHN, without its extra training images.

    Args:
        files: paths of ``train_32x32.mat`` and ``test_32x32.mat`` by name.

    Returns:
        Training and test split; images ``(samples, 3, 32, 32)``, class = digit.

    Raises:
        SpikeguardError: if a file is not what its name says.
    """
    return read_mat(files[TRAIN]), read_mat(files[TEST])
