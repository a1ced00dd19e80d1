"""A NIR graph as populations of our own: nodes in order, each turned into what flows out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from hardware.errors import RuleViolations, Violation
from hardware.formats.nir_graph import NirFile, NirNode
from pipeline.folding import READOUT, RealPopulation, RealSynapse
from pipeline.importing.conventions import Conventions
from pipeline.importing.neurons import NeuronLayer, neurons_of
from pipeline.importing.signals import (
    Activity,
    Current,
    Misfit,
    Signal,
    added,
    as_current,
    convolved,
    multiplied,
    pooled,
    weighted,
)
from pipeline.models.graph import INPUT, RESERVED, Shape

MAX_OUTPUTS = 2**13
ALWAYS_ON = 1.25
"""Times the threshold: what enters a neuron that stands for a bias and spikes at every step."""


@dataclass(frozen=True)
class Lowered:
    """A graph as populations.

    Attributes:
        input_shape: as the first synapses read it.
        populations: in topological order, the readout last; weights are per unit of input.
        nodes: the node of each spiking population, by its name.
    """

    input_shape: Shape
    populations: tuple[RealPopulation, ...]
    nodes: Mapping[str, str]


def lower(file: NirFile, conventions: Conventions) -> Lowered:
    """Turn a graph into populations.

    Raises:
        RuleViolations: for every node that cannot be deployed; nothing is said of what reads such a node.
    """
    lowering = _Lowering(file, conventions)
    for node in file.nodes:
        lowering.read(node)
    if lowering.problems:
        raise RuleViolations("NIR graph", lowering.problems)
    populations = _biases_outlast_their_step(lowering.populations)
    return Lowered(lowering.base, tuple(populations), lowering.nodes)


class _Lowering:
    def __init__(self, file: NirFile, conventions: Conventions) -> None:
        self.conventions = conventions
        self.base: Shape = file.input_shape if len(file.input_shape) == 3 else (int(np.prod(file.input_shape)),)
        self.input_shape = file.input_shape
        self.values: dict[str, Signal | NeuronLayer | None] = {}
        self.populations: list[RealPopulation] = []
        self.nodes: dict[str, str] = {}
        self.problems: list[Violation] = []

    def read(self, node: NirNode) -> None:
        """Turn a node into what flows out of it, or into a problem."""
        self.values[node.name] = None
        read = [self.values[name] for name in node.sources]
        if any(value is None for value in read):
            return
        try:
            if any(isinstance(value, NeuronLayer) for value in read) and node.kind != "Output":
                raise Misfit("a leaky integrator is the readout", node.kind, "the output after it", "let neurons spike")
            self.values[node.name] = self._value(node, read)
        except Misfit as misfit:
            self.problems.append(Violation(f"{node.name} ({node.kind})", *misfit.row))

    def _value(self, node: NirNode, read: list[Signal | NeuronLayer | None]) -> Signal | NeuronLayer | None:
        if node.kind == "Input" and not read:
            return Activity(INPUT, self.base, self.input_shape)
        ends_subgraph = node.kind in ("Input", "Output") and "." in node.name
        if node.kind == "Output" and isinstance(read[0], NeuronLayer):
            if len(read) > 1:
                raise Misfit("a leaky integrator is the readout", "a sum", "it alone", "add up before it")
            if ends_subgraph:
                return read[0]
            self._finish_leaky(read[0])
            return None
        signal = added([value for value in read if isinstance(value, Activity | Current)])
        if ends_subgraph:
            return signal
        if node.kind == "Output":  # currents or spikes, averaged over the steps
            self._finish(as_current(signal), 0.0, 1.0)
            return None
        if node.kind in ("LI", "CubaLI"):
            return neurons_of(node, as_current(signal), self.conventions)
        if node.kind in ("IF", "LIF", "CubaLIF"):
            return self._spikes(node, neurons_of(node, as_current(signal), self.conventions))
        return _OPERATIONS[node.kind](signal, node)

    def _spikes(self, node: NirNode, layer: NeuronLayer) -> Activity:
        name = self._name(node.name)
        current = layer.entering
        base = current.shape if current.is_image else (int(np.prod(current.shape)),)
        subtract = self.conventions.reset == "subtract"
        self.populations.append(
            RealPopulation(
                name, base, current.synapses, current.bias, layer.threshold, layer.beta, subtract, layer.alpha
            )
        )
        self.nodes[name] = node.name
        return Activity(name, base, current.shape)

    def _finish_leaky(self, layer: NeuronLayer) -> None:
        current = layer.entering
        if layer.beta == 1 and not layer.alpha:  # its last membrane is a sum, which a readout has as a mean
            current = current.scaled(np.full(1, float(self.conventions.steps)))
        self._finish(current, layer.alpha, layer.beta)

    def _finish(self, current: Current, alpha: float, beta: float) -> None:
        current = current.written_out()
        size = len(current.bias)
        if size > MAX_OUTPUTS:
            raise Misfit("outputs are classes", current.shape, f"up to {MAX_OUTPUTS:,}", "end with a dense layer")
        self.populations.append(
            RealPopulation(READOUT, (size,), current.synapses, current.bias, None, beta, alpha=alpha)
        )

    def _name(self, node: str) -> str:
        plain = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in node)
        name = plain.strip("_") or "neurons"
        while name in RESERVED or name in self.nodes:
            name += "_"
        return name


def _affine(signal: Signal, node: NirNode) -> Current:
    if not isinstance(signal, Activity):
        remedy = "put neurons between them, or multiply the matrices"
        raise Misfit("neurons stand between weighted nodes", "none", "an IF, LIF or CubaLIF", remedy)
    weight = node.numbers["weight"]
    bias = node.numbers.get("bias", np.zeros(weight.shape[:1]))
    inputs = int(np.prod(signal.shape))
    if weight.ndim != 2 or weight.shape[1] != inputs or bias.size != len(weight):
        raise Misfit("shape fits the node before it", f"{weight.shape} on {signal.shape}", f"(…, {inputs})", "check it")
    return weighted(signal, weight, bias.reshape(-1), (len(weight),))


def _conv(signal: Signal, node: NirNode) -> Current:
    if not isinstance(signal, Activity):
        remedy = "put neurons between them"
        raise Misfit("neurons stand between weighted nodes", "none", "an IF, LIF or CubaLIF", remedy)
    return convolved(signal, node)


def _flatten(signal: Signal, node: NirNode) -> Signal:
    del node  # whatever axes it joins, the order of the values stays
    flat = signal.written_out() if isinstance(signal, Current) else signal
    return replace(flat, shape=(int(np.prod(flat.shape)),))


_OPERATIONS: Mapping[str, Callable[[Signal, NirNode], Signal]] = {
    "Affine": _affine,
    "Linear": _affine,
    "Conv1d": _conv,
    "Conv2d": _conv,
    "SumPool2d": pooled,
    "AvgPool2d": pooled,
    "Flatten": _flatten,
    "Scale": lambda signal, node: multiplied(signal, node.numbers["scale"]),
}


def _biases_outlast_their_step(populations: list[RealPopulation]) -> list[RealPopulation]:
    """The same network, in which a bias of a current that decays comes through synapses, as a chip needs it.

    NIR adds it to what enters the current, where a chip's bias does not get. So it becomes the synapse of a neuron
    that spikes at every step, in a population that is read anyway; or, where the input is, of a constant channel.
    """
    changed = list(populations)
    for index in reversed(range(len(changed))):
        population = changed[index]
        if not population.alpha or not population.bias.any():
            continue
        first = min(population.synapses, key=lambda synapse: synapse.source != INPUT)
        _require_reach(first, population.name)
        if first.source == INPUT:
            continue
        place = next(i for i, one in enumerate(changed) if one.name == first.source)
        for reader, other in enumerate(changed):
            synapses = [
                _with_one_more(synapse, changed[place].shape, other.bias if other is population else None)
                if synapse.source == first.source
                else synapse
                for synapse in other.synapses
            ]
            bias = np.zeros_like(other.bias) if other is population else other.bias
            changed[reader] = replace(other, synapses=tuple(synapses), bias=bias)
        changed[place] = _with_always_on(changed[place])
    return changed


def _with_always_on(population: RealPopulation) -> RealPopulation:
    """One more channel, which spikes at every step."""
    assert population.threshold is not None
    channels, *sides = population.shape
    synapses = tuple(
        replace(one, weight=np.concatenate([one.weight, np.zeros((1, *one.weight.shape[1:]))]))
        for one in population.synapses
    )
    bias = np.append(population.bias, ALWAYS_ON * population.threshold)
    return replace(population, shape=(channels + 1, *sides), synapses=synapses, bias=bias)


def _with_one_more(synapse: RealSynapse, source: Shape, bias: np.ndarray | None) -> RealSynapse:
    """A synapse from a source with one more channel, which brings a bias or nothing."""
    weight = synapse.weight
    if synapse.kind == "dense":
        column = np.zeros((len(weight), int(np.prod(source[1:]))))
        if bias is not None:
            column[:, 0] = bias
        return replace(synapse, weight=np.concatenate([weight, column], axis=1))
    plane = np.zeros((len(weight), 1, *weight.shape[2:]))
    if bias is not None:
        plane[:, 0, synapse.padding, synapse.padding] = bias
    return replace(synapse, weight=np.concatenate([weight, plane], axis=1))


def _require_reach(synapse: RealSynapse, target: str) -> None:
    """Refuse a convolution that has no tap which meets every output, for only such a one can carry a bias."""
    if synapse.kind == "conv" and synapse.weight.shape[2] < 2 * synapse.padding + 1:
        actual = f"{synapse.weight.shape[2]} with padding {synapse.padding}"
        limit, remedy = f"{2 * synapse.padding + 1} or more", "leave out the bias, or pad less"
        rule = "kernel reaches from every output, for its current decays and has a bias"
        raise RuleViolations("NIR graph", [Violation(f"{synapse.source} -> {target}", rule, actual, limit, remedy)])
