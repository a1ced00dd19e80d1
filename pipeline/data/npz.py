"""Images of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import read_arrays
from pipeline.data.dataset import Dataset


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
