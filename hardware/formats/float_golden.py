"""What the float SNN as trained did on a bundle's golden inputs, and whether another file of it does the same.

Float sums are rounded, in an order that differs from one runtime to the next, so a membrane that lands next to its
threshold may spike in one and not in the other; that spike changes what follows. The trained network's own activity is
therefore stored together with the spikes that rounding may decide: those whose membrane lies within
``ROUNDING`` times the layer's largest membrane of the threshold. A flipped spike is *explained* if rounding may decide
it, or if a spike of the same image flipped before it; everything else is a mistake in the file. Of images without a
flipped spike the logits must be the same up to ``ROUNDING`` times the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import SpikeguardError
from hardware.files import read_arrays

ROUNDING = 2.0**-13
Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class FloatActivity:
    """What a float SNN did.

    Attributes:
        logits: float32 ``(samples, classes)``.
        spikes: by layer in order of execution, bool ``(samples, steps, neurons)``.
    """

    logits: NDArray[np.float32]
    spikes: Mapping[str, Bits]


@dataclass(frozen=True)
class FloatGolden:
    """The trained network's activity, and which of its spikes rounding may decide (shaped as the spikes)."""

    activity: FloatActivity
    undecided: Mapping[str, Bits]

    def __getitem__(self, samples: slice) -> FloatGolden:
        """Of some of the samples."""
        spikes = {name: bits[samples] for name, bits in self.activity.spikes.items()}
        undecided = {name: bits[samples] for name, bits in self.undecided.items()}
        return FloatGolden(FloatActivity(self.activity.logits[samples], spikes), undecided)


@dataclass(frozen=True)
class FloatComparison:
    """How another activity differs from the trained network's.

    Attributes:
        flips: spikes that differ.
        unexplained_spikes: of these, those that rounding cannot have caused.
        unexplained_logits: that differ by more than rounding, in images without a flip.
        changed_classes: images with another largest logit.
    """

    samples: int
    flips: int
    unexplained_spikes: int
    unexplained_logits: int
    changed_classes: int

    @property
    def summary(self) -> str:
        """One line."""
        return f"{self.flips} flipped spike(s), {self.changed_classes} of {self.samples} classes changed"


def compare_float(golden: FloatGolden, actual: FloatActivity) -> FloatComparison:
    """Count what differs, and what of it rounding does not explain.

    Raises:
        SpikeguardError: if the layers or shapes are not the same.
    """
    expected = golden.activity
    shapes = [{name: bits.shape for name, bits in one.spikes.items()} for one in (expected, actual)]
    if shapes[0] != shapes[1] or expected.logits.shape != actual.logits.shape:
        raise SpikeguardError("the float model has other layers than its golden activity; export the bundle again")
    flipped = {name: bits ^ actual.spikes[name] for name, bits in expected.spikes.items()}
    samples = len(expected.logits)
    steps = max((bits.shape[1] for bits in flipped.values()), default=0)
    unexplained, pure = 0, np.ones(samples, bool)
    for step in range(steps):
        for name, bits in flipped.items():
            here = bits[:, step]
            unexplained += int((here & ~golden.undecided[name][:, step])[pure].sum())
            pure &= ~here.any(1)
    # "not at most" and not "more", so that NaN is counted.
    limit = ROUNDING * np.abs(expected.logits).max(1, keepdims=True)
    off = ~(np.abs(actual.logits - expected.logits) <= limit)
    return FloatComparison(
        samples,
        sum(int(bits.sum()) for bits in flipped.values()),
        unexplained,
        int(off[pure].sum()),
        int((actual.logits.argmax(1) != expected.logits.argmax(1)).sum()),
    )


def pack_float_golden(golden: FloatGolden) -> dict[str, NDArray[Any]]:
    """As plain arrays for an .npz file, eight neurons to a byte; layers stay in order."""
    arrays: dict[str, NDArray[Any]] = {"logits": golden.activity.logits}
    for name, bits in golden.activity.spikes.items():
        arrays[f"neurons.{name}"] = np.array(bits.shape[-1], np.int64)
        arrays[f"spikes.{name}"] = np.packbits(bits, axis=-1)
        arrays[f"undecided.{name}"] = np.packbits(golden.undecided[name], axis=-1)
    return arrays


def read_float_golden(path: Path) -> FloatGolden:
    """The inverse of :func:`pack_float_golden`.

    Raises:
        SpikeguardError: if the file is missing, too large or not well formed.
    """
    arrays = read_arrays(path)
    try:
        logits = arrays.pop("logits")
        if logits.dtype != np.float32 or logits.ndim != 2 or not np.isfinite(logits).all():
            raise ValueError(f"logits are {logits.dtype} {logits.shape}")
        names = [key.removeprefix("spikes.") for key in arrays if key.startswith("spikes.")]
        parts: list[dict[str, Bits]] = [{}, {}]
        for name in names:
            neurons = int(arrays.pop(f"neurons.{name}"))
            for part, kind in zip(parts, ("spikes", "undecided"), strict=True):
                packed = arrays.pop(f"{kind}.{name}")
                if packed.ndim != 3 or len(packed) != len(logits) or packed.shape[2] != -(-neurons // 8):
                    raise ValueError(f"{kind} of {name} have shape {packed.shape} for {neurons} neurons")
                part[name] = np.unpackbits(packed, axis=-1, count=neurons).astype(bool)
            if parts[0][name].shape != parts[1][name].shape:
                raise ValueError(f"{name} has spikes and undecided spikes of different shapes")
        if arrays:
            raise ValueError(f"unknown arrays {', '.join(arrays)}")
        return FloatGolden(FloatActivity(logits, parts[0]), parts[1])
    except (KeyError, ValueError, TypeError) as error:
        raise SpikeguardError(f"{path} is not well formed ({error}); export the bundle again") from error
