"""The data set that needs no file."""

from __future__ import annotations

import numpy as np

from pipeline.data.dataset import Dataset


def load_digits() -> Dataset:
    """The 1,797 handwritten 8x8 digits that scikit-learn ships, grey levels 0..16 spread over the codes 0..255."""
    from sklearn.datasets import load_digits as load

    bunch = load()
    codes = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return Dataset(codes, bunch.target.astype(np.int64))
