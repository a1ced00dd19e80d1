"""Convolutions of the differentiable twin: exact on integers forward, fast on small networks backward.

Backward through a stride s, the pixels fall into s**2 phases, each a convolution of stride 1 of the gradient with the
taps that meet it. All phases together are one convolution with s**2 times as many channels, whose result is
interleaved (Shi et al., sub-pixel convolution, CVPR 2016). Where s divides the kernel, as in networks whose pooling is
folded into the weights, that is no work more than a transposed convolution, in a form that processors do faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def exact_convolution(
    activity: Tensor, weight: Tensor, stride: int, padding: int, phases: Tensor | None = None
) -> Tensor:
    """Cross-correlation that only multiplies and adds, with gradients to ``activity`` alone.

    Fast algorithms (Winograd, FFT) transform with fractions and are not exact on integers. oneDNN on the CPU
    uses the direct one; NNPACK would not, and on a GPU it is a matrix product, for the choice is not ours.

    Args:
        activity: ``(rows, channels, height, width)``.
        weight: ``(outputs, channels, kernel height, kernel width)``.
        stride, padding: equal in both directions.
        phases: ``phase_weights`` of the weight, for the way back.
    """
    if activity.is_cuda:
        return unfolded_convolution(activity, weight, stride, padding)
    sums: Tensor = _Convolution.apply(activity, weight, phases, stride, padding)  # type: ignore[no-untyped-call]
    return sums


def unfolded_convolution(activity: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Cross-correlation as one matrix product over unfolded patches."""
    rows, _, height, _ = activity.shape
    columns = F.unfold(activity, weight.shape[2:], stride=stride, padding=padding)
    out_height = (height + 2 * padding - weight.shape[2]) // stride + 1
    sums: Tensor = weight.flatten(1) @ columns
    return sums.reshape(rows, len(weight), out_height, -1)


def phase_weights(weight: Tensor, stride: int) -> Tensor | None:
    """Weights of all phases of the way back, ``(stride**2 channels, outputs, taps, taps)``; phases are slowest.

    None where the stride is 1 or does not divide the kernel.
    """
    outputs, channels, height, width = weight.shape
    if stride == 1 or height % stride or width % stride:
        return None
    taps = weight.reshape(outputs, channels, height // stride, stride, width // stride, stride)
    by_phase = taps.flip(2, 4).permute(3, 5, 1, 0, 2, 4)
    return by_phase.flatten(0, 2).contiguous(memory_format=torch.channels_last)


class _Convolution(torch.autograd.Function):
    """A convolution whose weights need no gradient, and which therefore need not keep its input."""

    @staticmethod
    def forward(ctx: Any, activity: Tensor, weight: Tensor, phases: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(weight, phases)
        ctx.geometry, ctx.size = (stride, padding), activity.shape[2:]
        with torch.backends.nnpack.flags(enabled=False):
            return F.conv2d(activity, weight, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, phases = ctx.saved_tensors
        stride, padding = ctx.geometry
        kernel = weight.shape[2:]
        # Rows and columns at the far border that no kernel reaches.
        unread = [(n + 2 * padding - k) % stride for n, k in zip(ctx.size, kernel, strict=True)]
        if phases is None or padding >= min(kernel) or padding % stride < max(unread):
            back = F.conv_transpose2d(gradient, weight, None, stride, padding, unread)
        else:
            back = _interleaved(gradient, phases, stride, padding, ctx.size)
        return back, None, None, None, None


def _interleaved(gradient: Tensor, phases: Tensor, stride: int, padding: int, size: torch.Size) -> Tensor:
    """The transposed convolution, of ``size``, by its phases."""
    # Whole strides of padding are left out; of the rest, the first pixels are cut off.
    whole, rest = divmod(padding, stride)
    coarse = F.conv2d(gradient, phases, padding=[taps - 1 - whole for taps in phases.shape[2:]])
    rows, _, height, width = coarse.shape
    apart = coarse.movedim(1, -1).unflatten(3, (stride, stride, -1)).transpose(2, 3)
    fine = apart.reshape(rows, stride * height, stride * width, -1)
    back: Tensor = fine[:, rest : rest + size[0], rest : rest + size[1]].movedim(-1, 1)
    return back
