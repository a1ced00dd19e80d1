"""Splits a data set by class, with a seed: the same seed gives the same parts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, SpikeguardError, Violation
from pipeline.data.dataset import Dataset, Labels, Splits

Indices = NDArray[np.int64]


def split(name: str, data: Dataset, validation: int, test: int, seed: int, train: int | None = None) -> Splits:
    """Split a data set that has no test part of its own, stratified by class.

    Args:
        name: for reports.
        data: everything there is.
        validation, test: numbers of images.
        seed: of the split; the same seed gives the same split.
        train: number of training images; by default all that are left.

    Raises:
        SpikeguardError: if too few images are left for training.
    """
    classes = int(data.labels.max()) + 1 if len(data) else 0
    wanted = classes if train is None else train
    if len(data) - validation - test < wanted or min(validation, test, wanted) < classes:
        raise SpikeguardError(
            f"{name} has {len(data)} images of {classes} classes, too few for {validation} validation and {test} test "
            f"images and {'a training set' if train is None else f'{train} training images'} with every class; "
            "ask for fewer, but at least one per class"
        )
    test_part, rest = _draw(name, data.labels, np.arange(len(data)), test, seed)
    held_out, remaining = _draw(name, data.labels, rest, validation, seed)
    kept = remaining if train is None else _draw(name, data.labels, remaining, train, seed)[0]
    return Splits(name, _part(data, kept), _part(data, held_out), _part(data, test_part), classes)


def split_official(
    name: str,
    train_split: Dataset,
    test_split: Dataset,
    classes: int,
    *,
    train: int | None,
    validation: int,
    test: int,
    seed: int,
) -> Splits:
    """Split a data set whose authors published a training and a test split, stratified by class.

    The validation part is drawn from the training split before its subset, so it is the same for every ``train``.

    Args:
        name: for reports.
        train_split, test_split: as published; images of the one never go into a part of the other.
        classes: of the data set; labels count from 0.
        train: number of training images; by default all that the validation part leaves.
        validation, test: numbers of images.
        seed: of the choice and its order.

    Raises:
        RuleViolations: if a part asks for more images than there are, or for fewer than there are classes.
    """
    wanted = {"train": train, "validation": validation, "test": test}
    room = {
        "train": len(train_split) - validation,
        "validation": len(train_split) - classes,
        "test": len(test_split),
    }
    problems = [
        Violation(
            f"data.{part}",
            "leaves every part at least one image of each class",
            f"{count:,}",
            f"{classes} .. {room[part]:,}",
            "ask for another number",
        )
        for part, count in wanted.items()
        if count is not None and not classes <= count <= room[part]
    ]
    if problems:
        raise RuleViolations(f"{name}, {len(train_split):,} training and {len(test_split):,} test images", problems)
    tested, _ = _draw(name, test_split.labels, np.arange(len(test_split)), test, seed)
    held_out, remaining = _draw(name, train_split.labels, np.arange(len(train_split)), validation, seed)
    kept = remaining if train is None else _draw(name, train_split.labels, remaining, train, seed)[0]
    return Splits(name, _part(train_split, kept), _part(train_split, held_out), _part(test_split, tested), classes)


def _part(data: Dataset, indices: Indices) -> Dataset:
    return Dataset(data.codes[indices], data.labels[indices])


def _draw(name: str, labels: Labels, indices: Indices, count: int, seed: int) -> tuple[Indices, Indices]:
    """``count`` of the indices in random order, stratified by their labels, and the others."""
    from sklearn.model_selection import train_test_split

    if count == len(indices):  # scikit-learn insists on leaving some
        return np.random.default_rng(seed).permutation(indices), indices[:0]
    try:
        others, chosen = train_test_split(indices, test_size=count, stratify=labels[indices], random_state=seed)
    except ValueError as error:
        raise SpikeguardError(
            f"{name} cannot be split by class ({error}); give every class more images, or take all or fewer of them"
        ) from error
    return chosen, others
