"""The differentiable twin: the reference's arithmetic in torch, with surrogate gradients to the pixels.

Forward it gives the reference's integers, bit for bit: sums and states of a population are float32 where the bounds
prove that float32 holds every intermediate value, else float64, whose 53 bits hold the products of the decays as
well. Weights and biases are kept in state units; a power of two costs no precision.

Backward, rounding, truncation and saturation pass gradients on unchanged, and the spike has the gradient of a
surrogate at the distance to the threshold in real units, so that it means the same as in the float model::

    z = (v / 64 - threshold - 1/2) / scale

The reset is not detached. Two more ways to a gradient: backward through the firing rate (``RATE`` as a rule), and
a static network that stands in for the spiking one (``Twin.proxy``) (Özdenizci & Legenstein, TMLR 2024).

Images go through in groups so small that the activity of a layer stays in the cache; a group runs all steps of a
population before the next one. What is the same at every step is computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hardware.bounds import FLOAT32_INTEGERS, prove, synaptic_magnitudes
from hardware.errors import SpikeguardError
from hardware.network import INPUT, IntArray, IntegerNetwork, Population, Synapse, readout_unit
from hardware.surrogates import TRIANGLE, SpikeRule
from hardware.trace import PopulationTrace, Trace
from hardware.twin_convolutions import exact_convolution, phase_weights
from hardware.twin_neurons import STATE_UNITS, HeldAndStepped, Neurons, is_compiled, last_membrane, membranes, spikes

# A group of images, at all steps: no more activity in a layer than the cache holds, but rows enough that the calls
# and the reading of weights do not outweigh the work (measured).
GROUP_BYTES = 2**23
GROUP_ROWS = 128
Rules = SpikeRule | Mapping[str, SpikeRule]
"""One for all populations, or by name of the spiking population."""


class Twin(nn.Module):
    """An integer network as a torch module without parameters, for white-box attacks on what is deployed.

    Activity has shape ``(steps or 1, samples, *shape)`` and lies in memory with the channels last.

    Args:
        network: what is deployed.
        surrogate: gradient of the spikes where a call names none. A rule is given z as ``(steps, samples, *shape)``,
            once per population and backward pass.
    """

    def __init__(self, network: IntegerNetwork, surrogate: Rules = TRIANGLE) -> None:
        super().__init__()
        self.network = network
        self.surrogate = surrogate
        self._needed: dict[str, torch.dtype] = {}
        sums, states = _exact_types(network)
        for population in network.populations:
            name = population.name
            bias = torch.from_numpy(population.bias) * STATE_UNITS
            constant = torch.zeros_like(bias)
            for index, synapse in self._incoming(population):
                weight = torch.from_numpy(synapse.weight).to(sums[name]) * STATE_UNITS
                if synapse.source == INPUT:
                    weight, added = self._split_constant_channels(synapse, weight)
                    constant = constant + added.to(torch.int64)
                if synapse.kind == "dense":
                    weight = _columns_as_in_memory(weight, self._source_shape(synapse))
                else:
                    weight = weight.contiguous(memory_format=torch.channels_last)
                    self.register_buffer(f"phases_{index}", phase_weights(weight, synapse.stride))
                self._keep(f"weight_{index}", weight, sums[name])
            self._keep(f"bias_{name}", _channels_last(bias), states[name])
            self._keep(f"constant_{name}", _channels_last(constant), states[name])
        self._largest_layer = max(population.size for population in network.populations)

    def _keep(self, name: str, values: Tensor, dtype: torch.dtype) -> None:
        self.register_buffer(name, values.to(dtype))
        self._needed[name] = dtype

    @property
    def dtype(self) -> torch.dtype:
        """The widest type it computes in.

        Raises:
            SpikeguardError: if the module was converted to a type that does not hold its integers.
        """
        types = [(self.get_buffer(name).dtype, needed) for name, needed in self._needed.items()]
        for dtype, needed in types:
            if torch.finfo(dtype).eps > torch.finfo(needed).eps:
                raise SpikeguardError(f"{dtype} does not hold this network's integers; keep {needed}")
        return min((dtype for dtype, _ in types), key=lambda dtype: torch.finfo(dtype).eps)

    def with_surrogate(self, surrogate: Rules) -> Twin:
        """The same twin with other gradients; it shares the buffers."""
        twin = copy.copy(self)
        twin.surrogate = surrogate
        return twin

    def forward(self, images: Tensor, rules: Rules | None = None) -> Tensor:
        """Logits in real units, see :func:`~hardware.network.real_readouts`.

        Args:
            images: floats in [0, 1], ``(samples, *shape)`` or ``(samples, steps, *shape)``; each pixel is
                rounded to its code.
            rules: gradient of the spikes instead of the twin's own.

        Returns:
            float32 ``(samples, classes)``, with gradients to ``images``.

        Raises:
            SpikeguardError: if the images have another shape or leave [0, 1].
        """
        by_name = self._rules_by_name(self.surrogate if rules is None else rules)
        codes = self._codes(images)
        readouts, first = [], 0
        for part in codes.split(self._group(codes, by_name)):
            readouts.append(self._readouts(part, self._neurons(by_name, first, len(codes))))
            first += len(part)
        scaled = torch.cat(readouts).to(torch.float64) / readout_unit(self.network.readout, self.network.steps)
        return scaled.to(torch.float32)

    def proxy(self, images: Tensor, clipped: bool) -> Tensor:
        """Logits of the static network that conversion would start from (ensemble members 19 and 20).

        With x the input of one step in real units, ``(sum(w a) + b) / scale``, each spiking population answers
        ``max(x, 0)``, or the rate ``clip(x / threshold, 0, 1)`` that an IF neuron approaches. Leaks count as none.

        Args:
            images: as for ``forward``; those that change over time are averaged over it.
            clipped: whether neurons answer with the clipped rate.

        Returns:
            float32 ``(samples, classes)`` in real units, with gradients to ``images``.

        Raises:
            SpikeguardError: as for ``forward``.
        """
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
        held, _ = self._sums(population, activity)
        assert held is not None
        total = held + self._constant(population) + self._bias(population)
        drive: Tensor = total[None] / (STATE_UNITS * population.scale)
        return drive

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
        neurons = self._neurons(self._rules_by_name(self.surrogate), 0, len(codes))
        activity = self._activity(presented, neurons)
        recorded = {
            population.name: _record(neurons[population.name], self._sums(population, activity))
            for population in self.network.populations
        }
        readouts = self._answers(activity, neurons)
        return Trace(readouts.to(torch.int64).cpu().numpy(), recorded)

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

    def _group(self, codes: Tensor, rules: Mapping[str, SpikeRule]) -> int:
        """Samples that go through together: all on other devices, and for rules that are to see all."""
        to_see_all = torch.is_grad_enabled() and not all(is_compiled(rule) for rule in rules.values())
        if codes.device.type != "cpu" or to_see_all:
            return max(1, len(codes))
        bytes_per_row = self._largest_layer * codes.element_size()
        return max(1, max(GROUP_ROWS, GROUP_BYTES // bytes_per_row) // self.network.steps)

    def _rules_by_name(self, rules: Rules) -> Mapping[str, SpikeRule]:
        names = [population.name for population in self.network.populations if population.spiking]
        if not isinstance(rules, Mapping):
            return dict.fromkeys(names, rules)
        missing = [name for name in names if name not in rules]
        if missing:
            raise SpikeguardError(f"no gradient rule for {', '.join(missing)}; give every spiking population one")
        return {name: rules[name] for name in names}

    def _neurons(self, rules: Mapping[str, SpikeRule], first_sample: int, samples: int) -> dict[str, Neurons]:
        """All populations, for a group of samples."""
        steps = self.network.steps
        return {
            p.name: Neurons(
                p, steps, rules.get(p.name, TRIANGLE), self._constant(p), self._bias(p), first_sample, samples
            )
            for p in self.network.populations
        }

    def _readouts(self, codes: Tensor, neurons: Mapping[str, Neurons]) -> Tensor:
        """Integer answers ``(samples, classes)``."""
        return self._answers(self._activity(codes, neurons), neurons)

    def _answers(self, activity: Mapping[str, Tensor], neurons: Mapping[str, Neurons]) -> Tensor:
        readout = self.network.readout
        if readout.is_leaky:
            return last_membrane(neurons[readout.name], self._sums(readout, activity)).flatten(1)
        return self._summed_over_steps(readout, activity)

    def _activity(self, codes: Tensor, neurons: Mapping[str, Neurons]) -> dict[str, Tensor]:
        """Codes and spikes by source, with a single leading step where nothing changes over time."""
        changing = codes.ndim == len(self.network.input.shape) + 2
        activity = {INPUT: codes.transpose(0, 1) if changing else codes[None]}
        for population in self.network.populations[:-1]:
            activity[population.name] = spikes(neurons[population.name], self._sums(population, activity))
        return activity

    def _sums(self, population: Population, activity: Mapping[str, Tensor]) -> HeldAndStepped:
        """Sums held at every step ``(samples, *shape)`` and those that change ``(steps, samples, *shape)``."""
        held: Tensor | None = None
        stepped: Tensor | None = None
        for index, synapse in self._incoming(population):
            source = activity[synapse.source]
            total = self._propagate(index, synapse, source.flatten(0, 1))
            if len(source) == 1:
                held = total if held is None else held + total
            else:
                total = total.reshape(*source.shape[:2], *population.shape)
                stepped = total if stepped is None else stepped + total
        return held, stepped

    def _summed_over_steps(self, population: Population, activity: Mapping[str, Tensor]) -> Tensor:
        """Integer sums over all steps with bias, ``(samples, size)``; adding the sources up first gives the same."""
        steps = self.network.steps
        total = steps * (self._constant(population) + self._bias(population))[None]
        for index, synapse in self._incoming(population):
            source = activity[synapse.source]
            repeats = steps if len(source) == 1 else 1
            total = total + self._propagate(index, synapse, source.sum(0) * repeats)
        return total.flatten(1) / STATE_UNITS

    def _propagate(self, index: int, synapse: Synapse, activity: Tensor) -> Tensor:
        """Weighted sums ``(rows, *source_shape)`` -> ``(rows, *target_shape)``, of the type of the weights."""
        weight = self.get_buffer(f"weight_{index}")
        activity = activity.to(weight.dtype)
        if synapse.kind == "dense":
            return F.linear(activity.movedim(1, -1).flatten(1), weight)
        phases: Tensor | None = getattr(self, f"phases_{index}")
        return exact_convolution(activity, weight, synapse.stride, synapse.padding, phases)

    def _split_constant_channels(self, synapse: Synapse, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the image's own channels, and what the constant channels add at every step."""
        spec = self.network.input
        presented = torch.zeros(1, *spec.presented_shape, dtype=weight.dtype)
        for channel, code in enumerate(spec.constant_codes, start=spec.shape[0]):
            presented[:, channel] = code
        channels = weight.reshape(len(weight), spec.presented_shape[0], -1)[:, : spec.shape[0]]
        if synapse.kind == "dense":
            return channels.flatten(1), F.linear(presented.flatten(1), weight)[0]
        constant = exact_convolution(presented, weight, synapse.stride, synapse.padding)[0]
        return channels.reshape(len(weight), -1, *weight.shape[2:]), constant

    def _incoming(self, population: Population) -> list[tuple[int, Synapse]]:
        return [(i, s) for i, s in enumerate(self.network.synapses) if s.target == population.name]

    def _source_shape(self, synapse: Synapse) -> tuple[int, ...]:
        """Shape of the activity that ``synapse`` reads; constant channels are no part of it."""
        return self.network.input.shape if synapse.source == INPUT else self.network.source_shape(synapse)

    def _bias(self, population: Population) -> Tensor:
        return self.get_buffer(f"bias_{population.name}")

    def _constant(self, population: Population) -> Tensor:
        return self.get_buffer(f"constant_{population.name}")


def _exact_types(network: IntegerNetwork) -> tuple[dict[str, torch.dtype], dict[str, torch.dtype]]:
    """By population, types that hold its sums in any order and its states exactly; the readout's hold its total."""
    magnitudes = synaptic_magnitudes(network)
    sums, states = {}, {}
    for population, row in zip(network.populations, prove(network), strict=True):
        fits = int((magnitudes[population.name] + np.abs(population.bias)).max()) < FLOAT32_INTEGERS
        states[population.name] = torch.float32 if row.exact_in_float32 else torch.float64
        sums[population.name] = torch.float32 if fits and population.spiking else states[population.name]
    return sums, states


def _columns_as_in_memory(weight: Tensor, source_shape: tuple[int, ...]) -> Tensor:
    """Dense weights ``(out, in)`` for a source that is read with its channels last."""
    return weight.reshape(len(weight), *source_shape).movedim(1, -1).flatten(1)


def _channels_last(values: Tensor) -> Tensor:
    return values.movedim(0, -1).contiguous().movedim(-1, 0)


def _record(neurons: Neurons, sums: HeldAndStepped) -> PopulationTrace:
    before = membranes(neurons, sums)
    fired = (before > neurons.threshold).to(before.dtype)

    def samples_first(values: Tensor, dtype: torch.dtype) -> NDArray[Any]:
        recorded: NDArray[Any] = values.transpose(0, 1).flatten(2).to(dtype).cpu().numpy()
        return recorded

    return PopulationTrace(
        samples_first(fired, torch.bool) if neurons.population.spiking else None,
        samples_first(neurons.reset(before, fired), torch.int32),
    )


class _Round(torch.autograd.Function):
    """Nearest integer; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        return values.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient
