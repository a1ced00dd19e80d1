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
from pipeline.folding import RealPopulation, RealSynapse
from pipeline.models.graph import Shape
from pipeline.number_formats import NumberFormat
from pipeline.rounding import InputStatistics, round_compensated

Float64Array = NDArray[np.float64]
MAX_CODE = 255


@dataclass(frozen=True)
class Grid:
    """Where the numbers of one population may lie.

    Attributes:
        scale: weight units per real unit.
        format: of its integers.
        exponents: one per synapse.
        constant_code: of the network's constant input channel, 0 for no such channel; None if this population alone
            reads pixels and may have the smallest that suits it.
    """

    scale: float
    format: NumberFormat
    exponents: tuple[int, ...]
    constant_code: int | None = None


@dataclass(frozen=True)
class ConstantChannel:
    """The constant part of what a population reads of the image, as one more input channel; weight units.

    Attributes:
        kernel: with the geometry of the weights, one channel; multiples of ``2**exponent``.
        code: that the channel holds; 0 if there is no channel.
        smallest_code: with which the kernel would still fit.
        bias: ``(out,)`` that is left.
        error: by rounding the kernel, per tap, ``(out, kernel, kernel)`` or ``(out, positions)``; the bias makes up
            for the tap over the pixel itself.
    """

    kernel: Float64Array
    code: int
    smallest_code: int
    bias: Float64Array
    error: Float64Array


@dataclass(frozen=True)
class RoundedPopulation:
    """A population as integers, and what rounding did to it (in weight units).

    Attributes:
        synapses: in the order of the real ones; one that reads pixels has the constant channel last, if there is one.
        constant: that channel; None if the population reads no pixels.
        mean_error: ``(out,)`` of the sums, by rounding the weights; the bias took it back.
        bias_error: ``(out,)``, by rounding the bias.
    """

    population: Population
    synapses: tuple[Synapse, ...]
    constant: ConstantChannel | None
    mean_error: Float64Array
    bias_error: Float64Array

    @property
    def constant_code(self) -> int:
        """Of the constant channel; 0 if there is none."""
        return 0 if self.constant is None else self.constant.code


def round_population(
    real: RealPopulation, grid: Grid, input_shape: Shape, statistics: InputStatistics | None = None
) -> RoundedPopulation:
    """Round a population to a grid; weights beyond the range are clipped.

    With statistics of the inputs (of the synapses in :func:`rounding_order`) the errors of the weights are made to
    cancel, and the bias takes back their mean.

    A leak is rounded to 12 bits, and at each step the membrane towards zero, to a 64th of a weight unit. The first
    is a relative error of the membrane of at most T / 8192, whatever the scale; the second is at most
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
    parts = dict(zip(order, np.split(rounded, np.cumsum(sizes)[:-1], axis=1), strict=True))
    bias = real.bias * scale - mean_error
    constant: ConstantChannel | None = None
    synapses = []
    for i, (synapse, exponent) in enumerate(zip(real.synapses, grid.exponents, strict=True)):
        weight = parts[i].reshape(synapse.weight.shape)
        if synapse.source == INPUT:
            constant = split_constant(synapse, grid, exponent, bias, input_shape)
            bias = constant.bias
            if constant.code:
                weight = np.concatenate([weight, constant.kernel], axis=1)
        integers = weight.astype(np.int32)
        synapses.append(
            Synapse(
                synapse.source, real.name, synapse.kind, integers, grid.format.bits, exponent, synapse.stride,
                synapse.padding,
            )
        )  # fmt: skip
    whole = np.rint(bias)
    per_neuron = whole.reshape(-1, *([1] * (len(real.shape) - 1)))
    population = Population(
        real.name,
        real.shape,
        0 if real.threshold is None else threshold_mantissa(real, scale),
        np.broadcast_to(per_neuron, real.shape).astype(np.int64),
        scale,
        spiking=real.threshold is not None,
        voltage_decay=round(DECAY_UNITY * (1 - real.beta)),
        reset="subtract" if real.subtract else "zero",
    )
    return RoundedPopulation(population, tuple(synapses), constant, mean_error, whole - bias)


def require_finite(populations: Sequence[RealPopulation]) -> None:
    """Refuse NaN and infinite parameters, naming every population that has them."""
    problems = [
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
    nearest = round(real.threshold * scale)
    if lies_on_the_grid(real):
        return max(nearest - 1, 0)
    return max(nearest, 1 if real.subtract else 0)


def lies_on_the_grid(real: RealPopulation) -> bool:
    """Whether membranes are whole weight units, and a spike only compares."""
    return real.beta == 1 and not real.subtract


def split_constant(
    synapse: RealSynapse, grid: Grid, exponent: int, bias: Float64Array, input_shape: Shape
) -> ConstantChannel:
    """The constant part of a synapse that reads pixels as a constant input channel plus what is left for the bias.

    Where one tap meets every output position (the tap over the pixel itself), it carries the bias too, to the nearest
    multiple of the code, if a chip's bias has too few bits for it.

    Args:
        synapse: that reads pixels.
        grid, exponent: of its weights.
        bias: ``(out,)`` of the population, in weight units.
        input_shape: of one image.
    """
    step, (_, largest) = 2**exponent, grid.format.mantissas
    needed = (
        np.zeros((len(bias), int(np.prod(input_shape[1:]))))
        if synapse.kind == "dense"
        else np.zeros((len(bias), *synapse.weight.shape[2:]))
    )
    if synapse.constant is not None:
        needed = synapse.constant * grid.scale
    max_bias = grid.format.max_bias
    is_needed = bool(needed.any()) or (max_bias is not None and np.abs(bias).max(initial=0) > max_bias)
    anchor = anchor_of(synapse)
    if anchor is not None and is_needed and max_bias is not None:
        needed[anchor] += bias
        bias = np.zeros_like(bias)
    smallest = max(1, int(np.ceil(np.abs(needed).max() / (largest * step)))) if is_needed else 0
    code = smallest if grid.constant_code is None else grid.constant_code
    kernel = np.rint(needed / (max(code, 1) * step)) * step
    error = kernel * code - needed
    if anchor is not None:
        bias = bias - error[anchor]
        error[anchor] = 0
    shaped = kernel[:, None] if synapse.kind == "conv" else kernel
    return ConstantChannel(shaped, code, smallest, bias, error)


def anchor_of(synapse: RealSynapse) -> tuple[Any, ...] | None:
    """Index of the tap that meets every output position, if there is one."""
    if synapse.kind == "dense":
        return slice(None), 0
    if synapse.weight.shape[2] < 2 * synapse.padding + 1:
        return None
    return slice(None), synapse.padding, synapse.padding


def assemble(
    rounded: Sequence[RoundedPopulation], input_shape: Shape, steps: int, provenance: Mapping[str, Any]
) -> IntegerNetwork:
    """The integer network of rounded populations.

    Raises:
        RuleViolations: if it is not one: a constant part has no code of 8 bits.
    """
    return IntegerNetwork(
        input_spec(input_shape, max(one.constant_code for one in rounded)),
        tuple(one.population for one in rounded),
        tuple(synapse for one in rounded for synapse in one.synapses),
        steps,
        provenance,
    )


def input_spec(shape: Shape, constant_code: int) -> InputSpec:
    """8-bit pixels, and the constant channel if there is one."""
    return InputSpec(shape, MAX_CODE, (constant_code,) if constant_code else ())
