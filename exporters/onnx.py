"""Writes a network as ONNX graphs of integers held in float32: unrolled over the steps, and as a single step.

State is kept in state units (64 per weight unit), as in the reference: weights and biases are multiplied by
64 when written. Saturation is one Clip: in the unrolled graph where a membrane is not proven to stay within 24 bits
over its T steps, in the single step always. Why every spike, membrane and readout is then exact in float32,
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

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporters.magnitudes import float32_violations, largest_sums
from exporters.onnx_graph import STATE_UNIT, NetworkGraph
from hardware.bounds import FLOAT32_INTEGERS, prove
from hardware.errors import RuleViolations, Violation
from hardware.network import FRACTION_BITS, INPUT, STATE_LIMIT, IntegerNetwork, Population, Synapse


def write_onnx(network: IntegerNetwork, path: Path) -> None:
    """Write the graph unrolled over all steps: ``image`` in, ``readout`` and ``logits`` out.

    ``image`` is uint8 ``(N, *shape)``, ``readout`` int32 and ``logits`` float32 ``(N, classes)``; N is free.

    Raises:
        RuleViolations: listing every population that float32 would not compute exactly.
    """
    _refuse([*onnx_violations(network), *float32_violations(network, {network.readout.name})])
    graph = _Graph(network)
    saturates = {row.population: row.can_saturate for row in prove(network)}
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
            fired, membranes[name] = graph.neuron(population, drive, membranes.get(name), saturates[name])
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
        # It may be run for more steps than any proof is of, or from any state.
        fired, after = graph.neuron(population, drive, f"membrane_{name}", saturates=True)
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
            problems.append(Violation(population.name, rule, decays, "4096, 0", "use IF neurons, or the int8 graph"))
    for name, largest in largest_sums(network).items():
        if largest >= FLOAT32_INTEGERS:
            rule, limit = "sums of one step are exact in float32", f"below {FLOAT32_INTEGERS:,}"
            problems.append(Violation(name, rule, f"up to {largest:,}", limit, "quantise with a smaller scale"))
    return problems


def _refuse(problems: list[Violation]) -> None:
    if problems:
        raise RuleViolations("ONNX", problems)


class _Graph(NetworkGraph):
    """Integers held in float32."""

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__(network, TensorProto.FLOAT)

    def static_drive(self, population: Population) -> str | None:
        """What enters a population equally at every step: its bias, and all it reads from the input.

        ``None`` where the bias can ride in a synapse instead (see :meth:`drive`).
        """
        incoming = self.network.incoming(population.name)
        from_input = [s for s in incoming if s.source == INPUT]
        rides = self.bias_per_channel(population)  # then Conv and Gemm take it as their own
        if not from_input:
            return None if rides else self._bias_constant(population)
        parts = [
            self.synapse(s, self.presented, population if rides and index == 0 else None)
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
            flat = self.flat(source, self.network.source_shape(synapse), f"{label}/flat")
            return self.add("Gemm", flat, *operands, out=label, transB=1)
        return self.add(
            "Conv",
            source,
            *operands,
            out=label,
            kernel_shape=list(synapse.weight.shape[2:]),
            strides=[synapse.stride] * 2,
            pads=[synapse.padding] * 4,
        )

    def neuron(self, population: Population, drive: str, before: str | None, saturates: bool) -> tuple[str, str]:
        """One step of a population: names of its spikes (bool) and of its membrane after reset."""
        name = population.name
        clipped = drive if before is None else self.add("Add", before, drive, out=f"{name}/integrated")
        if saturates:
            limit = np.float32(STATE_LIMIT)
            low, high = self.constant("state/lowest", -limit), self.constant("state/highest", limit)
            clipped = self.add("Clip", clipped, low, high, out=f"{name}/membrane")
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
            part = self.synapse(synapse, self.presented if from_input else counts[synapse.source], None, unit=1)
            if from_input:
                part = self.add("Mul", part, self.constant("readout/steps", np.float32(steps)), out="repeated")
            parts.append(part)
        bias = (steps * readout.bias[np.newaxis]).astype(np.float32)
        total = self.total([*parts, self.constant(f"bias/{readout.name}", bias)], out="total")
        integers = self.add("Cast", total, to=TensorProto.INT32, out="integer")
        self.emit_readout(self.flat(integers, readout.shape))

    def readout_from_drive(self, drive: str) -> None:
        """Readout so far: what earlier steps summed, plus this step's drive."""
        self.declare_input("readout_before", TensorProto.INT32, (self.network.classes,))
        unit = self.constant("state/per_weight_unit", np.float32(1 / STATE_UNIT))
        increment = self.add("Mul", drive, unit, out="increment")
        increment = self.flat(increment, self.network.readout.shape)
        increment = self.add("Cast", increment, to=TensorProto.INT32, out="integer")
        self.emit_readout(self.add("Add", "readout_before", increment, out="so_far"))

    def _bias_constant(self, population: Population) -> str:
        values = (STATE_UNIT * population.bias[np.newaxis]).astype(np.float32)
        return self.constant(f"bias/{population.name}", values)
