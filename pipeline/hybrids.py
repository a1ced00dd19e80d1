"""Between a float SNN and its integer network: networks in which kind after kind of number is that of the integers.

All is taken from the two networks themselves, whoever made the integers and however, so that integers that were rounded
badly, that learned on or that were damaged are traced to the kind of number that is to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from hardware.network import DECAY_UNITY, INPUT, IntegerNetwork, Population, Synapse
from pipeline.folding import RealPopulation, RealSynapse
from pipeline.integer_recipe import lies_on_the_grid
from pipeline.unrounded import current

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Pair:
    """A population as floats, in weight units, and as integers.

    Attributes:
        means: activity of its sources in the float SNN, ``(*shape)`` by name.
    """

    real: RealPopulation
    integer: Population
    synapses: Mapping[str, Synapse]
    constant_codes: tuple[int, ...]
    means: Mapping[str, Float64Array]

    def weight(self, synapse: RealSynapse) -> Float64Array:
        """The integer weights, without the constant input channels."""
        return self._presented(synapse)[0]

    @cached_property
    def mean_error(self) -> Float64Array:
        """``(out,)``: what the integer weights add to the sums on average."""
        errors = tuple(
            replace(synapse, weight=self.weight(synapse) - synapse.weight, constant=None)
            for synapse in self.real.synapses
        )
        error = replace(self.real, synapses=errors, bias=np.zeros_like(self.real.bias))
        sums = current(error, {name: torch.from_numpy(mean)[None, None] for name, mean in self.means.items()})
        mean: Float64Array = sums.flatten(3).mean(3)[0, 0].numpy() if sums.ndim > 3 else sums[0, 0].numpy()
        return mean

    @cached_property
    def integer_bias(self) -> Float64Array:
        """``(out,)``, or of the population's shape where it differs within a channel."""
        bias = self.integer.bias.astype(np.float64)
        per_channel = bias.reshape(len(bias), -1)
        return per_channel[:, 0] if (per_channel == per_channel[:, :1]).all() else bias

    @cached_property
    def bias(self) -> Float64Array:
        """The integers' bias and what their constant channels add at every position, beyond the float SNN's."""
        bias = self.integer_bias
        added = np.zeros(len(bias))
        for synapse in self.real.synapses:
            carried = self.constant(synapse)
            if carried is None:
                continue
            if synapse.kind == "dense":
                added += carried.sum(1)
            elif (anchor := _anchor(synapse)) is not None:
                added += carried[anchor]
                added -= 0 if synapse.constant is None else synapse.constant[anchor]
        return bias + added.reshape(-1, *([1] * (bias.ndim - 1)))

    def constant(self, synapse: RealSynapse) -> Float64Array | None:
        """What the constant input channels add: of a conv per tap ``(out, kernel, kernel)``, else by position."""
        if synapse.source != INPUT:
            return None
        kernel, codes = self._presented(synapse)[1], np.array(self.constant_codes, np.float64)
        if synapse.kind == "conv":
            added: Float64Array = np.einsum("ocij,c->oij", kernel, codes)
        else:
            by_position = kernel.reshape(len(kernel), len(codes), -1 if len(codes) else 1)
            added = np.einsum("ocp,c->op", by_position, codes)
        return added

    def _presented(self, synapse: RealSynapse) -> tuple[Float64Array, Float64Array]:
        whole = self.synapses[synapse.source].weight.astype(np.float64)
        inputs = synapse.weight.shape[1]
        return whole[:, :inputs], whole[:, inputs:]


Step = Callable[[RealPopulation, _Pair], RealPopulation]


def _thresholds(before: RealPopulation, pair: _Pair) -> RealPopulation:
    if before.threshold is None:
        return before
    # On the grid "above the mantissa" is "at the next number or above".
    return replace(before, threshold=float(pair.integer.threshold + lies_on_the_grid(pair.real)))


def _weights(before: RealPopulation, pair: _Pair) -> RealPopulation:
    synapses = tuple(replace(synapse, weight=pair.weight(synapse)) for synapse in before.synapses)
    # A bias that made up for the weights did so for them: where it lies nearer to having done so, they are judged
    # with that, and what else became of the bias is the next step's.
    compensated = before.bias - pair.mean_error
    bias = pair.bias if pair.bias.ndim == 1 else pair.bias.reshape(len(pair.bias), -1).mean(1)
    is_nearer = np.abs(bias - compensated) < np.abs(bias - before.bias)
    return replace(before, synapses=synapses, bias=np.where(is_nearer, compensated, before.bias))


def _bias(before: RealPopulation, pair: _Pair) -> RealPopulation:
    return replace(before, bias=pair.bias)


def _input(before: RealPopulation, pair: _Pair) -> RealPopulation:
    synapses = []
    for synapse, real in zip(before.synapses, pair.real.synapses, strict=True):
        constant = pair.constant(real) if synapse.kind == "conv" else None  # a dense one's is all in the bias
        same = constant is None or (real.constant is None and not _off_anchor(real, constant).any())
        synapses.append(synapse if same else replace(synapse, constant=constant))
    if all(new is old for new, old in zip(synapses, before.synapses, strict=True)):
        return before
    # The tap that meets every position is the bias's until now, and the sum of floats is no integer.
    return replace(before, synapses=tuple(synapses), bias=pair.integer_bias)


def _decay(before: RealPopulation, pair: _Pair) -> RealPopulation:
    shares = (pair.integer.current_decay, pair.integer.voltage_decay)
    alpha, beta = (1 - share / DECAY_UNITY for share in shares)
    return replace(before, alpha=alpha, beta=beta)


STEPS: Mapping[str, Step] = {
    "thresholds": _thresholds,
    "weights": _weights,
    "bias": _bias,
    "input codes": _input,
    "decay": _decay,
}
"""Kinds of numbers, in the order in which they become integers."""


def hybrids(
    populations: Sequence[RealPopulation],
    network: IntegerNetwork,
    means: Mapping[str, Float64Array],
) -> Iterator[tuple[str, list[RealPopulation]]]:
    """The float SNN in weight units ("float64"), and after each of ``STEPS``; those that change nothing are left out.

    After the last step all numbers are the integer network's.

    Args:
        populations: the float SNN, folded.
        network: its integer network, of the same populations.
        means: activity ``(*shape)`` of the input and of the float SNN's populations, averaged over samples and steps,
            for what weights do on average.
    """
    pairs = []
    for real in populations:
        integer, incoming = network.by_name[real.name], network.incoming(real.name)
        by_source = {synapse.source: synapse for synapse in incoming}
        codes = network.input.constant_codes
        pairs.append(_Pair(real.scaled(integer.scale), integer, by_source, codes, means))
    now = [pair.real for pair in pairs]
    yield "float64", now
    for name, step in STEPS.items():
        after = [step(before, pair) for before, pair in zip(now, pairs, strict=True)]
        if any(not _equal(*both) for both in zip(now, after, strict=True)):
            yield name, after
        now = after


def _anchor(synapse: RealSynapse) -> tuple[slice, int, int] | None:
    """Index of the tap of a conv that meets every output position, if there is one."""
    if synapse.weight.shape[2] < 2 * synapse.padding + 1:
        return None
    return slice(None), synapse.padding, synapse.padding


def _off_anchor(synapse: RealSynapse, taps: Float64Array) -> Float64Array:
    others = taps.copy()
    if (anchor := _anchor(synapse)) is not None:
        others[anchor] = 0
    return others


def _equal(first: RealPopulation, second: RealPopulation) -> bool:
    return (
        (first.threshold, first.alpha, first.beta) == (second.threshold, second.alpha, second.beta)
        and np.array_equal(first.bias, second.bias)
        and all(
            np.array_equal(a.weight, b.weight) and _same_constant(a.constant, b.constant)
            for a, b in zip(first.synapses, second.synapses, strict=True)
        )
    )


def _same_constant(first: Float64Array | None, second: Float64Array | None) -> bool:
    if first is None or second is None:
        return first is second
    return np.array_equal(first, second)
