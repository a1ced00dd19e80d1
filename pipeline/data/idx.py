"""The IDX format of MNIST and Fashion-MNIST: a big-endian header, then plain bytes.

The header is two zero bytes, the type (8 for unsigned bytes), the number of axes, and each axis as 32 bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import MIB
from pipeline.data.dataset import INTACT_COPY, Dataset, labelled
from pipeline.data.packed import read_unpacked

MAX_BYTES = 128 * MIB  # MNIST's largest file has 45 MiB
UNSIGNED_BYTE = 8
CLASSES = 10
IMAGE_SIDE = 28


def read_idx(path: Path, item: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, ``.gz``, ``.xz`` or plain.

    Args:
        path: of the file.
        item: shape of one item: ``(28, 28)`` for images, ``()`` for labels.

    Returns:
        uint8 ``(samples, *item)``, not writable.

    Raises:
        SpikeguardError: if the file is missing, too large or of another format; ``RuleViolations`` if its header
            announces other items or another number of bytes than there are.
    """
    content = read_unpacked(path, MAX_BYTES)
    axes = 1 + len(item)
    magic = bytes((0, 0, UNSIGNED_BYTE, axes))
    header = 4 + 4 * axes
    if len(content) < header or content[:4] != magic:
        raise SpikeguardError(
            f"{path} starts with {content[:4].hex() or 'nothing'}, an IDX file of {axes} axes of bytes "
            f"with {magic.hex()}; fetch the right file"
        )
    samples, *found = struct.unpack(f">{axes}I", content[4:header])
    announced = header + samples * math.prod(found)
    problems = []
    if tuple(found) != item:
        problems.append(Violation("header", "shape of an item", str(tuple(found)), str(item), "fetch the right file"))
    if announced != len(content):
        problems.append(Violation("header", "bytes", f"{len(content):,}", f"{announced:,} announced", INTACT_COPY))
    if problems:
        raise RuleViolations(str(path), problems)
    return np.frombuffer(content, np.uint8, offset=header).reshape(samples, *item)


def load_mnist(files: Mapping[str, Path]) -> tuple[Dataset, Dataset]:
    """MNIST, or Fashion-MNIST, from its four files.

    Args:
        files: paths by the names the files have when they are not packed.

    Returns:
        Training and test split; images ``(samples, 1, 28, 28)``.

    Raises:
        SpikeguardError: if a file is not what its name says.
    """
    return _load(files, "train"), _load(files, "t10k")


def _load(files: Mapping[str, Path], part: str) -> Dataset:
    images = files[f"{part}-images-idx3-ubyte"]
    codes = read_idx(images, (IMAGE_SIDE, IMAGE_SIDE))[:, None]
    labels = read_idx(files[f"{part}-labels-idx1-ubyte"], ())
    return labelled(str(images), codes, labels.astype(np.int64), CLASSES)
