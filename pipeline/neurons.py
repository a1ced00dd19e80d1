"""The spiking neuron of the method: integrate-and-fire, reset to zero, one trainable threshold per layer.

With ``z = u - threshold`` (Özdenizci & Legenstein, TMLR 2024)::

    u_t = beta v_{t-1} + x_t        s_t = [u_t >= threshold]        v_t = u_t (1 - s_t)

Parameters carry snnTorch's names (``beta``, ``threshold``, ``reset_mechanism``, ``spike_grad`` there is the
surrogate here). Three things differ from ``snntorch.Leaky`` and matter for exactness: the comparison is ``>=``,
not ``>``; the reset path is not detached from the gradient; the membrane is stored after the reset of the same
step, while snnTorch resets at the next one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hardware.surrogates import TRIANGLE, Surrogate

MIN_THRESHOLD = 0.03


class _IntegrateAndFire(torch.autograd.Function):
    """All T steps of a layer in one node of the graph, so that nothing but u is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, threshold: Tensor, steps: int, surrogate: Surrogate) -> Tensor:
        is_static = current.shape[0] == 1
        u = current.new_empty((steps, *current.shape[1:]))
        spikes = torch.empty_like(u)
        v = torch.zeros_like(u[0])
        for t in range(steps):
            torch.add(v, current[0 if is_static else t], out=u[t])
            fired = u[t] >= threshold
            spikes[t] = fired
            v = u[t].masked_fill(fired, 0.0)
        ctx.save_for_backward(u, spikes, threshold)
        ctx.surrogate = surrogate
        ctx.is_static = is_static
        return spikes

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        u, spikes, threshold = ctx.saved_tensors
        slope = ctx.surrogate.gradient(u - threshold)
        through_spike = grad_spikes * slope
        through_state = (1.0 - spikes).addcmul_(u, slope, value=-1.0)
        grad_u = through_spike.clone()
        for t in range(len(u) - 2, -1, -1):
            grad_u[t].addcmul_(grad_u[t + 1], through_state[t])
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            # v_t = u_t (1 - s_t) depends on the threshold through s_t: dv/dthreshold = +u * slope.
            carried = (grad_u[1:] * u[:-1] * slope[:-1]).sum()
            grad_threshold = (carried - through_spike.sum()).reshape(threshold.shape)
        grad_current = grad_u.sum(0, keepdim=True) if ctx.is_static else grad_u
        return grad_current, grad_threshold, None, None


class IntegrateAndFire(nn.Module):
    """A layer of integrate-and-fire neurons.

    Args:
        threshold: initial value of the layer's one trainable threshold, real units.
        surrogate: gradient used in place of the derivative of the step function.
    """

    beta = 1.0
    reset_mechanism = "zero"

    def __init__(self, threshold: float = 1.0, surrogate: Surrogate = TRIANGLE) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self.surrogate = surrogate

    @property
    def effective_threshold(self) -> Tensor:
        """The threshold in force: never below ``MIN_THRESHOLD``."""
        return self.threshold.clamp(min=MIN_THRESHOLD)

    def forward(self, current: Tensor, steps: int, surrogate: Surrogate | None = None) -> Tensor:
        """Spikes for an input current.

        Args:
            current: ``(steps, samples, ...)``, or ``(1, samples, ...)`` if it is the same at every step.
            steps: T.
            surrogate: gradient to use instead of the layer's own.

        Returns:
            0/1 spikes ``(steps, samples, ...)``.
        """
        spikes: Tensor = _IntegrateAndFire.apply(  # type: ignore[no-untyped-call]
            current, self.effective_threshold, steps, surrogate or self.surrogate
        )
        return spikes

    def membranes(self, current: Tensor, steps: int) -> Tensor:
        """Membranes before the reset, ``(steps, samples, ...)``, for diagnosis."""
        v = torch.zeros_like(current[0])
        history = []
        for t in range(steps):
            u = v + current[0 if len(current) == 1 else t]
            history.append(u)
            v = u.masked_fill(u >= self.effective_threshold, 0.0)
        return torch.stack(history)

    @torch.no_grad()
    def clamp_threshold(self) -> None:
        """Keep the stored threshold at or above ``MIN_THRESHOLD`` (after an optimiser step)."""
        self.threshold.clamp_(min=MIN_THRESHOLD)
