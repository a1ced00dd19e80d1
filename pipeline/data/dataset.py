"""What every loader returns: labelled images, and the parts they are split into."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, Violation

Codes = NDArray[np.uint8]
Labels = NDArray[np.int64]
INTACT_COPY = "fetch an intact copy of the file"


@dataclass(frozen=True)
class Dataset:
    """Labelled images.

    Attributes:
        codes: uint8 ``(samples, channels, height, width)``; a pixel in [0, 1] is code / 255.
        labels: int64 ``(samples,)``.
    """

    codes: Codes
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """Training, validation (for every selection) and test (touched once, by the fidelity check) parts."""

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.train.codes.shape[1:]


def labelled(subject: str, codes: Codes, labels: Labels, classes: int) -> Dataset:
    """Images with their labels, once they are known to belong together.

    Args:
        subject: the file or folder they come from, for the message.
        codes: uint8 ``(samples, channels, height, width)``.
        labels: int64 ``(samples,)``.
        classes: labels lie in 0..classes-1.

    Raises:
        RuleViolations: if there are no images, not as many labels, or labels of no class.
    """
    problems = []
    if not len(codes):
        problems.append(Violation("images", "there are some", "0", "1 or more", INTACT_COPY))
    if labels.shape != codes.shape[:1]:
        problems.append(
            Violation("labels", "one per image", f"{len(labels):,}", f"{len(codes):,}", "fetch both files again")
        )
    elif len(labels) and (labels.min() < 0 or labels.max() >= classes):
        found = f"{labels.min()} .. {labels.max()}"
        problems.append(Violation("labels", "name a class", found, f"0 .. {classes - 1}", INTACT_COPY))
    if problems:
        raise RuleViolations(subject, problems)
    return Dataset(codes, labels)


def digest_of(part: Dataset) -> str:
    """SHA-256 of a part of the data, labels included."""
    digest = hashlib.sha256(repr(part.codes.shape).encode())
    for array in (part.codes, part.labels):
        digest.update(np.ascontiguousarray(array).data)  # without a copy: a data set may fill half the memory
    return digest.hexdigest()
