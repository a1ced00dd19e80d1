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
- A leaky population's decays are taken in int64. Its current is proven to stay below 2**23 over T steps, so that what
  is left of the membrane plus the current stays within 2**24, and the bias comes last.
- Thresholds ``64 theta`` are exact below 2**23; larger ones are unreachable, before and after rounding.
  Subtracting one from a membrane above it leaves a smaller non-negative integer.
- The readout adds up at most ``T (sum |w| x + |b|)``, checked to be below 2**24 (the single step adds int32).

Only ``logits`` are rounded: they are the exact integer readout divided by ``T * scale`` in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporters.magnitudes import current_violations, float32_violations, largest_sums
from exporters.onnx_graph import STATE_UNIT, NetworkGraph
from hardware.bounds import FLOAT32_INTEGERS, prove
from hardware.errors import RuleViolations, Violation
from hardware.network import DECAY_UNITY, FRACTION_BITS, INPUT, STATE_LIMIT, IntegerNetwork, Population, Synapse


def write_onnx(network: IntegerNetwork, path: Path) -> None:
    """Write the graph unrolled over all steps: ``image`` in, ``readout`` and ``logits`` out.

    ``image`` is uint8 ``(N, *shape)``, ``readout`` int32 and ``logits`` float32 ``(N, classes)``; N is free.

    Raises:
        RuleViolations: listing every population that float32 would not compute exactly.
    """
    summed = set() if network.readout.is_leaky else {network.readout.name}
    _refuse([*onnx_violations(network), *float32_violations(network, summed)])
    graph = _Graph(network)
    *spiking, readout = network.populations
    stepped = [*spiking, *([readout] if readout.is_leaky else [])]
    counted = set() if readout.is_leaky else {s.source for s in network.incoming(readout.name)}
    saturates = {row.population: row.can_saturate for row in prove(network)}
    static = {p.name: graph.static_drive(p) for p in stepped}
    states: dict[str, _State] = {}
    counts: dict[str, str] = {}
    for step in range(network.steps):
        graph.prefix = f"t{step}/"
        spikes: dict[str, str] = {}
        for population in stepped:
            name = population.name
            drive = graph.drive(population, spikes, static[name])
            fired, states[name] = graph.neuron(population, drive, states.get(name, _State()), saturates[name])
            if population.spiking:
                spikes[name] = graph.add("Cast", fired, to=TensorProto.FLOAT, out=f"{name}/spikes")
            if name in counted:
                counts[name] = graph.total([counts[name], spikes[name]]) if name in counts else spikes[name]
    graph.prefix = "readout/"
    if readout.is_leaky:
        graph.readout_from_membrane(states[readout.name].membrane)
    else:
        graph.readout_from_counts(counts)
    graph.save(path, "unrolled")


def write_step_onnx(network: IntegerNetwork, path: Path) -> None:
    """Write the graph of one step, states in and out, for streams and for looking inside.

    Besides ``image``, ``readout`` and ``logits`` as in :func:`write_onnx` it has, for every population p, the
    input ``membrane_p`` and the output ``next_membrane_p``, float32 ``(N, *p.shape)`` in state units, the
    output ``spikes_p``, bool, where p spikes, and the input ``readout_before``, int32 ``(N, classes)``. All
    states start at zero; ``logits`` are right after the last of the T steps. A population whose current outlasts its
    step has ``current_p`` and ``next_current_p`` besides, exact for T steps.

    Raises:
        RuleViolations: listing every population that float32 would not compute exactly.
    """
    _refuse(onnx_violations(network))
    graph = _Graph(network)
    graph.prefix = "step/"
    graph.declare_input("readout_before", TensorProto.INT32, (network.classes,))
    spikes: dict[str, str] = {}
    for population in network.populations:
        name = population.name
        keeps_current = population.current_decay != DECAY_UNITY
        kept = ["membrane", *(["current"] if keeps_current else [])]
        for state in kept:
            graph.declare_input(f"{state}_{name}", TensorProto.FLOAT, population.shape)
            graph.declare_output(f"next_{state}_{name}", TensorProto.FLOAT, population.shape)
        drive = graph.drive(population, spikes, graph.static_drive(population))
        before = _State(f"current_{name}" if keeps_current else None, f"membrane_{name}")
        # It may be run for more steps than any proof is of, or from any state.
        fired, after = graph.neuron(population, drive, before, saturates=True)
        assert after.membrane is not None
        graph.rename(after.membrane, f"next_membrane_{name}")
        if keeps_current:
            assert after.current is not None
            graph.rename(after.current, f"next_current_{name}")
        if population.spiking:
            graph.declare_output(f"spikes_{name}", TensorProto.BOOL, population.shape)
            graph.rename(fired, f"spikes_{name}")
            spikes[name] = graph.add("Cast", f"spikes_{name}", to=TensorProto.FLOAT, out=f"{name}/spikes")
        elif population.is_leaky:
            graph.readout_from_membrane(f"next_membrane_{name}")
        else:
            graph.readout_from_drive(drive)
    graph.save(path, "step")


def onnx_violations(network: IntegerNetwork) -> list[Violation]:
    """What float32 would not compute exactly in every step."""
    problems = current_violations(network)
    for name, largest in largest_sums(network).items():
        if largest >= FLOAT32_INTEGERS:
            rule, limit = "sums of one step are exact in float32", f"below {FLOAT32_INTEGERS:,}"
            problems.append(Violation(name, rule, f"up to {largest:,}", limit, "quantise with a smaller scale"))
    return problems


def _refuse(problems: list[Violation]) -> None:
    if problems:
        raise RuleViolations("ONNX", problems)


@dataclass(frozen=True)
class _State:
    """Names of a population's current and membrane in state units; None where they are zero, or do not exist."""

    current: str | None = None
    membrane: str | None = None


class _Graph(NetworkGraph):
    """Integers held in float32."""

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__(network, TensorProto.FLOAT, TensorProto.FLOAT)

    def static_drive(self, population: Population) -> str | None:
        """What enters a population equally at every step: its bias, and all it reads from the input.

        ``None`` where the bias can ride in a synapse instead (see :meth:`drive`). The bias of one that leaks is no part
        of it, for it does not pass the current.
        """
        incoming = self.network.incoming(population.name)
        from_input = [s for s in incoming if s.source == INPUT]
        rides = self.bias_per_channel(population) and not population.is_leaky  # then Conv and Gemm take it as their own
        if not from_input:
            return None if rides or population.is_leaky else self._bias_constant(population)
        parts = [
            self.synapse(s, self.presented, population if rides and index == 0 else None)
            for index, s in enumerate(from_input)
        ]
        if not (rides or population.is_leaky):
            parts.append(self._bias_constant(population))
        return self.total(parts, out=f"{population.name}/static")

    def drive(self, population: Population, spikes: dict[str, str], static: str | None) -> str:
        """``64 (sum w s + b)`` of this step; a bias not in ``static`` rides in the first synapse, unless it leaks."""
        dynamic = [s for s in self.network.incoming(population.name) if s.source != INPUT]
        rides = static is None and not population.is_leaky
        parts = [
            self.synapse(s, spikes[s.source], population if rides and index == 0 else None)
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

    def neuron(self, population: Population, drive: str, before: _State, saturates: bool) -> tuple[str, _State]:
        """One step of a population: names of its spikes (bool) and of its state after reset."""
        name = population.name
        entering, current = [drive], None
        if population.is_leaky:
            kept = self.decayed(before.current, population.current_decay, f"{name}/current")
            current = self.total([*kept, drive], f"{name}/current")
            entering = [current, *([self._bias_constant(population)] if population.bias.any() else [])]
        kept = self.decayed(before.membrane, population.voltage_decay, f"{name}/membrane")
        clipped = self.total([*kept, *entering], f"{name}/integrated")
        if saturates:
            limit = np.float32(STATE_LIMIT)
            low, high = self.constant("state/lowest", -limit), self.constant("state/highest", limit)
            clipped = self.add("Clip", clipped, low, high, out=f"{name}/membrane")
        if not population.spiking:
            return "", _State(current, clipped)
        mantissa = np.float32(population.threshold << FRACTION_BITS)
        threshold = self.constant(f"threshold/{name}", mantissa)
        fired = self.add("Greater", clipped, threshold, out=f"{name}/fired")
        if population.reset == "zero":
            reset = self.constant("state/zero", np.float32(0))
        else:
            reset = self.add("Sub", clipped, threshold, out=f"{name}/subtracted")
        return fired, _State(current, self.add("Where", fired, reset, clipped, out=f"{name}/reset"))

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

    def readout_from_membrane(self, membrane: str | None) -> None:
        """What a leaky readout ends with."""
        assert membrane is not None
        flat = self.flat(membrane, self.network.readout.shape)
        self.emit_readout(self.add("Cast", flat, to=TensorProto.INT32, out="integer"))

    def readout_from_drive(self, drive: str) -> None:
        """Readout so far: what earlier steps summed, plus this step's drive."""
        unit = self.constant("state/per_weight_unit", np.float32(1 / STATE_UNIT))
        increment = self.add("Mul", drive, unit, out="increment")
        increment = self.flat(increment, self.network.readout.shape)
        increment = self.add("Cast", increment, to=TensorProto.INT32, out="integer")
        self.emit_readout(self.add("Add", "readout_before", increment, out="so_far"))

    def _bias_constant(self, population: Population) -> str:
        values = (STATE_UNIT * population.bias[np.newaxis]).astype(np.float32)
        return self.constant(f"bias/{population.name}", values)
