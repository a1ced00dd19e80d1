"""Spiking neurons of the differentiable twin as one node of torch's graph, all steps at once.

On the CPU they are the kernels of :mod:`hardware.twin_kernels`; elsewhere plain torch, with the same spikes and, to
rounding, the same gradients. Activity, sums and gradients have shape ``(steps, samples, *shape)`` and lie in memory
with the channels last. States have the type of ``constant`` and ``bias``, which must hold them exactly; sums may be
narrower.

Backward, with g the surrogate at z, r the membrane before reset and v after it in real units, c the current, and k
the share that a step keeps of each::

    ds/dr = g    dr_t/dv_{t-1} = k_v    dr/dc = 1    dc_t/dc_{t-1} = k_c
    dv/dr = (1 - s) - r g   (reset "zero"),    1 - threshold g / scale   (reset "subtract")

Through the rate, the input of a step gets the gradient of its spikes wherever the neuron spikes at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hardware import twin_kernels
from hardware.network import DECAY_UNITY, FRACTION_BITS, STATE_LIMIT, Population
from hardware.surrogate_kernels import RULE_IDS
from hardware.surrogates import AdaptiveSurrogate, GradientRule, Rate, SpikeRule, Surrogate
from hardware.twin_kernels import Array, Dynamics, Gradients, Sums

STATE_UNITS = 1 << FRACTION_BITS

HeldAndStepped = tuple[Tensor | None, Tensor | None]
"""Sums (or gradients at them) in state units: ``(samples, *shape)`` at every step, ``(steps, samples, *shape)``.

Not both are None; both have the same type.
"""


@dataclass(frozen=True)
class Neurons:
    """A population, for a group of samples.

    Attributes:
        constant: ``shape``, state units that enter the current at every step.
        bias: ``shape``, state units that enter the membrane at every step.
        first_sample: where the group begins among all samples of the call,
        samples: of which there are so many; adaptive rules follow each of them.
    """

    population: Population
    steps: int
    rule: SpikeRule
    constant: Tensor
    bias: Tensor
    first_sample: int
    samples: int

    @property
    def threshold(self) -> int:
        """State units; a readout has one that no membrane passes."""
        return self.population.threshold * STATE_UNITS if self.population.spiking else STATE_LIMIT

    @property
    def middle(self) -> int:
        """State units where z is 0: half a weight unit above the threshold."""
        return self.threshold + STATE_UNITS // 2

    @property
    def unit(self) -> float:
        """Real units per state unit."""
        return 1 / (STATE_UNITS * self.population.scale)

    def reset(self, before: Tensor, fired: Tensor) -> Tensor:
        """Membranes after the reset."""
        if self.population.reset == "zero":
            return torch.addcmul(before, before, fired, value=-1)
        return torch.sub(before, fired, alpha=self.threshold)


def spikes(neurons: Neurons, sums: HeldAndStepped) -> Tensor:
    """0/1 spikes ``(steps, samples, *shape)`` of the type of the sums, with gradients to them."""
    function = _CompiledSpikes if _is_compiled_for(sums) else _TorchSpikes
    fired: Tensor = function.apply(neurons, *sums)  # type: ignore[no-untyped-call]
    return fired


def membranes(neurons: Neurons, sums: HeldAndStepped) -> Tensor:
    """Membranes before the reset ``(steps, samples, *shape)`` in the type of the states, without gradients."""
    if not _is_compiled_for(sums):
        return _simulate(neurons, sums)[0]
    before = _empty(_with_steps(sums), neurons.steps).to(neurons.bias.dtype)
    twin_kernels.integrate(_entering(neurons, sums), _dynamics(neurons), _flat(before))
    return before


def last_membrane(neurons: Neurons, sums: HeldAndStepped) -> Tensor:
    """Membrane after the last step ``(samples, *shape)`` of a population that never spikes, with gradients to sums."""
    membrane: Tensor = _LastMembrane.apply(neurons, *sums)  # type: ignore[no-untyped-call]
    return membrane


class _LastMembrane(torch.autograd.Function):
    """Linear but for truncation and saturation, through which gradients pass unchanged."""

    @staticmethod
    def forward(ctx: Any, neurons: Neurons, held: Tensor | None, stepped: Tensor | None) -> Tensor:
        ctx.neurons, ctx.has_held, ctx.has_stepped = neurons, held is not None, stepped is not None
        return membranes(neurons, (held, stepped))[-1].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        population, steps = ctx.neurons.population, ctx.neurons.steps
        membrane_kept = 1 - population.voltage_decay / DECAY_UNITY
        current_kept = 1 - population.current_decay / DECAY_UNITY
        # What is left in the last step of a unit that entered so many steps before.
        left = [
            sum(current_kept**j * membrane_kept ** (lag - j) for j in range(lag + 1)) for lag in reversed(range(steps))
        ]
        shares = gradient.new_tensor(left).reshape(-1, *([1] * gradient.ndim))
        flow = gradient * shares
        return None, flow.sum(0) if ctx.has_held else None, flow if ctx.has_stepped else None


def is_compiled(rule: SpikeRule) -> bool:
    """Whether kernels apply the rule, group by group; others are to see z of all samples."""
    return type(rule) in (Rate, AdaptiveSurrogate) or (type(rule) is Surrogate and rule.rule in RULE_IDS)


class _CompiledSpikes(torch.autograd.Function):
    """All steps of a population in one node that keeps nothing but the sums."""

    @staticmethod
    def forward(ctx: Any, neurons: Neurons, held: Tensor | None, stepped: Tensor | None) -> Tensor:
        ctx.save_for_backward(held, stepped)
        ctx.neurons = neurons
        fired = _empty(_with_steps((held, stepped)), neurons.steps)
        twin_kernels.fire(_entering(neurons, (held, stepped)), _dynamics(neurons), _flat(fired))
        return fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        held, stepped = ctx.saved_tensors
        neurons: Neurons = ctx.neurons
        into_held = None if held is None else _empty(held[None], 1)[0]
        into_stepped = None if stepped is None else _empty(stepped, neurons.steps)
        # A sum over the steps has the same gradient at every step.
        given = gradient[:1] if gradient.stride(0) == 0 else gradient
        _backpropagate(neurons, (held, stepped), given, (into_held, into_stepped))
        return None, into_held, into_stepped


def _backpropagate(neurons: Neurons, sums: HeldAndStepped, gradient: Tensor, wanted: HeldAndStepped) -> None:
    """Fill ``wanted``, the gradients at the sums."""
    entering, dynamics, filled = _entering(neurons, sums), _dynamics(neurons), _entering(neurons, wanted)
    at_spikes = _flat(gradient)
    real = at_spikes.dtype.type
    gradients = Gradients(at_spikes, filled.held, filled.stepped, real(neurons.unit), real(neurons.middle))
    rule, steps = neurons.rule, neurons.steps
    if isinstance(rule, Rate):
        twin_kernels.backpropagate_rate(entering, dynamics, gradients, steps)
    elif type(rule) is AdaptiveSurrogate:
        mean, deviation = rule.running_means(_empty(gradient, steps, neurons.samples))
        twin_kernels.backpropagate_adaptively(
            entering, dynamics, gradients, real(rule.half_width), _flat(mean), _flat(deviation), neurons.first_sample
        )
    elif is_compiled(rule):
        rule = cast(Surrogate, rule)
        twin_kernels.backpropagate(
            entering, dynamics, gradients, steps, RULE_IDS[rule.rule], real(rule.width), real(rule.height)
        )
    else:
        z = _distance(neurons, membranes(neurons, sums)).to(gradient.dtype)
        slopes = rule.gradient(z)
        twin_kernels.backpropagate_slopes(entering, dynamics, gradients, _flat(slopes))


def _entering(neurons: Neurons, sums: HeldAndStepped) -> Sums:
    held, stepped = sums
    constant, bias = (_flat(values[None, None])[0, 0] for values in (neurons.constant, neurons.bias))
    absent = np.empty((0, len(bias)), _flat(_with_steps(sums)[:, :0]).dtype)
    return Sums(
        held=absent if held is None else _flat(held[None])[0],
        stepped=absent[None][:0] if stepped is None else _flat(stepped),
        constant=constant,
        bias=bias,
    )


def _dynamics(neurons: Neurons) -> Dynamics:
    population = neurons.population
    state = neurons.bias.numpy().dtype.type
    return Dynamics(
        threshold=state(neurons.threshold),
        limit=state(STATE_LIMIT),
        resets_to_zero=population.reset == "zero",
        leaks=population.is_leaky,
        current_kept=state(1 - population.current_decay / DECAY_UNITY),
        voltage_kept=state(1 - population.voltage_decay / DECAY_UNITY),
    )


class _TorchSpikes(torch.autograd.Function):
    """The same in torch, for devices that the kernels do not run on; it keeps membranes and spikes."""

    @staticmethod
    def forward(ctx: Any, neurons: Neurons, held: Tensor | None, stepped: Tensor | None) -> Tensor:
        before, fired = _simulate(neurons, (held, stepped))
        ctx.save_for_backward(before, fired)
        ctx.neurons, ctx.has_held, ctx.has_stepped = neurons, held is not None, stepped is not None
        return fired.to(_with_steps((held, stepped)).dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        before, fired = ctx.saved_tensors
        neurons: Neurons = ctx.neurons
        if isinstance(neurons.rule, Rate):
            flow = gradient * fired.amax(0)
        else:
            flow = _flow_through_time(neurons, neurons.rule, gradient, before, fired)
        flow = flow.mul_(neurons.unit).to(gradient.dtype)
        return None, flow.sum(0) if ctx.has_held else None, flow if ctx.has_stepped else None


def _simulate(neurons: Neurons, sums: HeldAndStepped) -> tuple[Tensor, Tensor]:
    """Membranes before the reset, and 0/1 spikes, both ``(steps, samples, *shape)`` in the type of the states."""
    population, bias = neurons.population, neurons.bias
    held, stepped = sums
    steady = neurons.constant if held is None else neurons.constant + held
    before = bias.new_empty(neurons.steps, *_with_steps(sums).shape[1:])
    fired = torch.empty_like(before)
    current = membrane = torch.zeros_like(before[0])
    for step in range(neurons.steps):
        # Sums first, then the state: float32 holds sums of both signs that it would not hold one after the other.
        drive = steady if stepped is None else steady + stepped[step]
        if population.is_leaky:
            drive = current = _decayed(current, population.current_decay) + drive
            membrane = _decayed(membrane, population.voltage_decay)
        torch.add(membrane, drive + bias, out=before[step]).clamp_(-STATE_LIMIT, STATE_LIMIT)
        torch.gt(before[step], neurons.threshold, out=fired[step])
        membrane = neurons.reset(before[step], fired[step])
    return before, fired


def _decayed(state: Tensor, share: int) -> Tensor:
    return (state * (DECAY_UNITY - share) / DECAY_UNITY).trunc()


def _flow_through_time(neurons: Neurons, rule: GradientRule, gradient: Tensor, before: Tensor, fired: Tensor) -> Tensor:
    """Gradient at the input of every step in real units, from that at the spikes."""
    population = neurons.population
    slope = rule.gradient(_distance(neurons, before))
    if population.reset == "zero":
        through_reset = (before * neurons.unit).mul_(slope).add_(fired).neg_().add_(1)
    else:
        through_reset = slope * (-neurons.threshold * neurons.unit) + 1
    membrane_share = 1 - population.voltage_decay / DECAY_UNITY
    current_share = 1 - population.current_decay / DECAY_UNITY
    flow = gradient * slope
    for step in range(neurons.steps - 2, -1, -1):
        flow[step].addcmul_(flow[step + 1], through_reset[step], value=membrane_share)
    if current_share:
        for step in range(neurons.steps - 2, -1, -1):
            flow[step].add_(flow[step + 1], alpha=current_share)
    return flow


def _distance(neurons: Neurons, before: Tensor) -> Tensor:
    """z in real units."""
    return (before - neurons.middle).mul_(neurons.unit)


def _is_compiled_for(sums: HeldAndStepped) -> bool:
    return _with_steps(sums).device.type == "cpu"


def _with_steps(sums: HeldAndStepped) -> Tensor:
    """One of the sums, with an axis of steps."""
    held, stepped = sums
    if stepped is not None:
        return stepped
    assert held is not None
    return held[None]


def _empty(activity: Tensor, steps: int, samples: int | None = None) -> Tensor:
    """Room for ``(steps, samples, *shape)``, channels last in memory."""
    shape = activity.movedim(2, -1).shape
    return activity.new_empty((steps, shape[1] if samples is None else samples, *shape[2:])).movedim(-1, 2)


def _flat(activity: Tensor) -> Array:
    """``(steps, samples, neurons)`` in the order of memory; a view, if channels are last in memory."""
    flat: Array = activity.detach().movedim(2, -1).flatten(2).contiguous().numpy()
    return flat
