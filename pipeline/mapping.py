"""The mapping apart from rounding: the integer network whose integers are too wide to lose anything.

With 24-bit mantissas, thresholds and biases equally fine, and a state that never saturates, the integer network
spikes as the float SNN does in float64, but for membranes within a rounding of the threshold. What differs at few bits
is then rounding alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hardware.errors import RuleViolations, Violation
from hardware.network import FRACTION_BITS, INPUT, IntegerNetwork
from pipeline.constant_channels import shared_codes
from pipeline.folding import RealPopulation, fold
from pipeline.integer_recipe import Grid, RoundedPopulation, assemble, require_roundable, round_population
from pipeline.models.graph import Shape
from pipeline.models.spiking import SpikingNetwork
from pipeline.number_formats import WIDE

STATE_LIMIT = 2**50
"""Of membranes that are to stay exact: 4096 times it, which a decay needs, fits int64."""
SMALLEST_SCALE = 2.0**-20


def map_wide(network: SpikingNetwork, provenance: Mapping[str, Any] | None = None) -> IntegerNetwork:
    """The integer network of a float SNN, rounded to 24-bit mantissas.

    Run it by ``run_reference(..., state_limit=STATE_LIMIT)``; no chip can. Scales are powers of two, so weights and
    thresholds that are short binary fractions stay exact. A leak is rounded to 12 bits as on the chip.

    Args:
        network: the float SNN; it is not changed.
        provenance: plain facts to keep with the network.

    Raises:
        RuleViolations: if weights are not finite, or biases, thresholds or means of the normalisation so much
            larger than weights that no integers hold both.
    """
    populations, shape = fold(network), network.graph.input_shape
    require_roundable(populations)
    max_code = network.graph.max_code
    rounded = [_round_finely(population, shape, network.steps, max_code) for population in populations]
    codes = shared_codes(one.constant for one in rounded if one.constant is not None)
    grids = [
        replace(_grid(p, one.population.scale, max_code), constant_codes=codes)
        for p, one in zip(populations, rounded, strict=True)
    ]
    shared = [round_population(p, grid, shape) for p, grid in zip(populations, grids, strict=True)]
    return assemble(shared, shape, network.steps, provenance or {})


def _round_finely(real: RealPopulation, input_shape: Shape, steps: int, max_code: int) -> RoundedPopulation:
    """A population at the largest power of two at which its weights, constant part and membrane fit."""
    ceiling = 2.0 ** np.floor(np.log2(WIDE.ceiling(real)))
    scale = ceiling
    while True:
        rounded = round_population(real, _grid(real, scale, max_code), input_shape)
        reached = _largest_membrane(rounded, steps)
        fits = rounded.constant is None or rounded.constant.room >= 1
        if fits and reached <= STATE_LIMIT:
            return rounded
        scale /= 2
        if scale < SMALLEST_SCALE * ceiling:
            rule, actual, limit = "int64 holds it", f"{reached:.1e} state units", f"{STATE_LIMIT:.1e}"
            if rounded.constant is not None and not fits:
                rule, limit = "a constant input channel holds its constant part", f"{max_code}"
                actual = f"code {max(rounded.constant.smallest_codes)}"
            remedy = "look for a weight, bias, threshold or mean of the normalisation out of all proportion"
            raise RuleViolations("integer network", [Violation(real.name, rule, actual, limit, remedy)])


def _largest_membrane(rounded: RoundedPopulation, steps: int) -> float:
    """Magnitude that no membrane nor threshold exceeds, in state units."""
    total = np.abs(rounded.population.bias).reshape(len(rounded.mean_error), -1).max(axis=1).astype(np.float64)
    for synapse in rounded.synapses:
        magnitudes = np.abs(synapse.weight.astype(np.float64)).reshape(len(total), -1).sum(axis=1)
        total += magnitudes * (rounded.max_code if synapse.source == INPUT else 1)
    largest = max(steps * float(total.max()), float(rounded.population.threshold))
    return largest * 2.0**FRACTION_BITS


def _grid(real: RealPopulation, scale: float, max_code: int) -> Grid:
    return Grid(scale, WIDE, WIDE.exponents_at(real, scale), max_code=max_code)
