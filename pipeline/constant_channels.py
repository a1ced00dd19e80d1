"""The constant part of what neurons read of an image, as constant input channels with kernels of their own.

Normalisation adds a constant, and because the network pads *after* normalising, that constant is missing where a kernel
hangs over the border: it differs from tap to tap, and no bias per channel can hold it. Nor can a chip's bias hold much
at all. A channel that holds a code everywhere can.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.network import INPUT
from pipeline.folding import RealSynapse
from pipeline.models.graph import PIXEL_LEVELS, Shape
from pipeline.number_formats import NumberFormat
from pipeline.rounding import InputStatistics, input_statistics, round_compensated

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class ConstantChannels:
    """Constant input channels as one synapse reads them; weight units.

    Attributes:
        kernel: with the geometry of the weights; multiples of the synapse's step.
        codes: that the channels hold; none if no channel is needed.
        smallest_codes: with which the kernels would still fit the weights' bits.
        bias: ``(out,)`` that is left.
        max_code: that a channel may hold.
        error: by rounding the kernels, per tap, ``(out, kernel, kernel)`` or ``(out, positions)``; what the bias makes
            up for is taken from the tap over the pixel itself.
    """

    kernel: Float64Array
    codes: tuple[int, ...]
    smallest_codes: tuple[int, ...]
    bias: Float64Array
    error: Float64Array
    max_code: int = PIXEL_LEVELS

    @property
    def room(self) -> float:
        """How many times larger the constant part could be before its codes do not suffice; below 1 they do not."""
        limits = self.codes if self.codes != self.smallest_codes else (self.max_code,) * len(self.codes)
        pairs = zip_longest(limits, self.smallest_codes, fillvalue=0)
        return min((max(limit, 0.5) / smallest for limit, smallest in pairs if smallest), default=np.inf)


def split_constant(
    synapse: RealSynapse,
    scale: float,
    step: int,
    numbers: NumberFormat,
    bias: Float64Array,
    input_shape: Shape,
    codes: tuple[int, ...] | None = None,
    max_code: int = PIXEL_LEVELS,
    outlasts_step: bool = False,
    compensated: bool = False,
) -> ConstantChannels:
    """The constant part of a synapse that reads pixels as constant input channels, and what is left for the bias.

    Each channel carries what those before it leave, to a multiple of its code and of the step. Where one tap meets
    every output position (the tap over the pixel itself), it carries the bias too, if a chip's bias has too few bits
    for it, and the bias takes its error back.

    Compensated, the errors of the other taps do not simply add up where all of them lie inside the image: taps are
    rounded so that the offset they make varies little from position to position, and the bias takes back its mean.

    Args:
        synapse: that reads pixels, in real units.
        scale: weight units per real unit.
        step: its weights are multiples of.
        numbers: its integers.
        bias: ``(out,)`` of the population, in weight units.
        input_shape: of one image.
        codes: of the network's channels; None to take the smallest that suit.
        max_code: of the network's input.
        outlasts_step: whether what enters through synapses is still there at later steps. Then no bias, which enters
            the membrane and is gone, can stand for it, and all of it goes through the channels.
        compensated: whether taps make up for each other's errors, if there is such a tap; else each is rounded to
            the nearest.
    """
    left = _constant_part(synapse, scale, len(bias), input_shape)
    max_bias = numbers.max_bias
    largest_bias = 0 if outlasts_step else max_bias
    is_needed = bool(left.any()) or (largest_bias is not None and np.abs(bias).max(initial=0) > largest_bias)
    anchor = _anchor(synapse)
    if anchor is not None and is_needed and largest_bias is not None:
        left[anchor] += bias
        bias = np.zeros_like(bias)
    is_joint = compensated and is_needed and anchor is not None and synapse.kind == "conv"
    presence = _presence(synapse, input_shape) if is_joint else None
    kernels, used, smallest_codes = [], [], []
    count = len(codes) if codes is not None else numbers.constant_channels if is_needed else 0
    for index in range(count):
        if codes is None and index and not _off_anchor(left, anchor).any():
            break
        smallest = max(1, int(np.ceil(np.abs(left).max() / (numbers.mantissas[1] * step)))) if is_needed else 0
        code = smallest if codes is None else codes[index]
        kernel = _round(left, code * step, numbers, presence) / code
        left = left - kernel * code
        kernels.append(kernel[:, None] if synapse.kind == "conv" else kernel)
        used.append(code)
        smallest_codes.append(smallest)
    if is_needed and not used:
        smallest_codes.append(1)
    if anchor is not None and not outlasts_step:
        taken_back = left[anchor] if presence is None else left.reshape(len(bias), -1) @ presence.mean
        bias = bias + taken_back
        left[anchor] -= taken_back
    shape = (len(bias), 0, *synapse.weight.shape[2:])
    kernel = np.concatenate(kernels, axis=1) if kernels else np.zeros(shape)
    return ConstantChannels(kernel, tuple(used), tuple(smallest_codes), bias, -left, max_code)


def shared_codes(readers: Iterable[ConstantChannels]) -> tuple[int, ...]:
    """Codes that suit all who read the same channels."""
    return tuple(max(codes) for codes in zip_longest(*(reader.smallest_codes for reader in readers), fillvalue=0))


def _constant_part(synapse: RealSynapse, scale: float, outputs: int, input_shape: Shape) -> Float64Array:
    """Per tap, in weight units; always a new array."""
    if synapse.constant is not None:
        return synapse.constant * scale
    taps = (int(np.prod(input_shape[1:])),) if synapse.kind == "dense" else synapse.weight.shape[2:]
    return np.zeros((outputs, *taps))


def _presence(synapse: RealSynapse, input_shape: Shape) -> InputStatistics:
    """Of the taps of a conv over its output positions: 1 inside the image, 0 over the border."""
    reader = replace(synapse, weight=synapse.weight[:, :1], constant=None)
    return input_statistics([reader], {INPUT: np.ones((1, 1, *input_shape[1:]))})


def _round(values: Float64Array, unit: int, numbers: NumberFormat, presence: InputStatistics | None) -> Float64Array:
    """Values per tap to multiples of a unit, each to the nearest, or all so that their errors cancel."""
    if presence is None:
        return np.rint(values / unit) * unit
    flat = values.reshape(len(values), -1)
    rounded, _ = round_compensated(flat, presence, *numbers.mantissas, np.full(flat.shape[1], float(unit)))
    return rounded.reshape(values.shape)


def _anchor(synapse: RealSynapse) -> tuple[Any, ...] | None:
    """Index of the tap that meets every output position, if there is one."""
    if synapse.kind == "dense":
        return slice(None), 0
    if synapse.weight.shape[2] < 2 * synapse.padding + 1:
        return None
    return slice(None), synapse.padding, synapse.padding


def _off_anchor(values: Float64Array, anchor: tuple[Any, ...] | None) -> Float64Array:
    others = values.copy()
    if anchor is not None:
        others[anchor] = 0
    return others
