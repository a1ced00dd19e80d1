"""The spiking neuron of the method: integrate-and-fire, reset to zero, one trainable threshold per layer.

With ``z = u - threshold`` and g the surrogate gradient (Özdenizci & Legenstein, TMLR 2024)::

    u_t = beta v_{t-1} + x_t        s_t = [u_t >= threshold]        v_t = u_t (1 - s_t)
    ds/du = g(z)                    dv/du = (1 - s) - u g(z)

beta is 1 in the method; the subtractive reset, ``v_t = u_t - threshold s_t`` with ``dv/du = 1 - threshold g``, is an
option.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Literal, cast

import snntorch
import torch
from torch import Tensor

from hardware.surrogates import TRIANGLE, GradientRule, Rate, SpikeRule, Surrogate
from pipeline.models import neuron_kernels
from pipeline.models.neuron_kernels import BLOCK, RULE_IDS, Array

MIN_THRESHOLD = 0.03
# Neurons (of all samples) below which another thread costs more than it saves.
SMALLEST_SHARE = 2**14
Reset = Literal["zero", "subtract"]


class Leaky(snntorch.Leaky):  # type: ignore[misc]
    """A layer of (leaky) integrate-and-fire neurons, all with one threshold.

    It is an :class:`snntorch.Leaky` with that class's names, stepping and export, but for three things:

    - it spikes where ``u >= threshold``, not where ``u > threshold``;
    - gradients also pass through the reset, which snnTorch detaches;
    - the membrane it returns is the one after the reset of the same step; snnTorch resets at the next step.

    snnTorch's export to NIR writes ``tau = dt / (1 - beta)`` and so needs beta below 1.

    Args:
        threshold: initial value of the layer's threshold, real units; it is kept at or above ``MIN_THRESHOLD``.
        beta: share of the membrane kept from step to step, in [0, 1]; 1 does not leak. Below 1 a chip rounds it to
            12 bits and the membrane at every step, so that the deployed network differs by more than its weights.
        reset_mechanism: "zero", or "subtract", which keeps what exceeds the threshold but which the neurons of Loihi
            and stock Lava do not have: such a network runs on the emulator and ONNX Runtime only.
        spike_grad: surrogate gradient.
        learn_threshold: whether the threshold is a parameter.
        init_hidden, output: as in snnTorch.
    """

    threshold: Tensor
    beta: Tensor
    mem: Tensor

    def __init__(
        self,
        threshold: float = 1.0,
        *,
        beta: float = 1.0,
        reset_mechanism: Reset = "zero",
        spike_grad: GradientRule = TRIANGLE,
        learn_threshold: bool = True,
        init_hidden: bool = False,
        output: bool = False,
    ) -> None:
        super().__init__(
            beta=float(beta),
            threshold=float(threshold),
            spike_grad=_spike_function(spike_grad),
            init_hidden=init_hidden,
            learn_threshold=learn_threshold,
            reset_mechanism=reset_mechanism,
            output=output,
            reset_delay=False,
        )
        # Settings of the layer, not parameters to store.
        for name in ("beta", "graded_spikes_factor", "reset_mechanism_val"):
            self._non_persistent_buffers_set.add(name)
        self.surrogate = spike_grad
        self._beta = float(beta)

    @property
    def subtracts(self) -> bool:
        """Whether the reset subtracts the threshold instead of clearing the membrane."""
        return bool(self.reset_mechanism == "subtract")

    @property
    def effective_threshold(self) -> Tensor:
        """The threshold in force: never below ``MIN_THRESHOLD``."""
        return self.threshold.clamp(min=MIN_THRESHOLD)

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One time step, as snnTorch's neurons do it.

        Args:
            input_: current ``(samples, ...)``.
            mem: membrane after the last step; not with ``init_hidden``. Zeros if it has another shape.

        Returns:
            Spikes and the membrane after the reset; with ``init_hidden`` and without ``output`` the spikes alone.

        Raises:
            TypeError: if ``mem`` is given with ``init_hidden``.
        """
        if mem is not None and self.init_hidden:
            raise TypeError("mem is the neuron's own with init_hidden=True; leave it out")
        v = self.mem if mem is None else mem
        if v.shape != input_.shape:
            v = torch.zeros_like(input_)
        threshold = self.effective_threshold
        u = self._beta * v + input_
        spikes = cast(Tensor, self.spike_grad(u - threshold))
        self.mem = u - threshold * spikes if self.subtracts else u * (1 - spikes)
        return spikes if self.init_hidden and not self.output else (spikes, self.mem)

    def sequence(self, current: Tensor, steps: int, rule: SpikeRule | None = None) -> Tensor:
        """All steps at once from a membrane of zero: the same spikes and gradients as stepping, in one fused node.

        Args:
            current: ``(steps, samples, ...)``, or ``(1, samples, ...)`` if it is the same at every step.
            steps: T.
            rule: how gradients pass, instead of the layer's own surrogate.

        Returns:
            0/1 spikes ``(steps, samples, ...)``.
        """
        neuron = self.effective_threshold, self._beta, self.subtracts
        return fire(current, *neuron, steps, rule or self.surrogate)

    @torch.no_grad()
    def membranes(self, current: Tensor, steps: int) -> Tensor:
        """Membranes before the reset, ``(steps, samples, ...)``, for diagnosis."""
        return _integrate(current, self.effective_threshold, _Settings(steps, self._beta, self.subtracts, TRIANGLE))

    @torch.no_grad()
    def clamp_threshold(self) -> None:
        """Keep the stored threshold at or above ``MIN_THRESHOLD`` (after an optimiser step)."""
        self.threshold.clamp_(min=MIN_THRESHOLD)


def fire(current: Tensor, threshold: Tensor, beta: float, subtract: bool, steps: int, rule: SpikeRule) -> Tensor:
    """0/1 spikes ``(steps, samples, ...)`` of neurons that integrate from zero, with gradients to both tensors.

    Args:
        current: ``(steps, samples, ...)``, or ``(1, samples, ...)`` if it is the same at every step.
        threshold: a single value.
        beta: share of the membrane kept from step to step.
        subtract: whether the reset subtracts the threshold instead of clearing the membrane.
        steps: T.
        rule: how gradients pass the spikes.
    """
    settings = _Settings(steps, beta, subtract, rule)
    spikes: Tensor = _Spikes.apply(current, threshold, settings)  # type: ignore[no-untyped-call]
    return spikes


def _spike_function(rule: GradientRule) -> Callable[[Tensor], Tensor]:
    """A surrogate as snnTorch's ``spike_grad``: of z, 1 where it is not negative."""

    def spike(z: Tensor) -> Tensor:
        spikes: Tensor = _Step.apply(z, rule)  # type: ignore[no-untyped-call]
        return spikes

    return spike


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, rule: GradientRule) -> Tensor:
        ctx.save_for_backward(z)
        ctx.rule = rule
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return gradient * ctx.rule.gradient(z), None


class _Settings:
    """What a layer does with a current: T, decay, reset, and the way back."""

    def __init__(self, steps: int, beta: float, subtract: bool, rule: SpikeRule) -> None:
        self.steps, self.beta, self.subtract, self.rule = steps, beta, subtract, rule

    @property
    def is_compiled(self) -> bool:
        """Whether the way back is compiled."""
        return is_compiled(self.rule)


def is_compiled(rule: SpikeRule) -> bool:
    """Whether gradients pass through a compiled rule, which keeps no state from call to call."""
    return isinstance(rule, Rate) or (type(rule) is Surrogate and rule.rule in RULE_IDS)


class _Spikes(torch.autograd.Function):
    """All T steps of a layer in one node, which keeps nothing but the current and integrates it again on the way back.

    On the CPU the work is done by :mod:`pipeline.models.neuron_kernels`, elsewhere by the same formulas in torch.
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, threshold: Tensor, settings: _Settings) -> Tensor:
        # Half precision carries a membrane over few steps at most.
        current = current.float() if current.dtype in (torch.float16, torch.bfloat16) else current
        current, channels_last = _dense(current)
        ctx.save_for_backward(current, threshold)
        ctx.settings, ctx.channels_last = settings, channels_last
        if current.device.type != "cpu":
            return (_integrate(current, threshold, settings) >= threshold).to(current.dtype)
        spikes = _empty(current, settings.steps, channels_last)
        x = _flat(current, channels_last)
        real = x.dtype.type
        arrays = x, real(threshold.item()), real(settings.beta), settings.subtract, _flat(spikes, channels_last)
        _on_all_threads(neuron_kernels.fire, x, arrays)
        return spikes

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor) -> tuple[Tensor, Tensor | None, None]:
        current, threshold = ctx.saved_tensors
        settings: _Settings = ctx.settings
        # An average over time has the same gradient at every step.
        grad_spikes = grad_spikes[:1] if grad_spikes.stride(0) == 0 else grad_spikes
        grad_spikes = grad_spikes.to(current.dtype)
        backward = _backward_compiled if current.device.type == "cpu" else _backward_in_torch
        grad_current, grad_threshold = backward(current, threshold, grad_spikes, settings, ctx.channels_last)
        return grad_current, grad_threshold if ctx.needs_input_grad[1] else None, None


def _backward_compiled(
    current: Tensor, threshold: Tensor, grad_spikes: Tensor, settings: _Settings, channels_last: bool
) -> tuple[Tensor, Tensor]:
    grad_current = _empty(current, len(current), channels_last)
    x = _flat(current, channels_last)
    real = x.dtype.type
    level, beta = real(threshold.item()), real(settings.beta)
    arrays = x, level, beta, settings.subtract, _flat(grad_spikes, channels_last), _flat(grad_current, channels_last)
    if isinstance(settings.rule, Rate):
        _on_all_threads(neuron_kernels.backpropagate_rate, x, (*arrays, settings.steps))
        grad_threshold = 0.0
    elif settings.is_compiled:
        rule = cast(Surrogate, settings.rule)
        rule_of_kernel = settings.steps, RULE_IDS[rule.rule], real(rule.width), real(rule.height)
        grad_threshold = _on_all_threads(neuron_kernels.backpropagate, x, (*arrays, *rule_of_kernel))
    else:
        z = _empty(current, settings.steps, channels_last)
        _on_all_threads(neuron_kernels.integrate, x, (x, level, beta, settings.subtract, _flat(z, channels_last)))
        slopes = settings.rule.gradient(z.sub_(float(level)))
        ordered = _flat(_like(slopes, z), channels_last)
        grad_threshold = _on_all_threads(neuron_kernels.backpropagate_slopes, x, (*arrays, ordered))
    return grad_current, torch.full_like(threshold, grad_threshold)


def _on_all_threads(kernel: Callable[..., float | None], x: Array, arguments: tuple[Any, ...]) -> float:
    """Call ``kernel(start, stop, *arguments)`` for the columns of ``x``, shared out among as many threads as torch
    uses; the sum of what it returns.
    """
    neurons = x.shape[1]
    parts = max(1, min(torch.get_num_threads(), neurons // SMALLEST_SHARE))
    size = -(-neurons // parts // BLOCK) * BLOCK if neurons else 1
    bounds = [(start, min(start + size, neurons)) for start in range(0, neurons, size)] or [(0, 0)]
    if len(bounds) == 1:
        return kernel(*bounds[0], *arguments) or 0.0
    return sum(part or 0.0 for part in _threads(len(bounds)).map(lambda bound: kernel(*bound, *arguments), bounds))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "neurons")


def _backward_in_torch(
    current: Tensor, threshold: Tensor, grad_spikes: Tensor, settings: _Settings, channels_last: bool
) -> tuple[Tensor, Tensor]:
    del channels_last  # any order will do
    u = _integrate(current, threshold, settings)
    grad_spikes = grad_spikes.expand_as(u)
    is_static = len(current) == 1
    fired = (u >= threshold).to(u.dtype)
    if isinstance(settings.rule, Rate):
        grad = grad_spikes * fired.amax(0)
        return (grad.sum(0, keepdim=True) if is_static else grad), torch.zeros_like(threshold)
    slope = settings.rule.gradient(u - threshold)
    through_spike = grad_spikes * slope
    if settings.subtract:
        kept, by_threshold = 1 - threshold * slope, threshold * slope - fired
    else:
        kept, by_threshold = (1 - fired) - u * slope, u * slope
    grad_u = through_spike.clone()
    for t in range(len(u) - 2, -1, -1):
        grad_u[t].addcmul_(grad_u[t + 1], kept[t], value=settings.beta)
    grad_threshold = settings.beta * (grad_u[1:] * by_threshold[:-1]).sum() - through_spike.sum()
    return (grad_u.sum(0, keepdim=True) if is_static else grad_u), grad_threshold.reshape(threshold.shape)


def _integrate(current: Tensor, threshold: Tensor, settings: _Settings) -> Tensor:
    """Membranes before the reset ``(steps, samples, ...)``."""
    u = current.new_empty((settings.steps, *current.shape[1:]))
    v = torch.zeros_like(u[0])
    for t in range(settings.steps):
        torch.add(settings.beta * v, current[0 if len(current) == 1 else t], out=u[t])
        fired = u[t] >= threshold
        v = u[t] - threshold * fired if settings.subtract else u[t].masked_fill(fired, 0.0)
    return u


def _dense(activity: Tensor) -> tuple[Tensor, bool]:
    """The same values without gaps in memory, and whether channels are last there."""
    if activity.is_contiguous():
        return activity, False
    if activity.ndim > 3 and activity.movedim(2, -1).is_contiguous():
        return activity, True
    return activity.contiguous(), False


def _empty(activity: Tensor, steps: int, channels_last: bool) -> Tensor:
    """Room for ``(steps, samples, *shape)``, in the order of memory of ``activity``."""
    if not channels_last:
        return activity.new_empty((steps, *activity.shape[1:]))
    return activity.new_empty((steps, *activity.movedim(2, -1).shape[1:])).movedim(-1, 2)


def _like(activity: Tensor, other: Tensor) -> Tensor:
    """The same values in the order of memory of ``other``."""
    return activity if activity.stride() == other.stride() else torch.empty_like(other).copy_(activity)


def _flat(activity: Tensor, channels_last: bool) -> Array:
    """``(steps or 1, neurons of all samples)`` in the order of memory; a view, if there are no gaps in it."""
    ordered = activity.detach().movedim(2, -1) if channels_last else activity.detach()
    flat: Array = ordered.flatten(1).numpy()
    return flat
