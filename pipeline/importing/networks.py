"""Populations of an imported graph as a float SNN, which is attacked, quantised and exported like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hardware.formats.nir_graph import NirFile
from pipeline.folding import RealPopulation, RealSynapse
from pipeline.importing.conventions import Conventions
from pipeline.importing.lowering import lower
from pipeline.models.graph import INPUT, PIXEL_LEVELS, Layer, LayerGraph, LayerKind, Options, Shape
from pipeline.models.spiking import SpikingNetwork


def network_of(file: NirFile, conventions: Conventions) -> SpikingNetwork:
    """A NIR graph as a float SNN in eval mode, its parameters in float32.

    Raises:
        RuleViolations: for every node that cannot be deployed.
    """
    lowered = lower(file, conventions)
    builder = _Builder(lowered.input_shape, lowered.nodes)
    for population in lowered.populations:
        builder.add(population)
    max_code = PIXEL_LEVELS if conventions.input == "pixels" else 1
    network = SpikingNetwork(LayerGraph(lowered.input_shape, tuple(builder.layers), max_code), conventions.steps)
    values = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in builder.values.items()}
    network.load_state_dict(values)
    return network.eval()


class _Builder:
    """Layers in order, and the values of their parameters."""

    def __init__(self, input_shape: Shape, nodes: Mapping[str, str]) -> None:
        self.layers: list[Layer] = []
        self.values: dict[str, NDArray[np.float64] | float] = {}
        self._shapes: dict[str, Shape] = {INPUT: input_shape}
        self._nodes = nodes
        self._flattened: dict[str, str] = {}

    def add(self, population: RealPopulation) -> None:
        """Append a population: its synapses, their sum, what outlasts a step, its neurons."""
        name = population.name
        entering = [self._weighted(population, index) for index in range(len(population.synapses))]
        last = self._append(f"{name}_sum", "add", {}, *entering) if len(entering) > 1 else entering[0]
        if population.alpha:
            last = self._append(f"{name}_current", "synaptic_current", {"alpha": population.alpha}, last)
        if population.threshold is not None:
            self._append(name, "spike", {"beta": population.beta, "subtract": population.subtract}, last)
            self.values[f"layers.{name}.threshold"] = population.threshold
        elif population.is_leaky:
            self._append(f"{name}_membrane", "leaky_readout", {"beta": population.beta}, last)
        self._shapes[name] = population.shape

    def _weighted(self, population: RealPopulation, index: int) -> str:
        """A synapse; the first one carries the bias."""
        synapse = population.synapses[index]
        bias = bool(index == 0 and population.bias.any())
        options: dict[str, Any] = {"bias": bias}
        if synapse.kind == "conv":
            outputs, inputs, kernel, _ = synapse.weight.shape
            options |= {"in_channels": inputs, "out_channels": outputs, "kernel_size": kernel}
            options |= {"stride": synapse.stride, "padding": synapse.padding}
            source = synapse.source
        else:
            outputs, inputs = synapse.weight.shape
            options |= {"in_features": inputs, "out_features": outputs}
            source = self._flat(synapse)
        kind: LayerKind = "conv" if synapse.kind == "conv" else "linear"
        name = self._append(f"{population.name}_from_{synapse.source}", kind, options, source)
        self.values[f"layers.{name}.weight"] = synapse.weight
        if bias:
            self.values[f"layers.{name}.bias"] = population.bias
        return name

    def _flat(self, synapse: RealSynapse) -> str:
        """The layer that gives a source as a vector."""
        source = synapse.source
        if len(self._shapes[source]) == 1:
            return source
        if source not in self._flattened:
            self._flattened[source] = self._append(f"{source}_flat", "flatten", {}, source)
        return self._flattened[source]

    def _append(self, wanted: str, kind: LayerKind, options: Options, *inputs: str) -> str:
        taken = {*self._nodes, *(layer.name for layer in self.layers)} - ({wanted} if kind == "spike" else set())
        name = wanted
        while name in taken:
            name += "_"
        population = wanted if kind == "spike" else ""
        self.layers.append(Layer(name, kind, options, self._nodes.get(population, name), inputs))
        return name
