"""How an integer network is laid out as a NIR graph: what the writer produces and the strict reader demands.

Each synapse is a ``Conv2d`` or ``Affine`` node (with a ``Flatten`` before it where the source has an image
shape), each spiking population a neuron node of full per-neuron shape that bears the population's name. Edges
into one node add up. The readout has no neuron: its synapses lead to the output; one that leaks is a ``CubaLI``.

Integers travel as float32. NIR fires where v > v_threshold, so the mantissa travels as ``threshold + 1/2``:
no integer membrane lies between the two, and readers that compare with >= agree. Membranes of leaky neurons are no
integers, and theirs travels as it is.

Profile "if" uses ``IF`` for neurons that do not leak; profile "cuba" uses a ``CubaLIF`` whose constants make it one:
tau_syn = dt leaves no memory in the current, and tau_mem = 2**30 dt a decay of 1 - 2**-30, which is 1 in float32.
Leaky neurons are a ``CubaLIF`` in both, whose time constants are Euler's for their 12-bit decays: a share d / 4096
lost per step is tau = 4096 dt / d. Readers decay in floating point and deviate.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue

from hardware.formats.network_file import NetworkRecord, PopulationRecord
from hardware.formats.strict import StrictModel
from hardware.network import DECAY_UNITY, INPUT, Shape

NirProfile = Literal["if", "cuba"]
METADATA_KEY = "spikeguard"
STEP_SECONDS = 1e-4
SLOWEST_DECAY = 2.0**30


class NirCard(StrictModel):
    """What travels as one JSON string in the graph's metadata: all that NIR itself has no field for.

    Attributes:
        dt: seconds per step, to which the time constants of profile "cuba" refer.
        saturation: "harmless" where clipping of the membrane is proven unable to change a spike; "possible"
            where it is not, so that a reader without saturating membranes may differ.
    """

    format: Literal["spikeguard.nir/1"]
    profile: NirProfile
    dt: Annotated[float, Field(gt=0)]
    saturation: Literal["harmless", "possible"]
    semantics: dict[str, JsonValue]
    network: NetworkRecord


@dataclass(frozen=True)
class NirLayout:
    """Names of the nodes of a network, and the edges between them.

    Attributes:
        populations: neuron node by population; a readout that does not leak has none.
        synapses: weight node of each synapse.
        flattens: node that flattens the source of each synapse, None where nothing is to be flattened.
        edges: in the order of the synapses.
    """

    input: str
    output: str
    populations: dict[str, str]
    synapses: tuple[str, ...]
    flattens: tuple[str | None, ...]
    edges: tuple[tuple[str, str], ...]

    @property
    def nodes(self) -> set[str]:
        """Names of all nodes."""
        flattens = {name for name in self.flattens if name is not None}
        return {self.input, self.output, *self.populations.values(), *self.synapses, *flattens}


def presented_shape(record: NetworkRecord) -> Shape:
    """Shape of the graph's input: the image and its constant channels."""
    return record.input.build().presented_shape


def lay_out(record: NetworkRecord) -> NirLayout:
    """Name the nodes of a network; a function of its description alone.

    Raises:
        KeyError: if a synapse names a population that does not exist.
    """
    taken: set[str] = set()

    def name(wanted: str) -> str:
        while wanted in taken:
            wanted += "_"
        taken.add(wanted)
        return wanted

    source_node = name(INPUT)
    neurons = {p.name: name(p.name) for p in record.populations if p.spiking or leaks(p)}
    sink_node = name("output")
    ends = {**neurons, INPUT: source_node}
    shapes = {**{p.name: p.shape for p in record.populations}, INPUT: presented_shape(record)}
    synapses, flattens, edges = [], [], []
    for synapse in record.synapses:
        source, target = ends[synapse.source], neurons.get(synapse.target, sink_node)
        node = name(f"{synapse.source}_to_{synapse.target}")
        flatten = name(f"{node}_flatten") if synapse.kind == "dense" and len(shapes[synapse.source]) > 1 else None
        path = [source, *([flatten] if flatten else []), node, target]
        edges += list(pairwise(path))
        synapses.append(node)
        flattens.append(flatten)
    edges += [(neurons[p.name], sink_node) for p in record.populations if not p.spiking and p.name in neurons]
    return NirLayout(source_node, sink_node, neurons, tuple(synapses), tuple(flattens), tuple(edges))


def leaks(population: PopulationRecord) -> bool:
    """Whether any state decays or current carries over."""
    return (population.current_decay, population.voltage_decay) != (DECAY_UNITY, 0)


def neuron_node(profile: NirProfile, population: PopulationRecord) -> tuple[str, dict[str, NDArray[Any]]]:
    """Type and parameters of a neuron node, each of the population's full shape."""
    if profile == "if" and not leaks(population):
        constants = {"r": 1.0, "v_reset": 0.0, "v_threshold": population.threshold + 0.5}
        return "IF", {key: np.full(population.shape, value, np.float32) for key, value in constants.items()}
    # In steps; one that never ends would be no number.
    synaptic, membrane = (
        DECAY_UNITY / decay if decay else SLOWEST_DECAY
        for decay in (population.current_decay, population.voltage_decay)
    )
    constants = {
        "tau_syn": synaptic * STEP_SECONDS,
        "tau_mem": membrane * STEP_SECONDS,
        "r": membrane,
        "v_leak": 0.0,
        "w_in": synaptic,
    }
    if population.spiking:
        constants |= {"v_reset": 0.0, "v_threshold": population.threshold + (0.0 if leaks(population) else 0.5)}
    return "CubaLIF" if population.spiking else "CubaLI", {
        key: np.full(population.shape, value, np.float64) for key, value in constants.items()
    }
