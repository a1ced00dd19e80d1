"""What flows along the edges of a NIR graph, as sums of synapses between populations, in float64.

Between neurons everything is linear, so a node that has no neurons only changes weights. Where its geometry is not one
that a convolution here can have, its matrix is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from hardware.formats.nir_graph import NirNode
from pipeline.folding import (
    RealSynapse,
    fold_pooling_into_conv,
    fold_pooling_into_dense,
    merge_synapses,
    sum_of,
)
from pipeline.models.graph import Shape

Float64Array = NDArray[np.float64]
MAX_MATRIX = 2**25
"""Weights of a matrix that is written out."""


class Misfit(Exception):  # control flow inside this package, never seen by users
    """A node that cannot be deployed: the rule it breaks, what it has, what is allowed, the way out."""

    def __init__(self, rule: str, actual: object, limit: str, remedy: str) -> None:
        super().__init__(rule)
        self.row = (rule, str(actual), limit, remedy)


@dataclass(frozen=True)
class Activity:
    """Spikes of a population, or the input, perhaps pooled, scaled and flattened.

    Attributes:
        source: name of the population, or "input".
        base: shape of its neurons: an image's, or ``(neurons,)``.
        shape: of the value, as the next node sees it.
        pooling: side of the square windows that are averaged; 1 for none.
        gain: factor, ``()`` or one per channel of the base.
    """

    source: str
    base: Shape
    shape: Shape
    pooling: int = 1
    gain: Float64Array | None = None

    @property
    def is_image(self) -> bool:
        """Whether it still has the axes of its image, so that a convolution can read it."""
        channels, *sides = self.base
        return len(self.base) == 3 and self.shape == (channels, *(side // self.pooling for side in sides))

    def gains(self) -> Float64Array:
        """One per channel."""
        return np.broadcast_to(np.ones(1) if self.gain is None else self.gain, self.base[:1])


@dataclass(frozen=True)
class Current:
    """A sum of synapses, one per source, and a bias.

    Attributes:
        synapses: all convolutions, or all dense.
        bias: one per channel of convolutions, one per neuron of dense synapses.
        shape: of the value, as the next node sees it.
        bases: shapes of the sources, by name.
    """

    synapses: tuple[RealSynapse, ...]
    bias: Float64Array
    shape: Shape
    bases: dict[str, Shape]

    @property
    def is_image(self) -> bool:
        """Whether its synapses are convolutions."""
        return self.synapses[0].kind == "conv"

    def scaled(self, factor: Float64Array) -> Current:
        """Multiplied by a factor per entry of the bias."""
        synapses = tuple(synapse.scaled(factor) for synapse in self.synapses)
        return replace(self, synapses=synapses, bias=self.bias * factor)

    def written_out(self) -> Current:
        """The same with dense synapses."""
        if not self.is_image:
            return self
        size = int(np.prod(self.shape))
        synapses = []
        for synapse in self.synapses:
            base = self.bases[synapse.source]
            synapses.append(RealSynapse(synapse.source, "dense", _matrix(base, size, partial(_convolve, synapse))))
        bias = np.repeat(self.bias, size // len(self.bias))
        return replace(self, synapses=tuple(synapses), bias=bias)


Signal = Activity | Current


def as_current(signal: Signal) -> Current:
    """Spikes that enter neurons directly do so through synapses that change nothing."""
    if isinstance(signal, Current):
        return signal
    gains = signal.gains()
    if signal.is_image:
        weight = fold_pooling_into_conv(np.diag(gains)[:, :, None, None], signal.pooling)
        synapse = RealSynapse(signal.source, "conv", weight, None, signal.pooling)
        return Current((synapse,), np.zeros(len(gains)), signal.shape, {signal.source: signal.base})
    size = int(np.prod(signal.shape))
    _require_small(size * int(np.prod(signal.base)))
    return weighted(signal, np.eye(size), np.zeros(size), signal.shape)


def weighted(signal: Activity, weight: Float64Array, bias: Float64Array, shape: Shape) -> Current:
    """A matrix ``(out, in)`` on all of an activity, in C order of its shape."""
    folded = fold_pooling_into_dense(weight, signal.base, signal.pooling)
    gains = np.repeat(signal.gains(), int(np.prod(signal.base[1:])))
    synapse = RealSynapse(signal.source, "dense", folded * gains)
    return Current((synapse,), bias, shape, {signal.source: signal.base})


def convolved(signal: Activity, node: NirNode) -> Current:
    """A ``Conv1d`` or ``Conv2d`` node on an activity."""
    weight, bias = node.numbers["weight"], node.numbers["bias"]
    sides = weight.ndim - 2
    expected = {"Conv1d": 1, "Conv2d": 2}[node.kind]
    if sides != expected or bias.shape != weight.shape[:1]:
        raise Misfit("weight and bias fit", f"{weight.shape}, bias {bias.shape}", f"{expected + 2} axes", "check it")
    stride, dilation = (np.broadcast_to(node.numbers[key], sides).tolist() for key in ("stride", "dilation"))
    groups = int(node.numbers["groups"][0])
    image: Shape = signal.shape if len(signal.shape) == sides + 1 else (1, *signal.shape)
    if len(image) != sides + 1 or image[0] != weight.shape[1] * groups or len(weight) % groups:
        raise Misfit("shape fits the node before it", signal.shape, f"({weight.shape[1] * groups}, …)", "check sizes")
    padding = _padding(node, weight.shape[2:], stride, dilation)
    effective = [(kernel - 1) * step + 1 for kernel, step in zip(weight.shape[2:], dilation, strict=True)]
    outputs = [
        (side + sum(pair) - kernel) // step + 1
        for side, pair, kernel, step in zip(image[1:], padding, effective, stride, strict=True)
    ]
    if min(outputs) < 1:
        raise Misfit("kernel fits the padded input", effective, f"within {image[1:]}", "check sizes")
    shape = (len(weight), *outputs)
    dense_kernel = _without_dilation(_without_groups(weight, groups), dilation)
    square = _square(dense_kernel, padding) if sides == 2 and len(set(stride)) == 1 and signal.is_image else None
    if square is not None:
        kernel, margin = square
        pooled = fold_pooling_into_conv(kernel * signal.gains()[None, :, None, None], signal.pooling)
        synapse = RealSynapse(signal.source, "conv", pooled, None, stride[0] * signal.pooling, margin * signal.pooling)
        return Current((synapse,), bias, shape, {signal.source: signal.base})

    def convolve(images: torch.Tensor) -> torch.Tensor:
        padded = F.pad(images, [side for pair in reversed(padding) for side in pair])
        operation = F.conv1d if sides == 1 else F.conv2d
        answer: torch.Tensor = operation(padded, torch.from_numpy(dense_kernel), None, stride)
        return answer

    matrix = _matrix(image, int(np.prod(shape)), convolve)
    return weighted(signal, matrix, np.repeat(bias, int(np.prod(outputs))), shape)


def pooled(signal: Signal, node: NirNode) -> Signal:
    """An ``AvgPool2d`` or ``SumPool2d`` node, of windows that lie side by side."""
    sizes = {*np.broadcast_to(node.numbers["kernel_size"], 2).tolist(), *node.numbers["stride"].tolist()}
    if len(sizes) != 1:
        remedy = "pool by squares side by side, or use a convolution"
        raise Misfit("windows are square and lie side by side", sorted(sizes), "kernel = stride", remedy)
    if not isinstance(node.numbers["padding"], str) and node.numbers["padding"].any():
        raise Misfit("pooling does not pad", node.numbers["padding"], "0", "pad in a convolution")
    side = int(sizes.pop())
    factor = 1.0 if node.kind == "AvgPool2d" else float(side**2)
    if len(signal.shape) != 3 or not signal.is_image:
        raise Misfit("pooling reads an image", signal.shape, "(channels, height, width)", "pool before flattening")
    channels, height, width = signal.shape
    shape = (channels, height // side, width // side)
    if min(shape) < 1:
        raise Misfit("window fits the input", side, f"within {signal.shape}", "check sizes")
    if isinstance(signal, Activity):
        if height % side or width % side:
            raise Misfit("windows cover the input", f"{side} over {signal.shape}", "no rest", "crop or pad the input")
        gain = factor * (np.ones(()) if signal.gain is None else signal.gain)
        return replace(signal, shape=shape, pooling=signal.pooling * side, gain=gain)
    synapses = tuple(_pool_after(synapse, side, factor) for synapse in signal.synapses)
    return replace(signal, synapses=synapses, bias=signal.bias * factor, shape=shape)


def multiplied(signal: Signal, factor: Float64Array) -> Signal:
    """A ``Scale`` node: one factor, or one for each value."""
    try:
        full = np.broadcast_to(factor, signal.shape)
    except ValueError:
        raise Misfit("factors fit the input", factor.shape, str(signal.shape), "check sizes") from None
    if isinstance(signal, Current):
        return signal.scaled(per_row(signal, full))
    if np.ptp(full) == 0:
        gains = full.reshape(-1)[:1].reshape(())
    elif signal.is_image or signal.shape == signal.base:
        flat = full.reshape(len(full), -1)
        if np.ptp(flat, axis=1).any():
            raise Misfit("one factor per channel", "several", "one", "put them into the weights after it")
        gains = flat[:, 0]
    else:
        raise Misfit("one factor per channel", "of a flattened image", "one for all", "put them into the weights")
    return replace(signal, gain=gains * (np.ones(()) if signal.gain is None else signal.gain))


def per_row(current: Current, values: Float64Array, what: str = "factor") -> Float64Array:
    """Values of a current's shape as one per entry of its bias."""
    flat = np.broadcast_to(values, current.shape).reshape(len(current.bias), -1)
    if np.ptp(flat, axis=1).any():
        raise Misfit(f"one {what} per channel", "differs within a channel", "equal", "use one per channel")
    return flat[:, 0]


def added(terms: Sequence[Signal]) -> Signal:
    """The sum of all that enters a node."""
    if len(terms) == 1:
        return terms[0]
    currents = [as_current(term) for term in terms]
    if len({current.shape for current in currents}) > 1:
        raise Misfit("what adds up has one shape", [one.shape for one in currents], "equal shapes", "check sizes")
    if len({current.is_image for current in currents}) > 1:
        currents = [current.written_out() for current in currents]
    merged = _merged(currents) or _merged([current.written_out() for current in currents])
    assert merged is not None
    return merged


def _merged(currents: Sequence[Current]) -> Current | None:
    """None if convolutions of one source have different strides."""
    by_source: dict[str, RealSynapse] = {}
    for synapse in (synapse for current in currents for synapse in current.synapses):
        known = by_source.get(synapse.source)
        one = synapse if known is None else merge_synapses(known, synapse)
        if one is None:
            return None
        by_source[synapse.source] = one
    bases = {name: base for current in currents for name, base in current.bases.items()}
    return Current(tuple(by_source.values()), sum_of(one.bias for one in currents), currents[0].shape, bases)


def _padding(node: NirNode, kernel: Shape, stride: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after, per axis."""
    given = node.numbers["padding"]
    if not isinstance(given, str):
        return [(side, side) for side in np.broadcast_to(given, len(kernel)).tolist()]
    if given == "valid":
        return [(0, 0)] * len(kernel)
    if any(step != 1 for step in stride):
        raise Misfit("padding 'same' goes with stride 1", stride, "1", "write the padding as a number")
    totals = [(size - 1) * step for size, step in zip(kernel, dilation, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _without_groups(weight: Float64Array, groups: int) -> Float64Array:
    """The kernel over all channels, zero between groups."""
    if groups == 1:
        return weight
    outputs, inputs = len(weight) // groups, weight.shape[1]
    _require_small(weight.size * groups)
    full = np.zeros((len(weight), inputs * groups, *weight.shape[2:]))
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        full[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    return full


def _without_dilation(weight: Float64Array, dilation: Sequence[int]) -> Float64Array:
    """The kernel with the zeros that lie between its taps."""
    sizes = [(kernel - 1) * step + 1 for kernel, step in zip(weight.shape[2:], dilation, strict=True)]
    _require_small(weight.shape[0] * weight.shape[1] * int(np.prod(sizes)))
    full = np.zeros((*weight.shape[:2], *sizes))
    full[(slice(None), slice(None), *(slice(None, None, step) for step in dilation))] = weight
    return full


def _square(weight: Float64Array, padding: Sequence[tuple[int, int]]) -> tuple[Float64Array, int] | None:
    """The kernel with a border of zeros that makes it square and padded alike on all sides, and that padding."""
    margin = max(side for pair in padding for side in pair)
    extra = [tuple(margin - side for side in pair) for pair in padding]
    kernel = np.pad(weight, ((0, 0), (0, 0), *extra))
    return (kernel, margin) if kernel.shape[2] == kernel.shape[3] else None


def _pool_after(synapse: RealSynapse, side: int, factor: float) -> RealSynapse:
    """A convolution whose outputs are averaged over windows is one with a wider kernel."""
    kernel, stride = synapse.weight.shape[2], synapse.stride
    wide = np.zeros((*synapse.weight.shape[:2], *[kernel + (side - 1) * stride] * 2))
    for row in range(side):
        for column in range(side):
            top, left = row * stride, column * stride
            wide[:, :, top : top + kernel, left : left + kernel] += synapse.weight
    return replace(synapse, weight=wide * factor / side**2, stride=stride * side)


def _matrix(image: Shape, outputs: int, operation: Callable[[torch.Tensor], torch.Tensor]) -> Float64Array:
    """The matrix ``(out, in)`` of a linear operation on images."""
    inputs = int(np.prod(image))
    _require_small(inputs * outputs)
    columns = operation(torch.eye(inputs, dtype=torch.float64).reshape(inputs, *image))
    matrix: Float64Array = columns.reshape(inputs, outputs).T.numpy()
    return np.ascontiguousarray(matrix)


def _convolve(synapse: RealSynapse, images: torch.Tensor) -> torch.Tensor:
    return F.conv2d(images, torch.from_numpy(synapse.weight), None, synapse.stride, synapse.padding)


def _require_small(weights: int) -> None:
    if weights > MAX_MATRIX:
        remedy = "use square convolutions of equal stride and padding, without groups"
        raise Misfit("matrix that is written out is small", f"{weights:,} weights", f"{MAX_MATRIX:,}", remedy)
