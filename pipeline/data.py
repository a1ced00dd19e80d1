"""Data sets as 8-bit pixel codes, split once with a fixed seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import read_arrays

Codes = NDArray[np.uint8]
Labels = NDArray[np.int64]


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


def load_digits() -> Dataset:
    """The 1,797 handwritten 8x8 digits that scikit-learn ships, grey levels 0..16 spread over the codes 0..255."""
    from sklearn.datasets import load_digits as load

    bunch = load()
    codes = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return Dataset(codes, bunch.target.astype(np.int64))


def load_npz(path: Path) -> Dataset:
    """Images and labels from an .npz: ``images`` uint8 (samples, channels, height, width), ``labels`` integers.

    Raises:
        SpikeguardError: if the file or what it holds is not that.
    """
    arrays = read_arrays(path)
    missing = {"images", "labels"} - set(arrays)
    if missing:
        raise SpikeguardError(f"{path} lacks {sorted(missing)}; save it with numpy.savez(path, images=…, labels=…)")
    images, labels = arrays["images"], arrays["labels"]
    problems = []
    if images.dtype != np.uint8 or images.ndim != 4:
        problems.append(
            Violation(
                "images",
                "are 8-bit codes (samples, channels, height, width)",
                f"{images.dtype} {images.shape}",
                "uint8, 4 axes",
                "convert pixels to 0..255 and add the channel axis",
            )
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        problems.append(
            Violation(
                "labels",
                "one integer per image",
                f"{labels.dtype} {labels.shape}",
                f"{images.shape[:1]}",
                "fix it",
            )
        )
    elif len(labels) and (smallest := labels.astype(np.int64).min()) < 0:
        problems.append(Violation("labels", "count from 0", str(smallest), "0 or more", "renumber the classes"))
    if problems:
        raise RuleViolations(str(path), problems)
    return Dataset(images, labels.astype(np.int64))


def split(name: str, data: Dataset, validation: int, test: int, seed: int) -> Splits:
    """Split once, stratified by class.

    Args:
        name: for reports.
        data: everything there is.
        validation, test: numbers of images; the rest is for training.
        seed: of the split; the same seed gives the same split.

    Raises:
        SpikeguardError: if too few images are left for training.
    """
    from sklearn.model_selection import train_test_split

    classes = int(data.labels.max()) + 1 if len(data) else 0
    if len(data) - validation - test < classes or min(validation, test) < classes:
        raise SpikeguardError(
            f"{name} has {len(data)} images of {classes} classes, too few for {validation} validation and {test} test "
            "images and a training set with every class; ask for fewer"
        )
    everything = np.arange(len(data))
    try:
        rest, test_part = train_test_split(everything, test_size=test, stratify=data.labels, random_state=seed)
        train, held_out = train_test_split(rest, test_size=validation, stratify=data.labels[rest], random_state=seed)
    except ValueError as error:
        raise SpikeguardError(f"{name} cannot be split by class ({error}); give every class more images") from error

    def part(indices: NDArray[np.int64]) -> Dataset:
        return Dataset(data.codes[indices], data.labels[indices])

    return Splits(name, part(train), part(held_out), part(test_part), classes)
