"""A small network within every target's limits, and variants with one thing changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from hardware.network import InputSpec, IntegerNetwork, Population, Synapse


def network() -> IntegerNetwork:
    """Convolution, skip connection and dense readout, all within Loihi's limits."""
    rng = np.random.default_rng(0)
    return IntegerNetwork(
        InputSpec((1, 5, 4), 255),
        (
            Population("first", (3, 5, 4), 2000, np.full((3, 5, 4), 5), 1.0),
            Population("second", (2, 3, 2), 40, np.zeros((2, 3, 2), np.int64), 1.0),
            Population("out", (2,), 0, np.zeros(2, np.int64), 1.0, spiking=False),
        ),
        (
            Synapse("input", "first", "conv", rng.integers(-9, 30, (3, 1, 3, 3)).astype(np.int32), 8, padding=1),
            Synapse("first", "second", "conv", rng.integers(-9, 30, (2, 3, 3, 3)).astype(np.int32), 8, 0, 2, 1),
            Synapse("first", "out", "dense", 2 * rng.integers(-9, 30, (2, 60)).astype(np.int32), 8, 1),
            Synapse("second", "out", "dense", 2 * rng.integers(-9, 30, (2, 12)).astype(np.int32), 8, 1),
        ),
        4,
    )


def with_population(index: int, **changes: Any) -> IntegerNetwork:
    base = network()
    changed = [replace(p, **changes) if i == index else p for i, p in enumerate(base.populations)]
    return replace(base, populations=tuple(changed))


def with_weight(index: int, value: int, bits: int, exponent: int = 0) -> IntegerNetwork:
    """One weight set to ``value``, all others zero."""
    base = network()
    weight = np.zeros_like(base.synapses[index].weight)
    weight.reshape(-1)[0] = value
    synapse = replace(base.synapses[index], weight=weight, bits=bits, exponent=exponent)
    synapses = [synapse if i == index else s for i, s in enumerate(base.synapses)]
    return replace(base, synapses=tuple(synapses))
