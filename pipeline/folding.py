"""Mapping without rounding: a float SNN as populations and synapses with real weights.

Batch norm is one affine per channel in eval mode and folds into the weights before it; average pooling folds into
the weights after it; normalisation folds into the first weights, its constant part as a kernel of its own, because
the network pads *after* normalising and so the constant part is missing where the kernel hangs over the border.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.models.graph import Layer, Shape
from pipeline.models.spiking import SpikingNetwork
from pipeline.neurons import MIN_THRESHOLD

Float64Array = NDArray[np.float64]
PIXEL_LEVELS = 255


@dataclass(frozen=True)
class RealPopulation:
    """One population and the synapse that enters it, in real units.

    Attributes:
        name: of the population.
        source: name of the population it reads, or "input" (whose activity is pixel codes 0..255).
        kind: conv ``(out, in, kernel, kernel)`` or dense ``(out, in)``.
        weight: per spike, or per pixel code.
        constant: what a constant input adds through the same geometry, per kernel tap: conv
            ``(out, kernel, kernel)``; None if nothing (dense layers put it into the bias).
        bias: ``(out,)`` per step.
        threshold: None for the readout.
        shape: of the population.
    """

    name: str
    source: str
    kind: Literal["conv", "dense"]
    weight: Float64Array
    constant: Float64Array | None
    bias: Float64Array
    threshold: float | None
    shape: Shape
    stride: int = 1
    padding: int = 0


def fold(network: SpikingNetwork) -> list[RealPopulation]:
    """Fold everything that is linear into weights, in float64.

    Args:
        network: in eval mode semantics; it is not changed.

    Returns:
        One entry per spiking layer, and the readout last.
    """
    state = {key: value.detach().double().numpy() for key, value in network.state_dict().items()}
    shapes = network.graph.shapes()
    populations: list[RealPopulation] = []
    mean: Float64Array = np.zeros(network.graph.input_shape[0])
    std: Float64Array = np.ones(network.graph.input_shape[0])
    current: RealPopulation | None = None
    source, source_shape, pooling = "input", network.graph.input_shape, 1
    for layer in network.graph.layers:
        parameters = {
            key.removeprefix(f"layers.{layer.name}."): value
            for key, value in state.items()
            if key.startswith(f"layers.{layer.name}.")
        }
        if layer.kind == "normalize":
            mean, std = parameters["mean"], parameters["std"]
        elif layer.kind == "avg_pool":
            pooling *= int(layer.options["kernel_size"])
        elif layer.kind in ("conv", "linear"):
            weight, bias = parameters["weight"], parameters["bias"]
            current = _weighted(layer, weight, bias, source, source_shape, pooling, shapes[layer.name])
            if source == "input":
                current = fold_normalization(current, mean, std, source_shape)
            pooling = 1
        elif layer.kind == "batch_norm" and current is not None:
            current = fold_batch_norm(current, parameters, float(layer.options["eps"]))
        elif layer.kind == "spike" and current is not None:
            threshold = max(float(parameters["threshold"]), MIN_THRESHOLD)
            populations.append(replace(current, name=layer.name, threshold=threshold))
            source, source_shape = layer.name, current.shape
    assert current is not None
    return [*populations, replace(current, name="readout")]


def _weighted(
    layer: Layer,
    weight: Float64Array,
    bias: Float64Array,
    source: str,
    source_shape: Shape,
    pooling: int,
    shape: Shape,
) -> RealPopulation:
    if layer.kind == "conv":
        stride, padding = int(layer.options["stride"]), int(layer.options["padding"])
        pooled = fold_pooling_into_conv(weight, pooling)
        return RealPopulation(
            layer.name, source, "conv", pooled, None, bias, None, shape, stride * pooling, padding * pooling
        )
    unpooled = fold_pooling_into_dense(weight, source_shape, pooling)
    return RealPopulation(layer.name, source, "dense", unpooled, None, bias, None, shape)


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


def fold_normalization(
    population: RealPopulation, mean: Float64Array, std: Float64Array, input_shape: Shape
) -> RealPopulation:
    """``W (code / 255 - mean) / std`` as weights per code and a constant part per tap."""
    if population.kind == "conv":
        per_unit = population.weight / std[None, :, None, None]
        constant = -np.einsum("ocij,c->oij", per_unit, mean)
        constant = None if not constant.any() else constant
        return replace(population, weight=per_unit / PIXEL_LEVELS, constant=constant)
    positions = int(np.prod(input_shape[1:]))
    per_unit = population.weight / std.repeat(positions)
    bias = population.bias - per_unit @ mean.repeat(positions)
    return replace(population, weight=per_unit / PIXEL_LEVELS, bias=bias)


def fold_batch_norm(population: RealPopulation, norm: dict[str, Float64Array], eps: float) -> RealPopulation:
    """Batch norm in eval mode is ``scale y + shift`` per channel."""
    scale = norm["weight"] / np.sqrt(norm["running_var"] + eps)
    per_channel = scale.reshape(-1, *([1] * (population.weight.ndim - 1)))
    constant = None if population.constant is None else population.constant * scale[:, None, None]
    bias = (population.bias - norm["running_mean"]) * scale + norm["bias"]
    return replace(population, weight=population.weight * per_channel, constant=constant, bias=bias)
