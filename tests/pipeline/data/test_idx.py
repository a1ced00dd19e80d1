from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.data.idx import load_mnist, read_idx
from tests.pipeline.data.files import PACKERS, idx_bytes, random_images, write_mnist

NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
IMAGES = random_images(3, (1, 28, 28), 10).codes[:, 0]


def written(folder: Path, content: bytes) -> Path:
    path = folder / "file"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", PACKERS)
def test_all_four_files_are_read(tmp_path: Path, ending: str) -> None:
    train, test = random_images(30, (1, 28, 28), 10, 1), random_images(20, (1, 28, 28), 10, 2)
    write_mnist(tmp_path, train, test, ending)
    for read, data in zip(load_mnist({name: tmp_path / (name + ending) for name in NAMES}), (train, test), strict=True):
        assert np.array_equal(read.codes, data.codes)
        assert np.array_equal(read.labels, data.labels)
        assert (read.codes.dtype, read.labels.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        b"text that is no header at all",
        idx_bytes(IMAGES)[:10],
        b"\x00\x00\x09" + idx_bytes(IMAGES)[3:],  # signed bytes
        b"\x00\x00\x0d" + idx_bytes(IMAGES)[3:],  # floats
        b"\x01" + idx_bytes(IMAGES)[1:],
        idx_bytes(np.zeros(3, np.uint8)),  # labels for images
    ],
)
def test_a_wrong_magic_number_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SpikeguardError, match="an IDX file of 3 axes of bytes with 00000803"):
        read_idx(written(tmp_path, content), (28, 28))


@pytest.mark.parametrize("content", [idx_bytes(IMAGES)[:-1], idx_bytes(IMAGES) + b"x", idx_bytes(IMAGES)[:16]])
def test_a_header_that_announces_other_bytes_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(RuleViolations, match=r"2,368 announced"):
        read_idx(written(tmp_path, content), (28, 28))


def test_a_header_of_terabytes_is_refused_without_them(tmp_path: Path) -> None:
    header = struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 28, 28)
    with pytest.raises(RuleViolations, match="3,367,254,359,296 announced"):
        read_idx(written(tmp_path, header + b"x"), (28, 28))


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuleViolations, match=r"has \(20, 28\), allowed \(28, 28\)"):
        read_idx(written(tmp_path, idx_bytes(IMAGES[:, :20])), (28, 28))


def test_images_without_as_many_labels_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, random_images(30, (1, 28, 28), 10), random_images(20, (1, 28, 28), 10))
    (tmp_path / NAMES[1]).write_bytes((tmp_path / NAMES[3]).read_bytes())
    with pytest.raises(RuleViolations, match="one per image"):
        load_mnist({name: tmp_path / name for name in NAMES})


def test_a_label_of_no_class_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, random_images(30, (1, 28, 28), 11), random_images(20, (1, 28, 28), 10))
    with pytest.raises(RuleViolations, match=r"has 0 .. 10, allowed 0 .. 9"):
        load_mnist({name: tmp_path / name for name in NAMES})


def test_no_images_are_refused(tmp_path: Path) -> None:
    none = random_images(0, (1, 28, 28), 10)
    write_mnist(tmp_path, none, none)
    with pytest.raises(RuleViolations, match="there are some"):
        load_mnist({name: tmp_path / name for name in NAMES})
