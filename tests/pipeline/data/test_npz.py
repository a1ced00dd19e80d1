from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.data import load_npz


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
