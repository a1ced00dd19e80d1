"""Writes a network as ONNX graphs of integers held in float32: unrolled over the steps, and as a single step.

State is kept in state units (64 per weight unit), as in the reference: weights and biases are multiplied by
64 when written, and saturation is one Clip. Why every spike, membrane and readout is then exact in float32,
whatever the order in which a runtime adds:

- Input codes, spikes and weights are small integers. A step's drive ``64 (sum w s + b)`` and all its partial
  sums are multiples of 64 of at most ``64 * 2**24``; such numbers need 24 bits and are exact.
  ``sum |w| x + |b| < 2**24`` is checked per population before anything is written.
- A membrane is an integer within +-(2**23 - 1). If membrane plus drive stays within 2**24 it is exact. If
  not, rounding is monotone, so the rounded value is still past 2**23 and Clip gives what it would have given.
- Thresholds ``64 theta`` are exact below 2**23; larger ones are unreachable, before and after rounding.
  Subtracting one from a membrane above it leaves a smaller non-negative integer.
- The readout adds up at most ``T (sum |w| x + |b|)``, checked to be below 2**24 (the single step adds int32).

Only ``logits`` are rounded: they are the exact integer readout divided by ``T * scale`` in float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from exporters.magnitudes import float32_violations, largest_sums
from hardware.bounds import FLOAT32_INTEGERS
from hardware.errors import RuleViolations, Violation
from hardware.files import write_bytes
from hardware.network import FRACTION_BITS, INPUT, STATE_LIMIT, IntegerNetwork, Population, Shape, Synapse

OPSET = 17
IR_VERSION = 8
STATE_UNIT = 1 << FRACTION_BITS
METADATA_KEY = "spikeguard.semantics"
KIND_KEY = "spikeguard.graph"
STEPS_KEY = "spikeguard.steps"
BATCH = "N"


def write_onnx(network: IntegerNetwork, path: Path) -> None:
    """Write the graph unrolled over all steps: ``image`` in, ``readout`` and ``logits`` out.

    ``image`` is uint8 ``(N, *shape)``, ``readout`` int32 and ``logits`` float32 ``(N, classes)``; N is free.

    Raises:
        RuleViolations: listing every population that float32 would not compute exactly.
    """
    _refuse([*onnx_violations(network), *float32_violations(network, {network.readout.name})])
    graph = _Graph(network)
    static = {p.name: graph.static_drive(p) for p in network.populations[:-1]}
    membranes: dict[str, str] = {}
    counts: dict[str, str] = {}
    read = {s.source for s in network.incoming(network.readout.name)}
    for step in range(network.steps):
        graph.prefix = f"t{step}/"
        spikes: dict[str, str] = {}
        for population in network.populations[:-1]:
            name = population.name
            drive = graph.drive(population, spikes, static[name])
            fired, membranes[name] = graph.neuron(population, drive, membranes.get(name))
            spikes[name] = graph.add("Cast", fired, to=TensorProto.FLOAT, out=f"{name}/spikes")
            if name in read:
                counts[name] = graph.total([counts[name], spikes[name]]) if name in counts else spikes[name]
    graph.prefix = "readout/"
    graph.readout_from_counts(counts)
    graph.save(path, "unrolled")


def write_step_onnx(network: IntegerNetwork, path: Path) -> None:
    """Write the graph of one step, states in and out, for streams and for looking inside.

    Besides ``image``, ``readout`` and ``logits`` as in :func:`write_onnx` it has, for every population p, the
    input ``membrane_p`` and the output ``next_membrane_p``, float32 ``(N, *p.shape)`` in state units, the
    output ``spikes_p``, bool, where p spikes, and the input ``readout_before``, int32 ``(N, classes)``. All
    states start at zero; ``logits`` are right after the last of the T steps.

    Raises:
        RuleViolations: listing every population that float32 would not compute exactly.
    """
    _refuse(onnx_violations(network))
    graph = _Graph(network)
    graph.prefix = "step/"
    spikes: dict[str, str] = {}
    for population in network.populations:
        name = population.name
        graph.declare_input(f"membrane_{name}", TensorProto.FLOAT, population.shape)
        graph.declare_output(f"next_membrane_{name}", TensorProto.FLOAT, population.shape)
        drive = graph.drive(population, spikes, graph.static_drive(population))
        fired, after = graph.neuron(population, drive, f"membrane_{name}")
        graph.rename(after, f"next_membrane_{name}")
        if population.spiking:
            graph.declare_output(f"spikes_{name}", TensorProto.BOOL, population.shape)
            graph.rename(fired, f"spikes_{name}")
            spikes[name] = graph.add("Cast", f"spikes_{name}", to=TensorProto.FLOAT, out=f"{name}/spikes")
        else:
            graph.readout_from_drive(drive)
    graph.save(path, "step")


def onnx_violations(network: IntegerNetwork) -> list[Violation]:
    """What float32 would not compute exactly in every step."""
    problems = []
    for population in network.populations:
        if population.is_leaky:
            decays = f"decays {population.current_decay}, {population.voltage_decay}"
            rule = "neuron is IF; a 12-bit decay of a 24-bit state is not exact in float32"
            problems.append(Violation(population.name, rule, decays, "4096, 0", "use IF neurons"))
    for name, largest in largest_sums(network).items():
        if largest >= FLOAT32_INTEGERS:
            rule, limit = "sums of one step are exact in float32", f"below {FLOAT32_INTEGERS:,}"
            problems.append(Violation(name, rule, f"up to {largest:,}", limit, "quantise with a smaller scale"))
    return problems


def _refuse(problems: list[Violation]) -> None:
    if problems:
        raise RuleViolations("ONNX", problems)


class _Graph:
    """Collects nodes and initialisers; value names carry the step and the population they belong to."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.prefix = "input/"
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._used: set[str] = set()
        self.declare_input("image", TensorProto.UINT8, network.input.shape)
        self.declare_output("readout", TensorProto.INT32, (network.classes,))
        self.declare_output("logits", TensorProto.FLOAT, (network.classes,))
        self._presented = self._present()

    def declare_input(self, name: str, kind: int, shape: Shape) -> None:
        """Add a graph input ``(N, *shape)``."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, [BATCH, *shape]))

    def declare_output(self, name: str, kind: int, shape: Shape) -> None:
        """Add a graph output ``(N, *shape)``; a node must produce a value of that name."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, [BATCH, *shape]))

    def constant(self, name: str, values: NDArray[Any] | np.float32) -> str:
        """An initialiser; the same name is stored once."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def add(self, operator: str, *inputs: str, out: str, **attributes: Any) -> str:
        """Add a node with one output, named after the step and ``out``; returns that name."""
        value = f"{self.prefix}{out}"
        suffix = 1
        while value in self._used:
            suffix += 1
            value = f"{self.prefix}{out}_{suffix}"
        self._used.add(value)
        self._nodes.append(helper.make_node(operator, list(inputs), [value], name=value, **attributes))
        return value

    def rename(self, value: str, output: str) -> None:
        """Give a value the name of a graph output, wherever it is used."""
        for node in self._nodes:
            node.input[:] = [output if name == value else name for name in node.input]
            node.output[:] = [output if name == value else name for name in node.output]

    def total(self, values: list[str], out: str = "sum") -> str:
        """The values added up, one Add at a time."""
        result = values[0]
        for value in values[1:]:
            result = self.add("Add", result, value, out=out)
        return result

    def static_drive(self, population: Population) -> str | None:
        """What enters a population equally at every step: its bias, and all it reads from the input.

        ``None`` where the bias can ride in a synapse instead (see :meth:`drive`).
        """
        incoming = self.network.incoming(population.name)
        from_input = [s for s in incoming if s.source == INPUT]
        rides = self._bias_rides_along(population)
        if not from_input:
            return None if rides else self._bias_constant(population)
        parts = [
            self.synapse(s, self._presented, population if rides and index == 0 else None)
            for index, s in enumerate(from_input)
        ]
        if not rides:
            parts.append(self._bias_constant(population))
        return self.total(parts, out=f"{population.name}/static")

    def drive(self, population: Population, spikes: dict[str, str], static: str | None) -> str:
        """``64 (sum w s + b)`` of this step; a bias not in ``static`` rides in the first synapse."""
        dynamic = [s for s in self.network.incoming(population.name) if s.source != INPUT]
        parts = [
            self.synapse(s, spikes[s.source], population if static is None and index == 0 else None)
            for index, s in enumerate(dynamic)
        ]
        return self.total([*parts, *([static] if static else [])], out=f"{population.name}/drive")

    def synapse(self, synapse: Synapse, source: str, bias_of: Population | None, unit: int = STATE_UNIT) -> str:
        """``unit * (sum w s [+ b])`` of one synapse."""
        index = next(i for i, s in enumerate(self.network.synapses) if s is synapse)
        label = f"{synapse.source}_to_{synapse.target}"
        weight = self.constant(f"weight/{index}/{label}", (unit * synapse.weight.astype(np.int64)).astype(np.float32))
        operands = [weight]
        if bias_of is not None:
            per_row = bias_of.bias.reshape(bias_of.shape[0], -1)[:, 0]
            operands.append(self.constant(f"bias/{bias_of.name}", (unit * per_row).astype(np.float32)))
        if synapse.kind == "dense":
            if len(self.network.source_shape(synapse)) > 1:
                source = self.add("Flatten", source, out=f"{label}/flat", axis=1)
            return self.add("Gemm", source, *operands, out=label, transB=1)
        return self.add(
            "Conv",
            source,
            *operands,
            out=label,
            kernel_shape=list(synapse.weight.shape[2:]),
            strides=[synapse.stride] * 2,
            pads=[synapse.padding] * 4,
        )

    def neuron(self, population: Population, drive: str, before: str | None) -> tuple[str, str]:
        """One step of a population: names of its spikes (bool) and of its membrane after reset."""
        name = population.name
        limit = np.float32(STATE_LIMIT)
        total = drive if before is None else self.add("Add", before, drive, out=f"{name}/integrated")
        low, high = self.constant("state/lowest", -limit), self.constant("state/highest", limit)
        clipped = self.add("Clip", total, low, high, out=f"{name}/membrane")
        if not population.spiking:
            return "", clipped
        mantissa = np.float32(population.threshold << FRACTION_BITS)
        threshold = self.constant(f"threshold/{name}", mantissa)
        fired = self.add("Greater", clipped, threshold, out=f"{name}/fired")
        if population.reset == "zero":
            reset = self.constant("state/zero", np.float32(0))
        else:
            reset = self.add("Sub", clipped, threshold, out=f"{name}/subtracted")
        return fired, self.add("Where", fired, reset, clipped, out=f"{name}/reset")

    def readout_from_counts(self, counts: dict[str, str]) -> None:
        """Readouts from spike counts: the sum over steps passes through the (linear) readout only once."""
        steps, readout = self.network.steps, self.network.readout
        parts = []
        for synapse in self.network.incoming(readout.name):
            from_input = synapse.source == INPUT
            part = self.synapse(synapse, self._presented if from_input else counts[synapse.source], None, unit=1)
            if from_input:
                part = self.add("Mul", part, self.constant("readout/steps", np.float32(steps)), out="repeated")
            parts.append(part)
        bias = (steps * readout.bias[np.newaxis]).astype(np.float32)
        total = self.total([*parts, self.constant(f"bias/{readout.name}", bias)], out="total")
        self._emit_readout(self.add("Cast", total, to=TensorProto.INT32, out="integer"))

    def readout_from_drive(self, drive: str) -> None:
        """Readout so far: what earlier steps summed, plus this step's drive."""
        self.declare_input("readout_before", TensorProto.INT32, (self.network.classes,))
        unit = self.constant("state/per_weight_unit", np.float32(1 / STATE_UNIT))
        increment = self.add("Mul", drive, unit, out="increment")
        increment = self.add("Cast", self._flat(increment), to=TensorProto.INT32, out="integer")
        self._emit_readout(self.add("Add", "readout_before", increment, out="so_far"), flatten=False)

    def save(self, path: Path, kind: str) -> None:
        """Check the model and write it atomically."""
        graph = helper.make_graph(
            self._nodes, f"spikeguard_{kind}", self._inputs, self._outputs, list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="spikeguard",
        )
        card = json.dumps(self.network.semantics_card(), sort_keys=True)
        properties = {METADATA_KEY: card, KIND_KEY: kind, STEPS_KEY: str(self.network.steps)}
        helper.set_model_props(model, properties)
        onnx.checker.check_model(model, full_check=True)
        write_bytes(path, model.SerializeToString(deterministic=True))

    def _present(self) -> str:
        """The image as float32, with the constant channels appended."""
        spec = self.network.input
        image = self.add("Cast", "image", to=TensorProto.FLOAT, out="codes")
        if not spec.constant_codes:
            return image
        codes = np.array(spec.constant_codes, np.float32).reshape(1, -1, *(1,) * (len(spec.shape) - 1))
        planes = np.broadcast_to(codes, (1, len(spec.constant_codes), *spec.shape[1:]))
        batch = self.add("Shape", "image", out="batch", start=0, end=1)
        ones = self.constant("input/ones", np.ones(len(spec.shape), np.int64))
        shape = self.add("Concat", batch, ones, out="shape", axis=0)
        expanded = self.add("Expand", self.constant("input/constant_codes", planes), shape, out="constant")
        return self.add("Concat", image, expanded, out="presented", axis=1)

    def _bias_rides_along(self, population: Population) -> bool:
        """Whether the bias is one value per channel (or neuron), which Conv and Gemm take as their own."""
        return not np.ptp(population.bias.reshape(population.shape[0], -1), axis=1).any()

    def _bias_constant(self, population: Population) -> str:
        values = (STATE_UNIT * population.bias[np.newaxis]).astype(np.float32)
        return self.constant(f"bias/{population.name}", values)

    def _flat(self, value: str) -> str:
        return self.add("Flatten", value, out="flat", axis=1) if len(self.network.readout.shape) > 1 else value

    def _emit_readout(self, integers: str, *, flatten: bool = True) -> None:
        self.rename(self._flat(integers) if flatten else integers, "readout")
        real = self.add("Cast", "readout", to=TensorProto.FLOAT, out="real")
        divisor = np.float32(self.network.steps * self.network.readout.scale)
        logits = self.add("Div", real, self.constant("readout/steps_times_scale", divisor), out="logits")
        self.rename(logits, "logits")
