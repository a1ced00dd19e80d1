"""The differentiable twin: the reference's arithmetic in torch, with surrogate gradients to the pixels.

Forward it gives the reference's integers, bit for bit: in float32 where the bounds prove that float32 holds
every intermediate value, else in float64, whose 53 bits hold the products of the decays as well. Weights and
biases are kept in state units; a power of two costs no precision.

Backward, rounding, truncation and saturation pass gradients on unchanged, and the spike has the gradient of a
surrogate at the distance to the threshold in real units, so that it means the same as in the float model::

    z = (v / 64 - threshold - 1/2) / scale

The reset is not detached. Two more ways to a gradient: backward through the firing rate (``RATE`` as a rule), and
a static network that stands in for the spiking one (``Twin.proxy``) (Özdenizci & Legenstein, TMLR 2024).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hardware.bounds import prove
from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.network import (
    DECAY_UNITY,
    FRACTION_BITS,
    INPUT,
    STATE_LIMIT,
    IntArray,
    IntegerNetwork,
    Population,
    Synapse,
)
from hardware.surrogates import TRIANGLE, GradientRule, Rate, SpikeRule
from hardware.trace import PopulationTrace, Trace

STATE_UNITS = 2**FRACTION_BITS
Rules = SpikeRule | Mapping[str, SpikeRule]
"""One for all populations, or by name of the spiking population."""


class Twin(nn.Module):
    """An integer network as a torch module without parameters, for white-box attacks on what is deployed.

    Args:
        network: what is deployed.
        surrogate: gradient of the spikes where a call names none. A rule is given z as ``(steps, samples, *shape)``.
    """

    def __init__(self, network: IntegerNetwork, surrogate: Rules = TRIANGLE) -> None:
        super().__init__()
        self.network = network
        self.surrogate = surrogate
        proofs = prove(network)
        self._exact_dtype = torch.float32 if all(row.exact_in_float32 for row in proofs) else torch.float64
        self._saturates = {row.population: row.can_saturate for row in proofs}
        for index, synapse in enumerate(network.synapses):
            weight = torch.from_numpy(synapse.weight).to(self._exact_dtype) * STATE_UNITS
            if synapse.source == INPUT:
                weight, constant = self._split_constant_channels(synapse, weight)
                self.register_buffer(f"constant_{index}", constant)
            self.register_buffer(f"weight_{index}", weight)
        for population in network.populations:
            bias = torch.from_numpy(population.bias).to(self._exact_dtype) * STATE_UNITS
            self.register_buffer(f"bias_{population.name}", bias)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in.

        Raises:
            SpikeguardError: if the module was converted to a type that does not hold its integers.
        """
        dtype = self._bias(self.network.readout).dtype
        if torch.finfo(dtype).eps > torch.finfo(self._exact_dtype).eps:
            raise SpikeguardError(f"{dtype} does not hold this network's integers; keep {self._exact_dtype}")
        return dtype

    def with_surrogate(self, surrogate: Rules) -> Twin:
        """The same twin with other gradients; it shares the buffers."""
        twin = copy.copy(self)
        twin.surrogate = surrogate
        return twin

    def forward(self, images: Tensor, rules: Rules | None = None) -> Tensor:
        """Logits in real units, sum / (T scale).

        Args:
            images: floats in [0, 1], ``(samples, *shape)`` or ``(samples, steps, *shape)``; each pixel is
                rounded to its code.
            rules: gradient of the spikes instead of the twin's own.

        Returns:
            float32 ``(samples, classes)``, with gradients to ``images``.

        Raises:
            SpikeguardError: if the images have another shape or leave [0, 1].
        """
        readouts = self._readouts(self._codes(images), self.surrogate if rules is None else rules).to(torch.float64)
        return (readouts / (self.network.steps * self.network.readout.scale)).to(torch.float32)

    def proxy(self, images: Tensor, clipped: bool) -> Tensor:
        """Logits of the static network that conversion would start from (ensemble members 19 and 20).

        With x the input of one step in real units, ``(sum(w a) + b) / scale``, each spiking population answers
        ``max(x, 0)``, or the rate ``clip(x / threshold, 0, 1)`` that an IF neuron approaches.

        Args:
            images: as for ``forward``; those that change over time are averaged over it.
            clipped: whether neurons answer with the clipped rate.

        Returns:
            float32 ``(samples, classes)`` in real units, with gradients to ``images``.

        Raises:
            RuleViolations: if the network has leaky neurons, whose rate is another function.
            SpikeguardError: as for ``forward``.
        """
        self._require_no_leak()
        codes = self._codes(images)
        changing = codes.ndim == len(self.network.input.shape) + 2
        activity = {INPUT: codes.mean(1)[None] if changing else codes[None]}
        for population in self.network.populations[:-1]:
            drive = self._drive(population, activity)
            threshold = (population.threshold + 0.5) / population.scale
            activity[population.name] = (drive / threshold).clamp(0, 1) if clipped else drive.relu()
        return self._drive(self.network.readout, activity)[0].flatten(1).to(torch.float32)

    def _drive(self, population: Population, activity: Mapping[str, Tensor]) -> Tensor:
        """Input of a single step with bias in real units, ``(1, samples, *shape)``."""
        held, stepped = self._sums(population, activity)
        total = held[None] + self._bias(population)
        drive: Tensor = (total if stepped is None else total + stepped) / (STATE_UNITS * population.scale)
        return drive

    def _require_no_leak(self) -> None:
        leaky = [p for p in self.network.populations if p.spiking and p.is_leaky]
        if leaky:
            problems = [
                Violation(
                    p.name,
                    "neurons of a static proxy do not leak",
                    f"decays {p.current_decay} and {p.voltage_decay}",
                    f"{DECAY_UNITY} and 0",
                    "attack it through surrogate gradients instead",
                )
                for p in leaky
            ]
            raise RuleViolations("proxy of the network", problems)

    @torch.no_grad()
    def trace(self, codes: IntArray) -> Trace:
        """Readouts, and every spike and membrane, as ``run_reference`` records them.

        Args:
            codes: ``(samples, *shape)``, or ``(samples, steps, *shape)``.

        Raises:
            RuleViolations: if the codes are not the network's.
        """
        self.network.input.present(codes, self.network.steps)
        presented = torch.from_numpy(codes.astype(np.int64)).to(self._bias(self.network.readout).device, self.dtype)
        populations: dict[str, PopulationTrace] = {}
        readouts = self._readouts(presented, self.surrogate, populations)
        return Trace(readouts.to(torch.int64).cpu().numpy(), populations)

    def _codes(self, images: Tensor) -> Tensor:
        """Codes ``(samples, [steps,] *shape)`` of images, in the twin's type."""
        spec, steps = self.network.input, self.network.steps
        if tuple(images.shape[1:]) not in (spec.shape, (steps, *spec.shape)):
            expected = ", ".join(map(str, spec.shape))
            raise SpikeguardError(
                f"images have shape {tuple(images.shape)}, the network reads "
                f"(samples, [{steps},] {expected}); reshape or resize them"
            )
        codes: Tensor = _Round.apply(images.to(self.dtype) * spec.max_code)  # type: ignore[no-untyped-call]
        if not bool(((codes >= 0) & (codes <= spec.max_code)).all()):
            raise SpikeguardError("images must lie in [0, 1]; clip them first")
        return codes

    def _readouts(self, codes: Tensor, rules: Rules, recorded: dict[str, PopulationTrace] | None = None) -> Tensor:
        """Integer sums over the steps, ``(samples, classes)``; fills ``recorded`` where given."""
        changing = codes.ndim == len(self.network.input.shape) + 2
        # (steps, samples, *shape), or a single leading step where nothing changes over time.
        activity = {INPUT: codes.transpose(0, 1) if changing else codes[None]}
        for population in self.network.populations:
            if not population.spiking and recorded is None:
                break
            rule = _rule(rules, population)
            neuron = _Neuron(population, self.network.steps, self._saturates[population.name], rule)
            sums = (*self._sums(population, activity), self._bias(population))
            if recorded is not None:
                recorded[population.name] = _record(neuron, *sums)
            if population.spiking:
                spikes: Tensor = _Spikes.apply(neuron, *sums)  # type: ignore[no-untyped-call]
                activity[population.name] = spikes
        readouts: Tensor = self._summed_over_steps(self.network.readout, activity) / STATE_UNITS
        return readouts

    def _sums(self, population: Population, activity: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Sums held at every step ``(samples, *shape)`` and those that change ``(steps, samples, *shape)``."""
        samples = activity[INPUT].shape[1]
        held = self._bias(population).new_zeros(samples, *population.shape)
        stepped: Tensor | None = None
        for index, synapse in self._incoming(population):
            source = activity[synapse.source]
            total = self._propagate(index, synapse, source.flatten(0, 1))
            if synapse.source == INPUT:
                held = held + self.get_buffer(f"constant_{index}")
            if synapse.source == INPUT and len(source) != self.network.steps:
                held = held + total
            else:
                total = total.reshape(-1, samples, *population.shape)
                stepped = total if stepped is None else stepped + total
        return held, stepped

    def _summed_over_steps(self, population: Population, activity: Mapping[str, Tensor]) -> Tensor:
        """Sums over all steps with bias; adding the sources up first gives the same integer."""
        steps = self.network.steps
        total = steps * self._bias(population)[None]
        for index, synapse in self._incoming(population):
            source = activity[synapse.source]
            if synapse.source == INPUT:
                total = total + steps * self.get_buffer(f"constant_{index}")
            repeats = steps if len(source) == 1 else 1
            total = total + self._propagate(index, synapse, source.sum(0) * repeats)
        return total

    def _propagate(self, index: int, synapse: Synapse, activity: Tensor) -> Tensor:
        """Weighted sums ``(rows, *source_shape)`` -> ``(rows, *target_shape)``."""
        weight = self.get_buffer(f"weight_{index}")
        if synapse.kind == "dense":
            return F.linear(activity.flatten(1), weight)
        return exact_convolution(activity, weight, synapse.stride, synapse.padding)

    def _split_constant_channels(self, synapse: Synapse, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the image's own channels, and what the constant channels add at every step."""
        spec = self.network.input
        presented = torch.zeros(1, *spec.presented_shape, dtype=self._exact_dtype)
        for channel, code in enumerate(spec.constant_codes, start=spec.shape[0]):
            presented[:, channel] = code
        channels = weight.reshape(len(weight), spec.presented_shape[0], -1)[:, : spec.shape[0]]
        if synapse.kind == "dense":
            return channels.flatten(1), F.linear(presented.flatten(1), weight)[0]
        constant = exact_convolution(presented, weight, synapse.stride, synapse.padding)[0]
        return channels.reshape(len(weight), -1, *weight.shape[2:]), constant

    def _incoming(self, population: Population) -> list[tuple[int, Synapse]]:
        return [(i, s) for i, s in enumerate(self.network.synapses) if s.target == population.name]

    def _bias(self, population: Population) -> Tensor:
        return self.get_buffer(f"bias_{population.name}")


def _rule(rules: Rules, population: Population) -> SpikeRule:
    if isinstance(rules, Mapping):
        return rules[population.name] if population.spiking else TRIANGLE
    return rules


def exact_convolution(activity: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Cross-correlation that only multiplies and adds.

    Fast algorithms (Winograd, FFT) transform with fractions and are not exact on integers. oneDNN on the CPU
    uses the direct one; NNPACK would not, and on a GPU it is a matrix product, for the choice is not ours.
    """
    if activity.is_cuda:
        return unfolded_convolution(activity, weight, stride, padding)
    with torch.backends.nnpack.flags(enabled=False):
        return F.conv2d(activity, weight, stride=stride, padding=padding)


def unfolded_convolution(activity: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Cross-correlation as one matrix product over unfolded patches."""
    rows, _, height, _ = activity.shape
    columns = F.unfold(activity, weight.shape[2:], stride=stride, padding=padding)
    out_height = (height + 2 * padding - weight.shape[2]) // stride + 1
    sums: Tensor = weight.flatten(1) @ columns
    return sums.reshape(rows, len(weight), out_height, -1)


@dataclass(frozen=True)
class _Neuron:
    """A population's dynamics over T steps; states are tensors ``(samples, *shape)`` in state units.

    Attributes:
        saturates: whether a membrane can be clipped, as far as is proven.
    """

    population: Population
    steps: int
    saturates: bool
    rule: SpikeRule

    @property
    def threshold(self) -> int:
        """State units; a readout has one that no membrane passes."""
        return self.population.threshold * STATE_UNITS if self.population.spiking else STATE_LIMIT

    def simulate(self, held: Tensor, stepped: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Membranes before reset, and 0/1 spikes, both ``(steps, samples, *shape)``."""
        before = held.new_empty(self.steps, *held.shape)
        spikes = torch.empty_like(before)
        current = membrane = torch.zeros_like(held)
        held_with_bias = held + bias
        for t in range(self.steps):
            if self.population.is_leaky:
                current = _decayed(current, self.population.current_decay) + held
                if stepped is not None:
                    current = current + stepped[t]
                membrane = _decayed(membrane, self.population.voltage_decay) + current
                torch.add(membrane, bias, out=before[t])
            else:
                torch.add(membrane, held_with_bias, out=before[t])
                if stepped is not None:
                    before[t].add_(stepped[t])
            if self.saturates:
                before[t].clamp_(-STATE_LIMIT, STATE_LIMIT)
            torch.gt(before[t], self.threshold, out=spikes[t])
            membrane = self.reset(before[t], spikes[t])
        return before, spikes

    def reset(self, before: Tensor, spikes: Tensor) -> Tensor:
        """Membranes after reset."""
        if self.population.reset == "zero":
            return torch.addcmul(before, before, spikes, value=-1)
        return torch.sub(before, spikes, alpha=self.threshold)


def _decayed(state: Tensor, share: int) -> Tensor:
    return (state * (DECAY_UNITY - share) / DECAY_UNITY).trunc()


def _record(neuron: _Neuron, held: Tensor, stepped: Tensor | None, bias: Tensor) -> PopulationTrace:
    before, spikes = neuron.simulate(held, stepped, bias)

    def samples_first(values: Tensor, dtype: torch.dtype) -> NDArray[Any]:
        recorded: NDArray[Any] = values.transpose(0, 1).flatten(2).to(dtype).cpu().numpy()
        return recorded

    return PopulationTrace(
        samples_first(spikes, torch.bool) if neuron.population.spiking else None,
        samples_first(neuron.reset(before, spikes), torch.int32),
    )


class _Round(torch.autograd.Function):
    """Nearest integer; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        return values.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient


class _Spikes(torch.autograd.Function):
    """All steps of a population in one node, so that only the membranes before reset are kept.

    Backward runs in real units. With g the surrogate at z, r the membrane before reset and v after it, c the
    current, and k the share that a step keeps of each::

        ds/dr = g    dr_t/dv_{t-1} = k_v    dr/dc = 1    dc_t/dc_{t-1} = k_c
        dv/dr = (1 - s) - r g   (reset "zero"),    1 - threshold g / scale   (reset "subtract")

    Through the rate, the input of a step gets the gradient of its spikes wherever the neuron spikes at all.
    """

    @staticmethod
    def forward(ctx: Any, neuron: _Neuron, held: Tensor, stepped: Tensor | None, bias: Tensor) -> Tensor:
        before, spikes = neuron.simulate(held, stepped, bias)
        ctx.save_for_backward(before, spikes)
        ctx.neuron = neuron
        return spikes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        before, spikes = ctx.saved_tensors
        neuron: _Neuron = ctx.neuron
        if isinstance(neuron.rule, Rate):
            flow = gradient * spikes.amax(0)
        else:
            flow = _flow_through_time(neuron, neuron.rule, gradient, before, spikes)
        flow.div_(STATE_UNITS * neuron.population.scale)
        _, needs_held, needs_stepped, _ = ctx.needs_input_grad
        return None, flow.sum(0) if needs_held else None, flow if needs_stepped else None, None


def _flow_through_time(neuron: _Neuron, rule: GradientRule, gradient: Tensor, before: Tensor, spikes: Tensor) -> Tensor:
    """Gradient at the input of every step in real units, from that at the spikes."""
    population = neuron.population
    real = before / (STATE_UNITS * population.scale)
    slope = rule.gradient(real - (population.threshold + 0.5) / population.scale)
    if population.reset == "zero":
        through_reset = real.mul_(slope).add_(spikes).neg_().add_(1)
    else:
        through_reset = slope * (-population.threshold / population.scale) + 1
    membrane_share = 1 - population.voltage_decay / DECAY_UNITY
    current_share = 1 - population.current_decay / DECAY_UNITY
    flow = gradient * slope
    for t in range(neuron.steps - 2, -1, -1):
        flow[t].addcmul_(flow[t + 1], through_reset[t], value=membrane_share)
    if current_share:
        for t in range(neuron.steps - 2, -1, -1):
            flow[t].add_(flow[t + 1], alpha=current_share)
    return flow
