from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.data import Dataset
from pipeline.data.cifar import CIFAR10_BATCHES, load_cifar10, load_cifar100, read_batch
from tests.pipeline.data.files import PACKERS, python2_pickle, random_images, write_cifar10, write_cifar100

SHAPE = (3, 32, 32)


def same(read: Dataset, data: Dataset) -> bool:
    assert (read.codes.dtype, read.labels.dtype) == (np.uint8, np.int64)
    return np.array_equal(read.codes, data.codes) and np.array_equal(read.labels, data.labels)


@pytest.mark.parametrize("ending", PACKERS)
def test_cifar10_comes_from_six_files_in_order(tmp_path: Path, ending: str) -> None:
    train, test = random_images(35, SHAPE, 10, 1), random_images(12, SHAPE, 10, 2)
    write_cifar10(tmp_path, train, test, ending)
    files = {name: tmp_path / (name + ending) for name in (*CIFAR10_BATCHES, "test_batch")}
    assert all(map(same, load_cifar10(files), (train, test)))


@pytest.mark.parametrize("ending", PACKERS)
def test_cifar100_has_its_fine_labels(tmp_path: Path, ending: str) -> None:
    train, test = random_images(110, SHAPE, 100, 1), random_images(100, SHAPE, 100, 2)
    write_cifar100(tmp_path, train, test, ending)
    files = {name: tmp_path / (name + ending) for name in ("train", "test")}
    assert all(map(same, load_cifar100(files), (train, test)))


def test_a_row_is_the_red_the_green_and_the_blue_plane(tmp_path: Path) -> None:
    row = np.arange(3072).reshape(1, 3072).astype(np.uint8)
    (tmp_path / "batch").write_bytes(python2_pickle({"data": row, "labels": [4]}))
    codes = read_batch(tmp_path / "batch", "labels", 10).codes
    assert [codes[0, channel, y, x] for channel, y, x in ((0, 0, 1), (0, 1, 0), (1, 0, 7), (2, 3, 5))] == [
        1,
        32,
        (1024 + 7) % 256,
        (2048 + 3 * 32 + 5) % 256,
    ]


def test_pickles_of_python_3_are_read_too(tmp_path: Path) -> None:
    """As somebody may have unpacked and packed them again."""
    data = random_images(5, SHAPE, 10)
    for order in "CF":
        values = {"data": np.asarray(data.codes.reshape(5, -1), order=order), "labels": data.labels.tolist()}  # type: ignore[call-overload]
        (tmp_path / "batch").write_bytes(pickle.dumps(values, protocol=3))
        assert same(read_batch(tmp_path / "batch", "labels", 10), data)


GOOD = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 9]}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": np.zeros((4, 1024), np.uint8)}, "(4, 1024)"),
        ({"data": np.zeros(4 * 3072, np.uint8)}, "(12288,)"),
        ({"data": np.zeros((2, 2, 3072), np.uint8)}, "(2, 2, 3072)"),
        ({"data": [1, 2, 3]}, "list"),
        ({"labels": [0, 1, 2, 10]}, "0 .. 10"),
        ({"labels": [-1, 1, 2, 3]}, "-1 .. 3"),
        ({"labels": [0, 1, 2, "3"]}, "other values"),
        ({"labels": [0, 1, 2, True]}, "other values"),
        ({"labels": np.zeros(4, np.uint8)}, "ndarray"),
        ({"labels": [0, 1, 2]}, "one per image"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "there are some"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    (tmp_path / "batch").write_bytes(python2_pickle({**GOOD, **changes}))
    with pytest.raises(RuleViolations) as caught:
        read_batch(tmp_path / "batch", "labels", 10)
    assert told in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(python2_pickle({"data": 3, "labels": 4}))
    with pytest.raises(RuleViolations) as caught:
        read_batch(tmp_path / "batch", "labels", 10)
    assert [row.object for row in caught.value.violations] == ["data", "labels"]


def test_missing_keys_are_named(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(python2_pickle({"data": GOOD["data"], "coarse_labels": [1]}))
    with pytest.raises(SpikeguardError, match=r"lacks \['fine_labels'\] \(it has \['coarse_labels', 'data'\]\)"):
        read_batch(tmp_path / "batch", "fine_labels", 100)
