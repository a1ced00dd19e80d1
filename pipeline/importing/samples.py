"""Inputs for an imported network: from a file, or drawn where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import read_arrays
from hardware.network import InputSpec
from pipeline.config import Config, DataConfig
from pipeline.data.loading import load_splits

Codes = NDArray[np.uint8]
MAX_CALIBRATION = 512
DRAWN = 64
SPIKING_SHARE = 0.2


@dataclass(frozen=True)
class Samples:
    """Inputs to choose scales on, and others to compare on.

    Attributes:
        calibration, test: codes ``(samples, [steps,] *shape)``.
        labels: of the test inputs; None if there are none.
        source: where they come from, for reports.
        config: with which a fidelity check finds the same test images; None if it cannot attack such inputs.
    """

    calibration: Codes
    test: Codes
    labels: NDArray[np.int64] | None
    source: str
    config: Config | None = None


def read_samples(path: Path, spec: InputSpec, steps: int, seed: int) -> Samples:
    """Inputs from an .npz: ``images`` and perhaps ``labels``, in seeded random order, half of them to compare on.

    Images are ``(samples, [steps,] *shape)`` in any arrangement of the axes of a sample that has its size: uint8
    codes, booleans, or numbers in [0, 1], which are rounded to codes.

    Raises:
        SpikeguardError: if the file is not that; ``RuleViolations`` names each array at fault.
    """
    arrays = read_arrays(path)
    if "images" not in arrays:
        raise SpikeguardError(f"{path} holds no array 'images'; save it with numpy.savez(path, images=…, labels=…)")
    problems: list[Violation] = []
    codes = _codes(arrays["images"], spec, steps, problems)
    labels = arrays.get("labels")
    if labels is not None and (labels.shape != arrays["images"].shape[:1] or labels.dtype.kind not in "iu"):
        actual = f"{labels.dtype} {labels.shape}"
        limit = f"integers {arrays['images'].shape[:1]}"
        problems.append(Violation("labels", "one integer per sample", actual, limit, "save one label per image"))
    if problems:
        raise RuleViolations(str(path), problems)
    if labels is not None and arrays["images"].dtype == np.uint8 and arrays["images"].shape[1:] == spec.shape:
        return _split(path, labels, seed)
    order = np.random.default_rng(seed).permutation(len(codes))
    half = len(codes) // 2
    return Samples(
        codes[order[:half][:MAX_CALIBRATION]],
        codes[order[half:]],
        None if labels is None else labels.astype(np.int64)[order[half:]],
        path.name,
    )


def _split(path: Path, labels: NDArray[Any], seed: int) -> Samples:
    """Images as a data set of one's own, whose test part a fidelity check attacks."""
    classes, images = len(np.unique(labels)), len(labels)
    data = DataConfig(name="npz", path=str(path), validation=max(classes, images // 10), test=max(classes, images // 2))
    splits = load_splits(data, seed)
    codes = splits.train.codes[:MAX_CALIBRATION]
    return Samples(codes, splits.test.codes, splits.test.labels, path.name, Config(seed=seed, data=data))


def draw_samples(spec: InputSpec, steps: int, seed: int) -> Samples:
    """Noise: pixels of any brightness, or spikes at a fifth of all steps."""
    rng = np.random.default_rng(seed)
    if spec.max_code == 1:
        codes = (rng.random((DRAWN, steps, *spec.shape)) < SPIKING_SHARE).astype(np.uint8)
    else:
        codes = rng.integers(0, spec.max_code + 1, (DRAWN, *spec.shape)).astype(np.uint8)
    return Samples(codes[: DRAWN // 2], codes[DRAWN // 2 :], None, f"noise, seed {seed}")


def _codes(images: NDArray[Any], spec: InputSpec, steps: int, problems: list[Violation]) -> Codes:
    size = int(np.prod(spec.shape))
    per_sample = images.shape[1:]
    is_timed = images.ndim > 2 and images.shape[1] == steps and int(np.prod(per_sample[1:])) == size
    if len(images) < 2 or not (is_timed or int(np.prod(per_sample)) == size):
        limit = f"2 or more of [{steps} steps of] {spec.shape}"
        problems.append(
            Violation("images", "samples fit the network", str(images.shape), limit, "reshape, or say other steps")
        )
        return np.zeros((2, *spec.shape), np.uint8)
    values = images.reshape(len(images), *([steps] if is_timed else []), *spec.shape)
    if values.dtype.kind == "f" and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1:
        codes: Codes = np.rint(values * spec.max_code).astype(np.uint8)
        return codes
    if values.dtype.kind not in "uib" or values.min() < 0 or values.max() > spec.max_code:
        found = f"{values.dtype} {values.min()}..{values.max()}" if values.dtype.kind in "fuib" else str(values.dtype)
        limit = f"integers 0..{spec.max_code}, or numbers 0..1"
        problems.append(Violation("images", "values are codes", found, limit, "clip or rescale them"))
        return np.zeros((2, *spec.shape), np.uint8)
    return np.asarray(values, np.uint8)
