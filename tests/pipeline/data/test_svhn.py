from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.data import svhn
from pipeline.data.svhn import load_svhn, read_mat
from tests.pipeline.data.files import random_images, write_svhn


def test_images_are_upright_and_label_10_is_digit_0(tmp_path: Path) -> None:
    train, test = random_images(25, (3, 32, 32), 10, 1), random_images(12, (3, 32, 32), 10, 2)
    write_svhn(tmp_path, train, test)
    raw = scipy.io.loadmat(tmp_path / "train_32x32.mat")
    assert raw["X"].shape == (32, 32, 3, 25)
    assert raw["y"][[0, 1, 10]].ravel().tolist() == [10, 1, 10]
    files = {path.name: path for path in tmp_path.iterdir()}
    for read, data in zip(load_svhn(files), (train, test), strict=True):
        assert np.array_equal(read.codes, data.codes)
        assert np.array_equal(read.labels, data.labels)
        assert read.codes.flags.c_contiguous
        assert (read.codes.dtype, read.labels.dtype) == (np.uint8, np.int64)
    y, x, channel, sample = 3, 30, 1, 7
    assert raw["X"][y, x, channel, sample] == train.codes[sample, channel, y, x]


IMAGES = np.zeros((32, 32, 3, 4), np.uint8)
LABELS = np.array([[1], [2], [10], [3]], np.uint8)


def saved(folder: Path, **arrays: Any) -> Path:
    scipy.io.savemat(folder / "file.mat", arrays, do_compression=True)
    return folder / "file.mat"


@pytest.mark.parametrize("kind", [np.uint8, np.float64, np.int32])
def test_labels_may_be_of_matlabs_types(tmp_path: Path, kind: type[Any]) -> None:
    assert read_mat(saved(tmp_path, X=IMAGES, y=LABELS.astype(kind))).labels.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize(
    "arrays",
    [
        {"X": IMAGES},
        {"X": IMAGES, "y": LABELS, "z": LABELS},
        {"X": IMAGES.astype(np.float64), "y": LABELS},
        {"X": IMAGES[:28, :28], "y": LABELS},
        {"X": IMAGES, "y": LABELS[:3]},
        {"X": IMAGES, "y": LABELS.T},
        {"X": IMAGES, "y": np.array([[{"a": 1}]] * 4, object)},
        {"X": "text", "y": LABELS},
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    with pytest.raises(RuleViolations, match="are images and labels"):
        read_mat(saved(tmp_path, **arrays))


@pytest.mark.parametrize("label", [0, 11, -1, 1.5, np.nan])
def test_other_labels_are_refused(tmp_path: Path, label: float) -> None:
    labels = LABELS.astype(np.float64)
    labels[2] = label
    with pytest.raises(RuleViolations, match=r"1 \.\. 10"):
        read_mat(saved(tmp_path, X=IMAGES, y=labels))


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content


HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
MATRIX, COMPRESSED = 14, 15


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svhn, "MAX_BYTES", 1_000_000)
    path = tmp_path / "file.mat"
    path.write_bytes(HEADER + element(COMPRESSED, zlib.compress(element(MATRIX, bytes(100_000_000)))))
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(SpikeguardError, match="unpacks to more than 1,000,000 bytes"):
        read_mat(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_many_small_bombs_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svhn, "MAX_BYTES", 1_000_000)
    path = tmp_path / "file.mat"
    path.write_bytes(HEADER + 3 * element(COMPRESSED, zlib.compress(element(MATRIX, bytes(400_000)))))
    with pytest.raises(SpikeguardError, match="unpacks to more than 1,000,000 bytes"):
        read_mat(path)


@pytest.mark.parametrize(
    "content",
    [
        element(MATRIX, bytes(16)),
        element(COMPRESSED, b"no zlib"),
        element(COMPRESSED, zlib.compress(b"")),
        element(COMPRESSED, zlib.compress(element(COMPRESSED, zlib.compress(bytes(8))))),
        element(COMPRESSED, zlib.compress(element(MATRIX, bytes(16))[:-1])),
        element(COMPRESSED, zlib.compress(element(MATRIX, bytes(16)))[:-1]),
        element(COMPRESSED, zlib.compress(element(MATRIX, bytes(16))))[:-1],
        element(COMPRESSED, zlib.compress(element(MATRIX, bytes(64)))),
        b"\x0f",
    ],
)
def test_spoilt_elements_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.mat"
    path.write_bytes(HEADER + content)
    with pytest.raises(SpikeguardError, match=r"file\.mat"):
        read_mat(path)


@pytest.mark.parametrize("content", [b"", b"MATLAB", b"\x89HDF\r\n\x1a\n".ljust(600), HEADER[:124] + b"\x00\x02IM"])
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.mat"
    path.write_bytes(content)
    with pytest.raises(SpikeguardError, match="is not a MATLAB 5 file"):
        read_mat(path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path, X=IMAGES, y=LABELS).read_bytes()
    for end in range(130, len(whole), 3):
        (tmp_path / "file.mat").write_bytes(whole[:end])
        with pytest.raises(SpikeguardError):
            read_mat(tmp_path / "file.mat")
