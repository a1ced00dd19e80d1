"""Layers torch does not have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """Channel-wise ``(x - mean) / std``, the first operation of a network, so that budgets stay in pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError("Normalize needs one positive std per mean")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``(samples, channels, ...)``."""
        shape = (1, -1, *([1] * (images.ndim - 2)))
        return (images - self.mean.view(shape)) / self.std.view(shape)


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """``F.conv2d`` that takes every n-th pixel by itself where the kernel is a single pixel.

    oneDNN's weight gradient of such strided convolutions writes past its memory for few channels that lie together,
    on CPUs with AVX2 and no AVX-512 (torch 2.13); without a stride it does not.
    """
    if weight.shape[2:] == (1, 1) and stride > 1 and not padding:
        return F.conv2d(input[:, :, ::stride, ::stride], weight, bias)
    return F.conv2d(input, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """A square convolution by :func:`convolve`."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(samples, channels, height, width)``."""
        return convolve(input, self.weight, self.bias, self.stride[0], int(self.padding[0]))


class Add(nn.Module):
    """The sum of its inputs, as in residual networks."""

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        """Add tensors of equal shapes; an axis of one step stands for all steps."""
        for other in others:
            first = first + other
        return first


class Scale(nn.Module):
    """A factor, learned or fixed: the weights of a learned residual sum.

    Args:
        value: of the factor, at the start if it is learned.
    """

    value: Tensor

    def __init__(self, value: float, learned: bool) -> None:
        super().__init__()
        if learned:
            self.value = nn.Parameter(torch.tensor(float(value)))
        else:
            self.register_buffer("value", torch.tensor(float(value)))

    def forward(self, activity: Tensor) -> Tensor:
        """Multiply."""
        return self.value * activity


class SynapticCurrent(nn.Module):
    """Synapses whose current decays instead of ending with the step: ``i_t = alpha i_{t-1} + x_t``, from zero.

    Args:
        alpha: share of the current kept from step to step, in [0, 1].
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def sequence(self, entering: Tensor, steps: int) -> Tensor:
        """Currents ``(steps, samples, ...)`` of what enters, ``(steps, ...)`` or ``(1, ...)`` if always the same."""
        return _leaky_sums(self.alpha, entering, steps)


class LeakyReadout(nn.Module):
    """Neurons that never spike, ``v_t = beta v_{t-1} + i_t`` from zero, and answer with their last membrane.

    Args:
        beta: share of the membrane kept from step to step, in [0, 1].
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def sequence(self, current: Tensor, steps: int) -> Tensor:
        """Membranes after the last step, ``(1, samples, ...)``; arguments as of :class:`SynapticCurrent`."""
        return _leaky_sums(self.beta, current, steps)[-1:]


def _leaky_sums(kept: float, entering: Tensor, steps: int) -> Tensor:
    total, totals = torch.zeros_like(entering[0]), []
    for step in range(steps):
        total = kept * total + entering[step if len(entering) > 1 else 0]
        totals.append(total)
    return torch.stack(totals)
