from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.data import Dataset, Splits, load_digits, split, split_official


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


def test_the_split_of_the_digits_is_the_one_published_figures_were_made_with() -> None:
    splits = digits()
    digest = hashlib.sha256(b"".join(part.codes.tobytes() for part in (splits.train, splits.validation, splits.test)))
    assert digest.hexdigest() == "d5287e23dc2aaf900ff8f95beff0d81201d4d3c9aa0575ef619fb222f1f01148"


def test_a_training_subset_leaves_the_other_parts_as_they_are() -> None:
    whole = split("numbered", numbered(), 30, 60, 7)
    part = split("numbered", numbered(), 30, 60, 7, train=12)
    assert np.array_equal(part.validation.codes, whole.validation.codes)
    assert np.array_equal(part.test.codes, whole.test.codes)
    assert positions_of(part.train) < positions_of(whole.train)
    assert np.bincount(part.train.labels).tolist() == [4, 4, 4]
    every = split("numbered", numbered(), 30, 60, 7, train=150)
    assert positions_of(every.train) == positions_of(whole.train)


@pytest.mark.parametrize("train", [1, 2, 151])
def test_a_training_subset_that_cannot_be_is_refused(train: int) -> None:
    with pytest.raises(SpikeguardError, match=f"and {train} training images"):
        split("numbered", numbered(), 30, 60, 7, train=train)


def official(train: int | None = None, validation: int = 30, test: int = 60, seed: int = 7) -> Splits:
    """Test images are numbered from 1000 on."""
    later = numbered(120)
    later = Dataset(later.codes + np.array([1000 % 256, 1000 // 256], np.uint8)[:, None, None], later.labels)
    return split_official("numbered", numbered(), later, 3, train=train, validation=validation, test=test, seed=seed)


def shifted_positions(part: Dataset) -> set[int]:
    """Positions among the test images: the low byte wraps."""
    low, high = 1000 % 256, 1000 // 256
    return {(int(codes[0, 0, 0]) - low) % 256 + 256 * (int(codes[1, 0, 0]) - high) for codes in part.codes}


@given(st.integers(3, 234), st.integers(3, 117), st.integers(0, 2**31 - 1))
def test_official_splits_stay_apart(validation: int, test: int, seed: int) -> None:
    splits = official(None, validation, test, seed)
    assert len(shifted_positions(splits.test)) == len(splits.test) == test
    assert len(splits.validation) == validation
    train, held_out = positions_of(splits.train), positions_of(splits.validation)
    assert train | held_out == set(range(240))
    assert not train & held_out
    assert len(train) == 240 - validation
    for part in (splits.train, splits.validation, splits.test):
        counts = np.bincount(part.labels, minlength=3)
        assert counts.max() - counts.min() <= 1  # the classes are of equal size


def test_the_whole_official_test_split_comes_in_random_order() -> None:
    splits = official(test=120)
    assert len(shifted_positions(splits.test)) == 120
    assert splits.test.labels[:12].tolist() != [0, 1, 2] * 4
    assert official(test=120).test.labels.tolist() == splits.test.labels.tolist()


def test_validation_and_test_images_do_not_depend_on_the_training_subset() -> None:
    whole, part, every = official(), official(train=9), official(train=210)
    for splits in (part, every):
        assert np.array_equal(splits.validation.codes, whole.validation.codes)
        assert np.array_equal(splits.test.codes, whole.test.codes)
    assert positions_of(part.train) < positions_of(whole.train) == positions_of(every.train)
    assert np.bincount(part.train.labels).tolist() == [3, 3, 3]


def test_labels_stay_with_their_images_in_official_splits() -> None:
    splits = official(train=100)
    for part in (splits.train, splits.validation):
        assert all(int(codes[0, 0, 0]) % 3 == label for codes, label in zip(part.codes, part.labels, strict=True))


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"test": 121}, ["data.test"]),
        ({"test": 2}, ["data.test"]),
        ({"validation": 238}, ["data.validation"]),
        ({"validation": 2}, ["data.validation"]),
        ({"train": 211}, ["data.train"]),
        ({"train": 2}, ["data.train"]),
        ({"train": 500, "validation": 500, "test": 500}, ["data.train", "data.validation", "data.test"]),
    ],
)
def test_all_parts_that_ask_for_too_much_or_too_little_are_named(wanted: dict[str, int], named: list[str]) -> None:
    with pytest.raises(RuleViolations) as caught:
        official(**wanted)
    assert [row.object for row in caught.value.violations] == named
