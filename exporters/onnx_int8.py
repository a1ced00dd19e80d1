"""Writes a network as an ONNX graph of 8-bit products: ConvInteger and MatMulInteger, state in int32.

CPUs with AVX2 and no VNNI multiply unsigned by signed bytes in adjacent pairs, whose sum saturates at 16 bits
(``vpmaddubsw``): 255 * 127 twice does not fit, and ONNX Runtime's answer is then wrong without a word. So every weight
tensor is written as a sum of narrower ones in which no two products can leave 16 bits, whichever weights meet::

    w = 2**e (d0 + 2h d1 + (2h)**2 d2 ...),   -h <= d < h,   h = largest power of two with 2 h x_max < 2**15

h is 64 for pixel codes and 128 for spikes, so that 8-bit weights of spikes need one tensor and those of pixels two.
Wider weights and exponents only need more of them, or a larger factor, and are no reason to refuse a network. Bytes
above the network's largest code are no danger either: the bound for the image is 255.

Everything else is exact because integers are:

- The parts of a weight are less than four times as large as the weight together: its highest digit alone outweighs
  the others. ``sum |w| x + |b| < 2**23`` per step keeps ``64 * 4`` times that within int32, and
  ``T (sum |w| x + |b|) < 2**29`` the readout.
- A population whose membrane is not proven to stay within 24 bits, or that leaks, keeps its state in state units and
  is clipped; any other needs neither the factor 64 nor a Clip.
- A leaky readout answers with its last membrane, any other with the sum over the steps, computed from spike counts.
- A decay multiplies in int64 and divides by 4096, which ONNX does as the reference does: truncating towards zero.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporters.magnitudes import current_violations, largest_sums
from exporters.onnx_graph import STATE_UNIT, NetworkGraph
from hardware.bounds import prove
from hardware.errors import RuleViolations, Violation
from hardware.network import INPUT, STATE_LIMIT, IntegerNetwork, Population, Synapse

MAX_CODE = 255
MAX_STEPS = 255
"""Spike counts are bytes."""
STEP_LIMIT, TOTAL_LIMIT = 2**23, 2**29
INT16 = 2**15


def write_int8_onnx(network: IntegerNetwork, path: Path) -> None:
    """Write the graph unrolled over all steps, with the inputs and outputs of :func:`exporters.onnx.write_onnx`.

    Raises:
        RuleViolations: listing everything that int32 would not hold.
    """
    problems = int8_violations(network)
    if problems:
        raise RuleViolations("ONNX int8", problems)
    graph = _Int8Graph(network)
    *spiking, readout = network.populations
    stepped = [*spiking, *([readout] if readout.is_leaky else [])]
    counted = set() if readout.is_leaky else {s.source for s in network.incoming(readout.name)}
    static = {p.name: graph.static_sums(p) for p in stepped}
    states: dict[str, _State] = {}
    counts: dict[str, str] = {}
    for step in range(network.steps):
        graph.prefix = f"t{step}/"
        spikes: dict[str, str] = {}
        for population in stepped:
            name = population.name
            sums = [graph.synapse(s, spikes[s.source], 1) for s in graph.dynamic(population)]
            states[name] = graph.integrate(population, [*sums, *static[name]], states.get(name))
            if population.spiking:
                fired, states[name] = graph.fire(population, states[name])
                spikes[name] = graph.add("Cast", fired, to=TensorProto.UINT8, out=f"{name}/spikes")
            if name in counted:
                wide = graph.add("Cast", fired, to=TensorProto.INT32, out=f"{name}/counted")
                counts[name] = graph.total([counts[name], wide], f"{name}/count") if name in counts else wide
    graph.prefix = "readout/"
    answer = states[readout.name].membrane if readout.is_leaky else graph.summed(counts)
    graph.emit_readout(graph.flat(answer, readout.shape))
    graph.save(path, "int8")


def int8_violations(network: IntegerNetwork) -> list[Violation]:
    """What the graph would not compute exactly."""
    problems = current_violations(network)
    if network.steps > MAX_STEPS and not network.readout.is_leaky:
        rule = "spikes of all steps are counted in a byte"
        problems.append(Violation("network", rule, str(network.steps), f"{MAX_STEPS} steps", "run fewer steps"))
    for population in network.populations:
        name, largest = population.name, largest_sums(network)[population.name]
        if largest >= STEP_LIMIT:
            rule, limit = "sums of one step, their weights split in parts, fit int32", f"below {STEP_LIMIT:,}"
            problems.append(Violation(name, rule, f"up to {largest:,}", limit, "quantise with a smaller scale"))
        summed = not (population.spiking or population.is_leaky)
        if summed and largest * network.steps >= TOTAL_LIMIT:
            rule, actual = "sums over all steps fit int32", f"up to {largest * network.steps:,}"
            remedy = "quantise with a smaller scale, or run fewer steps"
            problems.append(Violation(name, rule, actual, f"below {TOTAL_LIMIT:,}", remedy))
    return problems


def narrow_parts(weight: NDArray[np.int32], largest_activity: int) -> list[tuple[NDArray[np.int8], int]]:
    """A weight tensor as ``sum factor * part``, no two products of a part and activities adding up beyond 16 bits.

    Args:
        weight: any integers.
        largest_activity: of what it is multiplied with, 1 to 255.

    Returns:
        int8 parts of the weight's shape with their factors, powers of two; one of zeros for weights of zero.
    """
    half = 128
    while 2 * half * largest_activity >= INT16:
        half //= 2
    rest = weight.astype(np.int64)
    combined = int(np.bitwise_or.reduce(rest, axis=None))
    factor = combined & -combined or 1  # the largest power of two that divides all weights
    rest //= factor
    parts: list[tuple[NDArray[np.int8], int]] = []
    while rest.any() or not parts:
        digit = (rest + half) % (2 * half) - half
        parts.append((digit.astype(np.int8), factor))
        rest = (rest - digit) // (2 * half)
        factor *= 2 * half
    return [part for part in parts if part[0].any()] or parts


class _State:
    """Names of a population's current (where it leaks) and of its membrane, after a step."""

    def __init__(self, current: str | None, membrane: str) -> None:
        self.current, self.membrane = current, membrane


class _Int8Graph(NetworkGraph):
    """Codes and spikes in uint8, everything that is summed in int32."""

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__(network, TensorProto.UINT8, TensorProto.INT32)
        self._saturates = {row.population: row.can_saturate for row in prove(network)}

    def unit(self, population: Population) -> int:
        """Of the state per weight unit: 1 where no decay and no clip can tell the difference, or in a sum."""
        if not (population.spiking or population.is_leaky):
            return 1
        return STATE_UNIT if self._saturates[population.name] or population.is_leaky else 1

    def dynamic(self, population: Population) -> list[Synapse]:
        """Synapses whose source changes from step to step."""
        return [s for s in self.network.incoming(population.name) if s.source != INPUT]

    def static_sums(self, population: Population) -> list[str]:
        """What enters a population equally at every step, computed once: at most one value."""
        incoming = self.network.incoming(population.name)
        sums = [self.synapse(s, self.presented, 1) for s in incoming if s.source == INPUT]
        if not population.is_leaky and population.bias.any():
            sums.append(self._bias(population))
        return [self.total(sums, f"{population.name}/static")] if sums else []

    def synapse(self, synapse: Synapse, source: str, largest: int) -> str:
        """``unit * sum w s`` of one synapse, whose source reaches ``largest`` (the image always 255)."""
        unit = self.unit(self.network.by_name[synapse.target])
        index = next(i for i, s in enumerate(self.network.synapses) if s is synapse)
        label = f"{synapse.source}_to_{synapse.target}"
        parts = narrow_parts(synapse.weight, MAX_CODE if synapse.source == INPUT else largest)
        if synapse.kind == "dense":
            source = self.flat(source, self.network.source_shape(synapse), f"{label}/flat")
        results = []
        for number, (part, factor) in enumerate(parts):
            name = f"weight/{index}/{label}" + (f"/part{number}" if len(parts) > 1 else "")
            if synapse.kind == "dense":
                result = self.add("MatMulInteger", source, self.constant(name, part.T), out=label)
            else:
                result = self.add(
                    "ConvInteger",
                    source,
                    self.constant(name, part),
                    out=label,
                    kernel_shape=list(part.shape[2:]),
                    strides=[synapse.stride] * 2,
                    pads=[synapse.padding] * 4,
                )
            if unit * factor > 1:
                scale = self.constant(f"factor/{unit * factor}", np.int32(unit * factor))
                result = self.add("Mul", result, scale, out=f"{label}/scaled")
            results.append(result)
        return self.total(results, f"{label}/sum")

    def integrate(self, population: Population, sums: list[str], before: _State | None) -> _State:
        """One step of a population, up to the comparison."""
        name = population.name
        current = None
        if population.is_leaky:
            kept = self.decayed(before.current if before else None, population.current_decay, f"{name}/current")
            current = self.total([*kept, *sums], f"{name}/current")
            sums = [current, *([self._bias(population)] if population.bias.any() else [])]
        kept = self.decayed(before.membrane if before else None, population.voltage_decay, f"{name}/membrane")
        membrane = self.total([*kept, *sums], f"{name}/integrated")
        if self._saturates[name]:
            limit = np.int32(STATE_LIMIT)
            low, high = self.constant("state/lowest", -limit), self.constant("state/highest", limit)
            membrane = self.add("Clip", membrane, low, high, out=f"{name}/membrane")
        return _State(current, membrane)

    def fire(self, population: Population, state: _State) -> tuple[str, _State]:
        """The name of a population's spikes (bool), and its state after the reset."""
        name, membrane = population.name, state.membrane
        # No membrane passes the limit, so a threshold beyond it may as well lie on it.
        mantissa = np.int32(min(population.threshold * self.unit(population), STATE_LIMIT))
        threshold = self.constant(f"threshold/{name}", mantissa)
        fired = self.add("Greater", membrane, threshold, out=f"{name}/fired")
        if population.reset == "zero":
            reset = self.constant("state/zero", np.int32(0))
        else:
            reset = self.add("Sub", membrane, threshold, out=f"{name}/subtracted")
        return fired, _State(state.current, self.add("Where", fired, reset, membrane, out=f"{name}/reset"))

    def summed(self, counts: dict[str, str]) -> str:
        """Sums over the steps from spike counts, which pass through the (linear) readout only once."""
        steps, readout = self.network.steps, self.network.readout
        small = {
            name: self.add("Cast", count, to=TensorProto.UINT8, out=f"{name}/u8") for name, count in counts.items()
        }
        parts = []
        for synapse in self.network.incoming(readout.name):
            if synapse.source == INPUT:
                once = self.synapse(synapse, self.presented, MAX_CODE)
                parts.append(self.add("Mul", once, self.constant("readout/steps", np.int32(steps)), out="repeated"))
            else:
                parts.append(self.synapse(synapse, small[synapse.source], steps))
        bias = self.constant(f"bias/{readout.name}", (steps * readout.bias[np.newaxis]).astype(np.int32))
        return self.total([*parts, bias], "total")

    def _bias(self, population: Population) -> str:
        bias = population.bias
        if self.bias_per_channel(population):
            bias = bias[:, :1, :1] if bias.ndim == 3 else bias
        values = (self.unit(population) * bias[np.newaxis]).astype(np.int32)
        return self.constant(f"bias/{population.name}", values)
