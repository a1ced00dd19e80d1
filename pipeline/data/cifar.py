"""CIFAR-10 and CIFAR-100, from the pickles their author publishes ("python version").

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import MIB
from pipeline.data.dataset import INTACT_COPY, Dataset, labelled
from pipeline.data.packed import read_unpacked
from pipeline.data.plain_pickle import load_plain_pickle

SHAPE = (3, 32, 32)
ROW = 3 * 32 * 32  # red, green and blue plane of one image
MAX_BATCH_BYTES = 256 * MIB  # the training file of CIFAR-100 has 148 MiB, a batch of CIFAR-10 30
CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10_TEST = "test_batch"
CIFAR100_PARTS = ("train", "test")


def read_batch(path: Path, labels: str, classes: int) -> Dataset:
    """Read one file of pickled images.

    Args:
        path: of the pickle, ``.xz``, ``.gz`` or plain.
        labels: key of the labels to take: ``labels``, ``fine_labels`` or ``coarse_labels``.
        classes: number of classes these labels have.

    Returns:
        Images ``(samples, 3, 32, 32)``, not writable.

    Raises:
        SpikeguardError: if the file is missing, too large, no pickle of plain values, or holds something else.
    """
    values = load_plain_pickle(read_unpacked(path, MAX_BATCH_BYTES), str(path))
    missing = [key for key in ("data", labels) if key not in values]
    if missing:
        found = [key[:40] for key in sorted(values)[:10]]
        raise SpikeguardError(f"{path} lacks {missing} (it has {found}); fetch the python version")
    data, numbers = values["data"], values[labels]
    problems = []
    if not isinstance(data, np.ndarray) or data.shape[1:] != (ROW,):
        actual = str(data.shape) if isinstance(data, np.ndarray) else type(data).__name__
        problems.append(Violation("data", "one row per image", actual, f"(samples, {ROW})", INTACT_COPY))
    if not isinstance(numbers, list) or not all(type(number) is int and 0 <= number < classes for number in numbers):
        problems.append(
            Violation(labels, "name a class", _shown(numbers), f"a list of 0 .. {classes - 1}", INTACT_COPY)
        )
    if problems:
        raise RuleViolations(str(path), problems)
    return labelled(str(path), data.reshape(-1, *SHAPE), np.array(numbers, np.int64), classes)


def _shown(numbers: object) -> str:
    if not isinstance(numbers, list):
        return type(numbers).__name__
    ints = [number for number in numbers if type(number) is int]
    return f"{min(ints)} .. {max(ints)}" if ints and len(ints) == len(numbers) else "other values"


def load_cifar10(files: Mapping[str, Path]) -> tuple[Dataset, Dataset]:
    """CIFAR-10 from its six files.

    Args:
        files: paths by the names the files have when they are not packed.

    Returns:
        Training and test split; images ``(samples, 3, 32, 32)``, 10 classes.

    Raises:
        SpikeguardError: if a file is not what its name says.
    """
    batches = [read_batch(files[name], "labels", 10) for name in CIFAR10_BATCHES]
    codes = np.concatenate([batch.codes for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    return Dataset(codes, labels), read_batch(files[CIFAR10_TEST], "labels", 10)


def load_cifar100(files: Mapping[str, Path]) -> tuple[Dataset, Dataset]:
    """CIFAR-100 with its 100 fine classes; otherwise as `load_cifar10`, from its two files."""
    train, test = (read_batch(files[name], "fine_labels", 100) for name in CIFAR100_PARTS)
    return train, test
