from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.data import Dataset, Splits, load_digits, load_npz, split


def digits(seed: int = 0) -> Splits:
    return split("digits", load_digits(), 180, 540, seed)


def test_the_digits_are_all_there_as_codes() -> None:
    data = load_digits()
    assert data.codes.shape == (1797, 1, 8, 8)
    assert data.codes.dtype == np.uint8
    assert (data.codes.min(), data.codes.max()) == (0, 255)
    assert len(np.unique(data.codes)) == 17
    assert set(data.labels) == set(range(10))


def test_parts_have_their_sizes_and_classes() -> None:
    splits = digits()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1077, 180, 540)
    assert splits.classes == 10
    assert splits.input_shape == (1, 8, 8)
    whole = np.bincount(load_digits().labels) / 1797
    for part in (splits.train, splits.validation, splits.test):
        expected = whole * len(part)
        assert np.abs(np.bincount(part.labels) - expected).max() <= 1.5


def numbered(samples: int = 240) -> Dataset:
    """Images that carry their own position."""
    positions = np.arange(samples, dtype=np.int64)
    codes = np.stack([positions % 256, positions // 256], 1).astype(np.uint8).reshape(samples, 2, 1, 1)
    return Dataset(codes, positions % 3)


def positions_of(part: Dataset) -> set[int]:
    return {int(codes[0, 0, 0]) + 256 * int(codes[1, 0, 0]) for codes in part.codes}


def test_parts_share_no_image_and_leave_none_out() -> None:
    splits = split("numbered", numbered(), 30, 60, 7)
    parts = [positions_of(part) for part in (splits.train, splits.validation, splits.test)]
    assert set.union(*parts) == set(range(240))
    assert sum(map(len, parts)) == 240


def test_labels_stay_with_their_images() -> None:
    part = split("numbered", numbered(), 30, 60, 7).test
    assert all(int(codes[0, 0, 0]) % 3 == label for codes, label in zip(part.codes, part.labels, strict=True))


def test_the_seed_makes_the_split() -> None:
    first, same, other = digits(4), digits(4), digits(5)
    assert np.array_equal(first.test.codes, same.test.codes)
    assert np.array_equal(first.train.labels, same.train.labels)
    assert not np.array_equal(first.test.codes, other.test.codes)


@pytest.mark.parametrize(("validation", "test"), [(30, 208), (240, 30), (2, 60), (60, 2), (200, 200)])
def test_too_few_images_are_refused(validation: int, test: int) -> None:
    with pytest.raises(SpikeguardError, match="numbered"):
        split("numbered", numbered(), validation, test, 0)


def test_a_class_with_one_image_cannot_be_split() -> None:
    data = numbered()
    labels = data.labels.copy()
    labels[0] = 3
    with pytest.raises(SpikeguardError, match="give every class more images"):
        split("numbered", Dataset(data.codes, labels), 30, 60, 0)


def test_no_images_at_all_are_refused() -> None:
    none = Dataset(np.zeros((0, 1, 2, 2), np.uint8), np.zeros(0, np.int64))
    with pytest.raises(SpikeguardError):
        split("none", none, 1, 1, 0)


def saved(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "own.npz", **arrays)
    return folder / "own.npz"


IMAGES = np.zeros((6, 1, 4, 4), np.uint8)
LABELS = np.arange(6)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_a_file_of_ones_own_is_read(tmp_path: Path, kind: type[np.integer[Any]]) -> None:
    data = load_npz(saved(tmp_path, images=IMAGES, labels=LABELS.astype(kind)))
    assert np.array_equal(data.labels, LABELS)
    assert data.labels.dtype == np.int64
    assert data.codes.shape == (6, 1, 4, 4)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": IMAGES}, "lacks ['labels']"),
        ({"x": IMAGES, "y": LABELS}, "lacks ['images', 'labels']"),
        ({"images": IMAGES.astype(np.float32), "labels": LABELS}, "float32"),
        ({"images": IMAGES[:, 0], "labels": LABELS}, "(6, 4, 4)"),
        ({"images": IMAGES, "labels": LABELS[:5]}, "(5,)"),
        ({"images": IMAGES, "labels": LABELS[:, None]}, "(6, 1)"),
        ({"images": IMAGES, "labels": LABELS / 2}, "float64"),
        ({"images": IMAGES, "labels": LABELS - 1}, "-1"),
        ({"images": np.uint8(3), "labels": LABELS}, "uint8 ()"),
        ({"images": IMAGES, "labels": LABELS.astype(str)}, "<U"),
        ({"images": IMAGES, "labels": LABELS.astype(np.uint64) + np.uint64(2**63)}, "labels"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    with pytest.raises(SpikeguardError) as caught:
        load_npz(saved(tmp_path, **arrays))
    assert told in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RuleViolations) as caught:
        load_npz(saved(tmp_path, images=IMAGES / 255, labels=LABELS - 3))
    assert {row.object for row in caught.value.violations} == {"images", "labels"}


def test_a_file_that_is_no_npz_or_holds_pickles_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "own.npz"
    text.write_text("images")
    with pytest.raises(SpikeguardError, match="not a readable"):
        load_npz(text)
    with pytest.raises(SpikeguardError, match="not a readable"):
        load_npz(saved(tmp_path, images=IMAGES, labels=np.array([object()] * 6)))
    with pytest.raises(SpikeguardError, match="does not exist"):
        load_npz(tmp_path / "nowhere.npz")
