"""One folded population as integers at a given scale, and all of them as an integer network.

A population is unchanged when its weights, biases and threshold are scaled together, so it has one scale; each of its
synapses has an exponent of its own, so that weights of 0.5 beside weights of 0.05 both use their bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, Violation
from hardware.network import DECAY_UNITY, INPUT, InputSpec, IntegerNetwork, Population, Synapse
from pipeline.constant_channels import ConstantChannels, split_constant
from pipeline.folding import RealPopulation
from pipeline.models.graph import PIXEL_LEVELS, Shape
from pipeline.number_formats import NumberFormat
from pipeline.rounding import InputStatistics, round_compensated

Float64Array = NDArray[np.float64]
ROUNDING, MAX_ROUNDING = 2.0**-22, 2.0**-4
"""Relative step between float32 numbers, at most twice, and weight units beyond which that is no rounding any more."""
MAX_WHOLE = 2**53
"""Largest magnitude of a bias here: float64 counts no further, int64 does, and no target nor state comes near."""


@dataclass(frozen=True)
class Grid:
    """Where the numbers of one population may lie.

    Attributes:
        scale: weight units per real unit.
        format: of its integers.
        exponents: one per synapse.
        constant_codes: of the network's constant input channels; None if this population alone reads pixels and may
            have the smallest that suit it.
        max_code: largest code of the network's input.
    """

    scale: float
    format: NumberFormat
    exponents: tuple[int, ...]
    constant_codes: tuple[int, ...] | None = None
    max_code: int = PIXEL_LEVELS


@dataclass(frozen=True)
class RoundedPopulation:
    """A population as integers, and what rounding did to it (in weight units).

    Attributes:
        synapses: in the order of the real ones; one that reads pixels has the constant channels last.
        constant: those channels; None if the population reads no input.
        mean_error: ``(out,)`` of the sums, by rounding the weights; the bias took it back.
        bias_error: ``(out,)``, by rounding the bias.
    """

    population: Population
    synapses: tuple[Synapse, ...]
    constant: ConstantChannels | None
    mean_error: Float64Array
    bias_error: Float64Array
    max_code: int = PIXEL_LEVELS

    @property
    def constant_codes(self) -> tuple[int, ...]:
        """Of the constant channels that it reads."""
        return () if self.constant is None else self.constant.codes

    def input_spec(self, input_shape: Shape) -> InputSpec:
        """The network's input as this population reads it."""
        return InputSpec(input_shape, self.max_code, self.constant_codes)


def round_population(
    real: RealPopulation, grid: Grid, input_shape: Shape, statistics: InputStatistics | None = None
) -> RoundedPopulation:
    """Round a population to a grid; weights beyond the range are clipped, biases at ``MAX_WHOLE``.

    With statistics of the inputs (of the synapses in :func:`rounding_order`) the errors of the weights, and those of
    the constant channels, are made to cancel, and the bias takes back their mean (but for a current that decays).

    A leak is rounded to 12 bits, and at each step the membrane towards zero, to a 64th of a weight unit. The first
    changes a membrane by at most T / 8192 of all that entered it, whatever the scale; the second by at most
    1 / (64 (1 - beta)) units (and T / 64), which a fine scale makes small. So the scale of a leaky population is as
    free as that of any other.
    """
    scale, (low, high) = grid.scale, grid.format.mantissas
    order = rounding_order(grid.exponents)
    flat = np.concatenate([real.synapses[i].weight.reshape(len(real.bias), -1) for i in order], axis=1) * scale
    sizes = [real.synapses[i].weight[0].size for i in order]
    steps = np.repeat([2.0 ** grid.exponents[i] for i in order], sizes)
    if statistics is None:
        rounded, mean_error = np.clip(np.rint(flat / steps), low, high) * steps, np.zeros(len(flat))
    else:
        rounded, mean_error = round_compensated(flat, statistics, low, high, steps)
        if real.alpha:  # which a bias cannot take back, see split_constant
            mean_error = np.zeros(len(flat))
    parts = dict(zip(order, np.split(rounded, np.cumsum(sizes)[:-1], axis=1), strict=True))
    bias = real.bias * scale - mean_error
    constant: ConstantChannels | None = None
    synapses = []
    for i, (synapse, exponent) in enumerate(zip(real.synapses, grid.exponents, strict=True)):
        weight = parts[i].reshape(synapse.weight.shape)
        if synapse.source == INPUT:
            constant = split_constant(
                synapse, scale, 2**exponent, grid.format, bias, input_shape, grid.constant_codes,
                max_code=grid.max_code, outlasts_step=real.alpha != 0, compensated=statistics is not None,
            )  # fmt: skip
            bias = constant.bias
            weight = np.concatenate([weight, constant.kernel], axis=1)
        integers = weight.astype(np.int32)
        synapses.append(
            Synapse(
                synapse.source, real.name, synapse.kind, integers, grid.format.bits, exponent, synapse.stride,
                synapse.padding,
            )
        )  # fmt: skip
    whole = np.clip(np.rint(bias), -MAX_WHOLE, MAX_WHOLE)
    per_neuron = whole.reshape(-1, *([1] * (len(real.shape) - 1)))
    population = Population(
        real.name,
        real.shape,
        0 if real.threshold is None else threshold_mantissa(real, scale),
        np.broadcast_to(per_neuron, real.shape).astype(np.int64),
        scale,
        spiking=real.threshold is not None,
        current_decay=round(DECAY_UNITY * (1 - real.alpha)),
        voltage_decay=round(DECAY_UNITY * (1 - real.beta)),
        reset="subtract" if real.subtract else "zero",
    )
    return RoundedPopulation(population, tuple(synapses), constant, mean_error, whole - bias, grid.max_code)


def require_roundable(populations: Sequence[RealPopulation]) -> None:
    """Refuse what cannot be rounded, naming every population that has it.

    Raises:
        RuleViolations: for NaN and infinite parameters, and biases of currents that decay without an input whose
            constant channel could carry them.
    """
    problems = [
        Violation(
            population.name,
            "a bias of a current that decays enters through the input",
            ", ".join(synapse.source for synapse in population.synapses),
            INPUT,
            "give it to a neuron that always spikes",
        )
        for population in populations
        if population.alpha and population.bias.any() and all(s.source != INPUT for s in population.synapses)
    ]
    problems += [
        Violation(
            population.name,
            "parameters are finite",
            "NaN or infinite values",
            "finite numbers",
            "train again with a lower learning rate",
        )
        for population in populations
        if not all(np.isfinite(values).all() for values in _parameters(population))
    ]
    if problems:
        raise RuleViolations("float network", problems)


def _parameters(population: RealPopulation) -> list[Any]:
    synapses = [values for synapse in population.synapses for values in (synapse.weight, synapse.constant)]
    return [values for values in (*synapses, population.bias, population.threshold) if values is not None]


def rounding_order(exponents: Sequence[int]) -> list[int]:
    """Synapses in the order in which their weights are rounded: finer ones later, to make up for the coarser."""
    return sorted(range(len(exponents)), key=lambda i: -exponents[i])


def threshold_mantissa(real: RealPopulation, scale: float) -> int:
    """Mantissa of the strict comparison.

    On the integer grid u >= k is u > k - 1. Off it, after a decay, there are no ties to speak of, and where the
    threshold is subtracted it should be the threshold and not one less.
    """
    assert real.threshold is not None
    level = real.threshold * scale
    nearest = round(level)
    if lies_on_the_grid(real) and 0 < level - nearest <= min(nearest * ROUNDING, MAX_ROUNDING):
        nearest += 1  # "at the next float" was written for "above a whole number"
    if lies_on_the_grid(real):
        return max(nearest - 1, 0)
    return max(nearest, 1 if real.subtract else 0)


def lies_on_the_grid(real: RealPopulation) -> bool:
    """Whether membranes are whole weight units, and a spike only compares."""
    return not real.is_leaky and not real.subtract


def assemble(
    rounded: Sequence[RoundedPopulation], input_shape: Shape, steps: int, provenance: Mapping[str, Any]
) -> IntegerNetwork:
    """The integer network of rounded populations.

    Raises:
        RuleViolations: if it is not one: a constant part has no code of 8 bits.
    """
    return IntegerNetwork(
        max((one.input_spec(input_shape) for one in rounded), key=lambda spec: len(spec.constant_codes)),
        tuple(one.population for one in rounded),
        tuple(synapse for one in rounded for synapse in one.synapses),
        steps,
        provenance,
    )
