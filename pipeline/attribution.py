"""Where the difference between the float SNN and its integer network comes from: which of the numbers was rounded.

Hybrids are run in which only the weights, only the thresholds, ... are those of the integer network and all else is
float64. They run freely, so a flipped spike has its consequences in later layers, as it does when deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hardware.network import DECAY_UNITY, INPUT
from pipeline.folding import RealPopulation, RealSynapse
from pipeline.integer_recipe import RoundedPopulation, lies_on_the_grid
from pipeline.unrounded import run_unrounded

Float64Array = NDArray[np.float64]
Spikes = Mapping[str, NDArray[np.bool_]]
EVERYTHING = "everything"


@dataclass(frozen=True)
class AttributionRow:
    """The difference that rounding one kind of number makes.

    Attributes:
        rounded: what was rounded: "nothing" (what is left is float32 against float64), "weights" (their mean error
            taken back by an unrounded bias), "thresholds", "bias", "input" (the constant input channels), "decay", or
            "everything", which is the integer network itself.
        disagreement: share of spikes that differ from the float model's, by spiking population.
        logit_error: root mean square error of the logits, relative to their own root mean square.
        argmax_flips: images whose class differs.
        samples: images looked at.
    """

    rounded: str
    disagreement: Mapping[str, float]
    logit_error: float
    argmax_flips: int
    samples: int


def attribute(
    populations: Sequence[RealPopulation],
    rounded: Sequence[RoundedPopulation],
    codes: NDArray[np.uint8],
    steps: int,
    spikes: Spikes,
    logits: Float64Array,
    *,
    timed: bool = False,
) -> tuple[AttributionRow, ...]:
    """One row for each kind of number that is rounded, and one for none; not the one for everything.

    Args:
        populations: as folded.
        rounded: the same as integers.
        codes: uint8 ``(samples, [steps,] *shape)``.
        steps: T.
        spikes: of the float SNN on them, ``(samples, steps, ...)`` by spiking population.
        logits: of the float SNN, ``(samples, classes)``.
        timed: whether codes change over time.
    """
    rows = []
    for name, hybrid in HYBRIDS.items():
        mixed = [hybrid(real, one) for real, one in zip(populations, rounded, strict=True)]
        if name != "nothing" and not any(isinstance(one, RealPopulation) for one in mixed):
            continue
        scaled = [
            one if one is not None else scaled_population(real, integer)
            for one, real, integer in zip(mixed, populations, rounded, strict=True)
        ]
        found, readout = run_unrounded(scaled, codes, steps, timed=timed)
        rows.append(compare(name, found, readout / rounded[-1].population.scale, spikes, logits))
    return tuple(rows)


def compare(name: str, found: Spikes, readout: Float64Array, spikes: Spikes, logits: Float64Array) -> AttributionRow:
    """A row from spikes and logits of a hybrid and of the float SNN."""
    return AttributionRow(
        name,
        {key: float(np.mean(found[key].reshape(spikes[key].shape) != spikes[key])) for key in spikes},
        relative_error(readout, logits),
        int((readout.argmax(1) != logits.argmax(1)).sum()),
        len(logits),
    )


def relative_error(found: Float64Array, expected: Float64Array) -> float:
    """Root mean square error over the root mean square."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / max(float(np.mean(expected**2)), 1e-300)))


def scaled_population(real: RealPopulation, integer: RoundedPopulation) -> RealPopulation:
    """A population in weight units, nothing rounded."""
    return real.scaled(integer.population.scale)


def _nothing(_real: RealPopulation, _integer: RoundedPopulation) -> RealPopulation | None:
    return None


def _weights(real: RealPopulation, integer: RoundedPopulation) -> RealPopulation | None:
    scaled = scaled_population(real, integer)
    synapses = tuple(
        replace(synapse, weight=_without_constant_channels(synapse, one.weight))
        for synapse, one in zip(scaled.synapses, integer.synapses, strict=True)
    )
    return replace(scaled, synapses=synapses, bias=scaled.bias - integer.mean_error)


def _without_constant_channels(synapse: RealSynapse, weight: NDArray[np.int32]) -> Float64Array:
    return weight[:, : synapse.weight.shape[1]].astype(np.float64)


def _thresholds(real: RealPopulation, integer: RoundedPopulation) -> RealPopulation | None:
    if real.threshold is None:
        return None
    mantissa = float(integer.population.threshold)
    # On the grid "above the mantissa" is "at the next number or above".
    return replace(scaled_population(real, integer), threshold=mantissa + 1 if lies_on_the_grid(real) else mantissa)


def _bias(real: RealPopulation, integer: RoundedPopulation) -> RealPopulation | None:
    scaled = scaled_population(real, integer)
    return replace(scaled, bias=scaled.bias + integer.bias_error) if integer.bias_error.any() else None


def _input(real: RealPopulation, integer: RoundedPopulation) -> RealPopulation | None:
    constant = integer.constant
    if constant is None or not constant.error.any():
        return None
    scaled = scaled_population(real, integer)

    def with_error(synapse: RealSynapse) -> RealSynapse:
        if synapse.source != INPUT:
            return synapse
        exact = np.zeros_like(constant.error) if synapse.constant is None else synapse.constant
        return replace(synapse, constant=exact + constant.error)

    return replace(scaled, synapses=tuple(with_error(synapse) for synapse in scaled.synapses))


def _decay(real: RealPopulation, integer: RoundedPopulation) -> RealPopulation | None:
    alpha, beta = (
        1 - share / DECAY_UNITY for share in (integer.population.current_decay, integer.population.voltage_decay)
    )
    changed = (alpha, beta) != (real.alpha, real.beta)
    return replace(scaled_population(real, integer), alpha=alpha, beta=beta) if changed else None


HYBRIDS: Mapping[str, Callable[[RealPopulation, RoundedPopulation], RealPopulation | None]] = {
    "nothing": _nothing,
    "weights": _weights,
    "thresholds": _thresholds,
    "bias": _bias,
    "input": _input,
    "decay": _decay,
}
"""By what is rounded: a population in weight units with only that rounded, or None if it has nothing to round."""
