"""Mapping without rounding: a float SNN as populations and synapses with real weights.

What enters neurons is linear in earlier spikes, so everything between neurons folds into synapses and biases. Batch
norm is one affine per channel in eval mode and folds into all synapses that enter it; average pooling folds into the
weights after it; residual sums become synapses from every population that is summed, identities included, however many
blocks ago it spiked. Normalisation folds into the first weights, its constant part as a kernel of its own, because the
network pads *after* normalising and so the constant part is missing where the kernel hangs over the border.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, Violation
from pipeline.models.graph import INPUT, Layer, Shape
from pipeline.models.spiking import SpikingNetwork
from pipeline.neurons import MIN_THRESHOLD

Float64Array = NDArray[np.float64]
READOUT = "readout"


@dataclass(frozen=True)
class RealSynapse:
    """What one population feels of another, in real units.

    Attributes:
        source: name of the population it reads, or "input" (whose activity is codes, 0..255 of pixels).
        kind: conv ``(out, in, kernel, kernel)`` or dense ``(out, in)``.
        weight: per spike, or per pixel code.
        constant: what a constant input adds through the same geometry, per kernel tap ``(out, kernel, kernel)``; None
            if nothing (dense synapses put it into the bias).
        stride, padding: of a conv.
    """

    source: str
    kind: Literal["conv", "dense"]
    weight: Float64Array
    constant: Float64Array | None = None
    stride: int = 1
    padding: int = 0

    def scaled(self, factor: Float64Array) -> RealSynapse:
        """Multiplied by a factor per output ``(out,)`` (or one for all, ``(1,)``)."""
        weight = self.weight * factor.reshape(-1, *([1] * (self.weight.ndim - 1)))
        constant = None if self.constant is None else self.constant * factor[:, None, None]
        return replace(self, weight=weight, constant=constant)


@dataclass(frozen=True)
class RealPopulation:
    """One population and the synapses that enter it, in real units.

    Attributes:
        name: of the population.
        shape: ``(channels, height, width)`` or ``(neurons,)``.
        synapses: one per source.
        bias: ``(channels,)`` or ``(neurons,)`` per step.
        threshold: None for the readout.
        beta: share of the membrane kept from step to step.
        subtract: whether the reset subtracts the threshold.
        alpha: share of the current kept from step to step.
    """

    name: str
    shape: Shape
    synapses: tuple[RealSynapse, ...]
    bias: Float64Array
    threshold: float | None
    beta: float = 1.0
    subtract: bool = False
    alpha: float = 0.0

    @property
    def is_leaky(self) -> bool:
        """Whether any state decays or current carries over; a readout that does answers with its last membrane."""
        return self.beta != 1 or self.alpha != 0

    def scaled(self, factor: float) -> RealPopulation:
        """All its numbers multiplied, which changes nothing it does."""
        synapses = tuple(synapse.scaled(np.array([factor])) for synapse in self.synapses)
        threshold = None if self.threshold is None else self.threshold * factor
        return replace(self, synapses=synapses, bias=self.bias * factor, threshold=threshold)


@dataclass(frozen=True)
class _Spikes:
    """Spikes of a population (or pixels), averaged over square windows; flattened or not makes no difference."""

    source: str
    shape: Shape
    pooling: int = 1


@dataclass(frozen=True)
class _Current:
    """A sum of synapses and a bias per channel, and what the synapses and a leaky readout after them keep."""

    synapses: tuple[RealSynapse, ...]
    bias: Float64Array
    shape: Shape
    alpha: float = 0.0
    beta: float = 1.0


_Signal = _Spikes | _Current


def fold(network: SpikingNetwork) -> list[RealPopulation]:
    """Fold everything that is linear into weights, in float64.

    Args:
        network: in eval mode semantics; it is not changed.

    Returns:
        One entry per spiking layer, and the readout last.

    Raises:
        RuleViolations: if a residual sum adds what no single grid of synapses can.
    """
    graph = network.graph
    state = {key: value.detach().double().cpu().numpy() for key, value in network.state_dict().items()}
    shapes = graph.shapes()
    populations: list[RealPopulation] = []
    image: _Signal = _Spikes(INPUT, graph.input_shape)
    normalization: dict[str, Float64Array] = {}

    def apply(layer: Layer, read: Sequence[_Signal]) -> _Signal:
        stem = f"layers.{layer.name}."
        parameters = {key.removeprefix(stem): value for key, value in state.items() if key.startswith(stem)}
        value = read[0]
        if layer.kind == "normalize":
            normalization.update(parameters)
        elif layer.kind == "add":
            value = _added(layer, [_as_current(one) for one in read])
        elif layer.kind == "scale":
            value = _scaled(_as_current(value), parameters["value"].reshape(1))
        elif isinstance(value, _Spikes):
            if layer.kind == "avg_pool":
                value = replace(value, pooling=value.pooling * int(layer.options["kernel_size"]))
            elif layer.kind in ("conv", "linear"):
                value = _weighted(layer, parameters, value, shapes[layer.name])
                if value.synapses[0].source == INPUT:
                    value = _normalized(value, normalization, graph.input_shape) if normalization else value
                    (synapse,) = value.synapses
                    value = replace(value, synapses=(replace(synapse, weight=synapse.weight / graph.max_code),))
        elif layer.kind == "batch_norm":
            scale = parameters["weight"] / np.sqrt(parameters["running_var"] + float(layer.options["eps"]))
            moved = _scaled(value, scale)
            value = replace(moved, bias=moved.bias + parameters["bias"] - parameters["running_mean"] * scale)
        elif layer.kind == "spike":
            threshold = max(float(parameters["threshold"]), MIN_THRESHOLD)
            beta, subtract = float(layer.options["beta"]), bool(layer.options["subtract"])
            populations.append(_population(layer.name, value, threshold, beta, subtract))
            value = _Spikes(layer.name, value.shape)
        elif layer.kind == "synaptic_current":
            value = replace(value, alpha=float(layer.options["alpha"]))
        elif layer.kind == "leaky_readout":
            value = replace(value, beta=float(layer.options["beta"]))
        return value

    readout = graph.evaluate(image, apply)
    assert isinstance(readout, _Current)
    return [*populations, _population(READOUT, readout, None, readout.beta, False)]


def _population(name: str, current: _Current, threshold: float | None, beta: float, subtract: bool) -> RealPopulation:
    shape, synapses, bias, alpha = current.shape, current.synapses, current.bias, current.alpha
    return RealPopulation(name, shape, synapses, bias, threshold, beta, subtract, alpha)


def _weighted(layer: Layer, parameters: Mapping[str, Float64Array], source: _Spikes, shape: Shape) -> _Current:
    weight = parameters["weight"]
    bias = parameters.get("bias", np.zeros(len(weight)))
    if layer.kind == "conv":
        pooling, stride, padding = source.pooling, int(layer.options["stride"]), int(layer.options["padding"])
        pooled = fold_pooling_into_conv(weight, pooling)
        synapse = RealSynapse(source.source, "conv", pooled, None, stride * pooling, padding * pooling)
    else:
        synapse = RealSynapse(source.source, "dense", fold_pooling_into_dense(weight, source.shape, source.pooling))
    return _Current((synapse,), bias, shape)


def _as_current(value: _Signal) -> _Current:
    """Spikes that enter a sum do so through synapses that change nothing."""
    if isinstance(value, _Current):
        return value
    identity = np.eye(value.shape[0])
    if len(value.shape) == 1:
        return _Current((RealSynapse(value.source, "dense", identity),), np.zeros(value.shape[0]), value.shape)
    channels, height, width = value.shape
    pooled = fold_pooling_into_conv(identity[:, :, None, None], value.pooling)
    synapse = RealSynapse(value.source, "conv", pooled, None, value.pooling)
    shape = (channels, height // value.pooling, width // value.pooling)
    return _Current((synapse,), np.zeros(channels), shape)


def _scaled(current: _Current, factor: Float64Array) -> _Current:
    return replace(
        current, synapses=tuple(synapse.scaled(factor) for synapse in current.synapses), bias=current.bias * factor
    )


def _added(layer: Layer, terms: Sequence[_Current]) -> _Current:
    by_source: dict[str, RealSynapse] = {}
    for synapse in (synapse for term in terms for synapse in term.synapses):
        known = by_source.get(synapse.source)
        merged = synapse if known is None else merge_synapses(known, synapse)
        if merged is None:
            rule = "a sum reads a source on one grid"
            actual = f"strides {known.stride if known else 0} and {synapse.stride} over {synapse.source}"
            raise RuleViolations(
                "network", [Violation(layer.path or layer.name, rule, actual, "equal strides", "use the same stride")]
            )
        by_source[synapse.source] = merged
    return _Current(tuple(by_source.values()), sum_of(term.bias for term in terms), terms[0].shape)


def sum_of(arrays: Iterable[Float64Array]) -> Float64Array:
    """Elementwise sum of at least one array."""
    first, *others = arrays
    return sum(others, first)


def merge_synapses(first: RealSynapse, second: RealSynapse) -> RealSynapse | None:
    """Two synapses between the same populations as one that does both; None if their strides differ."""
    if first.kind != second.kind or (first.kind == "conv" and first.stride != second.stride):
        return None
    if first.kind == "dense":
        return replace(first, weight=first.weight + second.weight)
    padding = max(first.padding, second.padding)
    reach = max(synapse.weight.shape[2] - synapse.padding for synapse in (first, second))
    margins = [(padding - s.padding, reach - (s.weight.shape[2] - s.padding)) for s in (first, second)]
    weight = sum_of(
        np.pad(s.weight, ((0, 0), (0, 0), margin, margin)) for s, margin in zip((first, second), margins, strict=True)
    )
    constants = [
        np.pad(s.constant, ((0, 0), margin, margin))
        for s, margin in zip((first, second), margins, strict=True)
        if s.constant is not None
    ]
    constant = sum_of(constants) if constants else None
    return replace(first, weight=weight, constant=constant, padding=padding)


def fold_pooling_into_conv(weight: Float64Array, pooling: int) -> Float64Array:
    """A conv after average pooling is a conv with every tap spread over the pooled window."""
    return weight.repeat(pooling, axis=2).repeat(pooling, axis=3) / pooling**2


def fold_pooling_into_dense(weight: Float64Array, source_shape: Shape, pooling: int) -> Float64Array:
    """A dense layer after average pooling (and flatten) reads every neuron of the unpooled source."""
    if len(source_shape) == 1:
        return weight
    channels, height, width = source_shape
    spatial = weight.reshape(len(weight), channels, height // pooling, width // pooling)
    spread = spatial.repeat(pooling, axis=2).repeat(pooling, axis=3) / pooling**2
    return spread.reshape(len(weight), -1)


def _normalized(current: _Current, parameters: Mapping[str, Float64Array], input_shape: Shape) -> _Current:
    """``W (x - mean) / std`` as weights per unit and a constant part per tap."""
    mean, std = parameters["mean"], parameters["std"]
    (synapse,) = current.synapses
    if synapse.kind == "conv":
        per_unit = synapse.weight / std[None, :, None, None]
        constant = -np.einsum("ocij,c->oij", per_unit, mean)
        folded = replace(synapse, weight=per_unit, constant=constant if constant.any() else None)
        return replace(current, synapses=(folded,))
    positions = int(np.prod(input_shape[1:]))
    per_unit = synapse.weight / std.repeat(positions)
    bias = current.bias - per_unit @ mean.repeat(positions)
    return replace(current, synapses=(replace(synapse, weight=per_unit),), bias=bias)
