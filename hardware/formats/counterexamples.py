"""Images on which a model was wrong, kept so that each later build is asked about them first.

They lie in ``counterexamples.npz``, in a bundle or beside a report. Each is hashed with its label and the clean image
it was made of, so that none is kept twice and none can be exchanged unseen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import read_arrays, write_arrays
from hardware.network import IntegerNetwork, Shape

HASHES = "sha256"
HASH_BYTES = 32
REMEDY = "take an intact copy, or move the file away to begin a new corpus"


@dataclass(frozen=True, eq=False)
class Counterexamples:
    """Images, and what was wrong when they were found.

    Attributes:
        codes: uint8 ``(images, *shape)``, what fooled.
        clean: of the same shape, what each was made of; the same image where nothing had to be changed.
        labels: int64 ``(images,)``.
        reference_wrong, deployed_wrong: bool ``(images,)``, by the build on which an image was found.
    """

    codes: NDArray[np.uint8]
    clean: NDArray[np.uint8]
    labels: NDArray[np.int64]
    reference_wrong: NDArray[np.bool_]
    deployed_wrong: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: NDArray[Any]) -> Counterexamples:
        """Some of the images."""
        return Counterexamples(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @cached_property
    def hashes(self) -> list[bytes]:
        """SHA-256 of each image with its label and its clean image."""
        return [
            hashlib.sha256(label.tobytes() + clean.tobytes() + codes.tobytes()).digest()
            for label, clean, codes in zip(self.labels.astype("<i8"), self.clean, self.codes, strict=True)
        ]


def no_counterexamples(shape: Shape) -> Counterexamples:
    """An empty corpus of images of one shape."""
    images, flags = np.zeros((0, *shape), np.uint8), np.zeros(0, np.bool_)
    return Counterexamples(images, images, np.zeros(0, np.int64), flags, flags)


def merge(parts: Sequence[Counterexamples]) -> Counterexamples:
    """All images of some corpora, each once, in order."""
    joined = Counterexamples(
        *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Counterexamples))
    )
    first = {value: index for index, value in reversed(list(enumerate(joined.hashes)))}
    return joined[np.array(sorted(first.values()), np.int64)]


def save_counterexamples(path: Path, corpus: Counterexamples) -> None:
    """Write a corpus with its hashes."""
    arrays = {field.name: getattr(corpus, field.name) for field in fields(corpus)}
    hashes = np.frombuffer(b"".join(corpus.hashes), np.uint8).reshape(-1, HASH_BYTES)
    write_arrays(path, {**arrays, HASHES: hashes})


def load_counterexamples(path: Path, network: IntegerNetwork) -> Counterexamples:
    """The inverse of :func:`save_counterexamples`, for images that the network can be shown.

    Raises:
        RuleViolations: everything that is missing, malformed or altered, or not of this network.
    """
    arrays = read_arrays(path)
    hashes = arrays.pop(HASHES, np.zeros(0))
    names = {field.name for field in fields(Counterexamples)}
    if set(arrays) != names:
        raise SpikeguardError(f"{path} holds {', '.join(sorted(arrays))}, not {', '.join(sorted(names))}; {REMEDY}")
    corpus = Counterexamples(**arrays)
    if problems := [*_problems(corpus, network)]:
        raise RuleViolations(str(path), problems)
    if hashes.dtype != np.uint8 or hashes.tobytes() != b"".join(corpus.hashes):
        raise SpikeguardError(f"{path} holds images that are not what their hashes say; {REMEDY}")
    return corpus


def _problems(corpus: Counterexamples, network: IntegerNetwork) -> list[Violation]:
    count = corpus.labels.shape[:1] or (0,)
    image, flag = (np.uint8, (*count, *network.input.shape)), (np.bool_, count)
    expected: dict[str, tuple[Any, Shape]] = {
        "codes": image,
        "clean": image,
        "labels": (np.int64, count),
        "reference_wrong": flag,
        "deployed_wrong": flag,
    }
    problems = []
    for name, (dtype, shape) in expected.items():
        values = getattr(corpus, name)
        if values.dtype != dtype or values.shape != shape:
            actual, limit = f"{values.dtype} {values.shape}", f"{np.dtype(dtype)} {shape}"
            problems.append(Violation(name, "images are the network's", actual, limit, REMEDY))
    if not problems and count[0]:
        if not 0 <= corpus.labels.min() <= corpus.labels.max() < network.classes:
            actual = f"{corpus.labels.min()}..{corpus.labels.max()}"
            problems.append(Violation("labels", "are classes", actual, f"0..{network.classes - 1}", REMEDY))
        largest = max(corpus.codes.max(), corpus.clean.max())
        if largest > network.input.max_code:
            limit = str(network.input.max_code)
            problems.append(Violation("codes", "are the network's", str(largest), limit, REMEDY))
    return problems
