"""Strict reader of the NIR files this project writes: back to the very integer network, or a clear refusal.

NIR has no field for steps, input coding, scales or bit-widths; they are read from the metadata, and nodes and
metadata must tell the same story in every point where both speak.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nir
import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.formats.hdf5_guard import REMEDY, require_plain_hdf5
from hardware.formats.network_file import PopulationRecord, SynapseRecord
from hardware.formats.nir_layout import (
    METADATA_KEY,
    NirCard,
    NirLayout,
    lay_out,
    neuron_node,
    presented_shape,
)
from hardware.formats.strict import parse_strict
from hardware.network import INPUT, IntegerNetwork, Shape

MAX_NEURONS = 2**26
CONV_FIELDS = {"dilation": (1, 1), "groups": (1,)}


def read_nir(path: Path) -> IntegerNetwork:
    """The integer network a NIR file holds; both profiles are read.

    Raises:
        SpikeguardError: if it is no such file; ``RuleViolations`` names every node, edge or field at fault.
    """
    graph, card = load_graph(path)
    record = card.network
    problems: list[Violation] = []
    try:
        layout = lay_out(record)
    except KeyError as error:
        raise SpikeguardError(f"{path}: a synapse names the unknown population {error}; {REMEDY}") from error
    problems += _graph_violations(graph, layout)
    if problems:
        raise RuleViolations(str(path), problems)
    for population in record.populations:
        if population.name in layout.populations:
            problems += _neuron_violations(graph.nodes[layout.populations[population.name]], population, card)
    problems += _end_violations(graph, layout, card)
    shapes = {**{p.name: p.shape for p in record.populations}, INPUT: presented_shape(record)}
    for synapse, node, flatten in zip(record.synapses, layout.synapses, layout.flattens, strict=True):
        source = shapes[synapse.source]
        problems += _weight_violations(graph.nodes[node], node, synapse, source)
        if flatten is not None:
            problems += _flatten_violations(graph.nodes[flatten], flatten, source)
    if problems:
        raise RuleViolations(str(path), problems)
    weights = [_integers(graph.nodes[node].weight) for node in layout.synapses]
    biases = [_population_bias(graph, layout, card, population) for population in record.populations]
    network = record.build(biases, weights)
    if json.loads(json.dumps(network.semantics_card())) != card.semantics:
        row = Violation("metadata", "semantics card is the network's", "another", "this network's", REMEDY)
        raise RuleViolations(str(path), [row])
    return network


def load_graph(path: Path) -> tuple[Any, NirCard]:
    """The ``nir.NIRGraph`` of a file and its metadata, the file having been looked through first.

    Raises:
        SpikeguardError: if the file is unsafe, damaged, or not written by this project.
    """
    require_plain_hdf5(path)
    try:
        graph = nir.read(str(path), type_check=False)  # every shape is checked here, with better words
    except Exception as error:  # the reader raises whatever its asserts, dictionaries and arrays raise
        raise SpikeguardError(f"{path} is not a well-formed NIR graph ({error!r}); {REMEDY}") from error
    metadata = graph.metadata.get(METADATA_KEY) if isinstance(graph, nir.NIRGraph) else None
    if not isinstance(metadata, str):
        raise SpikeguardError(
            f"{path} has no '{METADATA_KEY}' metadata, so its steps and scales are unknown; "
            "export it with this tool, or convert it as a float network"
        )
    return graph, parse_strict(NirCard, metadata, f"{path}: metadata")


def _graph_violations(graph: Any, layout: NirLayout) -> list[Violation]:
    """Nodes and edges must be exactly those the metadata describes; that leaves no room for cycles."""
    problems = []
    for name in sorted(set(graph.nodes) - layout.nodes):
        kind = type(graph.nodes[name]).__name__
        problems.append(Violation(name, "node is in the metadata", f"unknown {kind}", "absent", REMEDY))
    for name in sorted(layout.nodes - set(graph.nodes)):
        problems.append(Violation(name, "node of the metadata exists", "missing", "present", REMEDY))
    edges = [(str(a), str(b)) for a, b in graph.edges]
    for a, b in sorted(set(edges) - set(layout.edges)):
        problems.append(Violation(f"{a}->{b}", "edge is in the metadata", "unknown", "absent", REMEDY))
    for a, b in sorted(set(layout.edges) - set(edges)):
        problems.append(Violation(f"{a}->{b}", "edge of the metadata exists", "missing", "present", REMEDY))
    if len(edges) != len(set(edges)):
        problems.append(Violation("edges", "edge is listed once", "listed again", "once", REMEDY))
    return problems


def _neuron_violations(node: Any, population: PopulationRecord, card: NirCard) -> list[Violation]:
    name = population.name
    wanted, fields = neuron_node(card.profile, population)
    if type(node).__name__ != wanted:
        return [Violation(name, "neuron is its profile's", type(node).__name__, wanted, REMEDY)]
    shape = np.asarray(node.r).shape
    if shape != population.shape:
        return [Violation(name, "neurons have the population's shape", str(shape), str(population.shape), REMEDY)]
    problems = []
    for key, expected in fields.items():
        actual = np.asarray(getattr(node, key))
        if not np.array_equal(actual, expected):
            problems.append(Violation(name, f"{key} is the profile's", _summary(actual), _summary(expected), REMEDY))
    return problems


def _end_violations(graph: Any, layout: NirLayout, card: NirCard) -> list[Violation]:
    problems = []
    ends = {
        layout.input: (nir.Input, "input_type", "input", presented_shape(card.network)),
        layout.output: (nir.Output, "output_type", "output", card.network.populations[-1].shape),
    }
    for name, (kind, attribute, key, expected) in ends.items():
        node = graph.nodes[name]
        if not isinstance(node, kind):
            problems.append(Violation(name, "node type", type(node).__name__, kind.__name__, REMEDY))
            continue
        shape = tuple(np.asarray(getattr(node, attribute)[key]).tolist())
        if shape != expected:
            problems.append(Violation(name, "shape is the metadata's", str(shape), str(expected), REMEDY))
    for population in card.network.populations:
        if int(np.prod(population.shape, dtype=object)) > MAX_NEURONS:
            size = str(population.shape)
            problems.append(Violation(population.name, "population size", size, f"{MAX_NEURONS:,}", REMEDY))
    return problems


def _weight_violations(node: Any, name: str, synapse: SynapseRecord, source: Shape) -> list[Violation]:
    wanted = {"conv": nir.Conv2d, "dense": nir.Affine}[synapse.kind]
    if type(node) is not wanted:
        return [Violation(name, "node type", type(node).__name__, wanted.__name__, REMEDY)]
    problems = []
    for key in ("weight", "bias"):
        values = np.asarray(getattr(node, key))
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            problems.append(Violation(name, f"{key} is finite", _summary(values), "finite floats", REMEDY))
        elif not (values == np.rint(values)).all() or np.abs(values).max(initial=0) >= 2**31:
            problems.append(Violation(name, f"{key} holds integers", _summary(values), "32-bit integers", REMEDY))
    axes = {"conv": 4, "dense": 2}[synapse.kind]
    if np.ndim(node.weight) != axes or np.shape(node.bias) != np.shape(node.weight)[:1]:
        shapes = f"{np.shape(node.weight)}, bias {np.shape(node.bias)}"
        problems.append(Violation(name, "weight and bias fit", shapes, f"{axes} axes, one bias per row", REMEDY))
    if synapse.kind == "conv":
        fields = {
            **CONV_FIELDS,
            "stride": (synapse.stride,) * 2,
            "padding": (synapse.padding,) * 2,
            "input_shape": source[1:],
        }
        for key, expected in fields.items():
            actual = np.atleast_1d(np.asarray(getattr(node, key)))
            if not np.array_equal(actual, expected):
                problems.append(Violation(name, f"{key} is the metadata's", str(actual), str(expected), REMEDY))
    return problems


def _flatten_violations(node: Any, name: str, source: Shape) -> list[Violation]:
    if not isinstance(node, nir.Flatten):
        return [Violation(name, "node type", type(node).__name__, "Flatten", REMEDY)]
    found = (int(node.start_dim), int(node.end_dim), *np.asarray(node.input_type["input"]).tolist())
    expected = (0, -1, *source)
    if found != expected:
        return [Violation(name, "flattens its whole source", str(found), str(expected), REMEDY)]
    return []


def _population_bias(graph: Any, layout: NirLayout, card: NirCard, population: PopulationRecord) -> NDArray[np.int64]:
    """The biases of all nodes that lead into a population add up, per channel or per neuron."""
    total = np.zeros(population.shape, np.int64)
    for synapse, node in zip(card.network.synapses, layout.synapses, strict=True):
        bias = _integers(graph.nodes[node].bias)
        if synapse.target == population.name and len(bias) == population.shape[0]:
            total += bias.reshape(-1, *(1,) * (len(population.shape) - 1))
    return total


def _integers(values: Any) -> NDArray[np.int64]:
    return np.asarray(values).astype(np.int64)


def _summary(values: NDArray[Any]) -> str:
    """The range of an array, as short as a message needs."""
    if values.dtype.kind not in "fiu" or not values.size:
        return f"{values.dtype} {values.shape}"
    return f"{values.dtype} {values.min()}..{values.max()} of shape {values.shape}"
