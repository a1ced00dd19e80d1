"""Which neurons a synapse connects: the geometry of a convolution, unfolded per source or per target position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardware.network import Shape, Synapse


@dataclass(frozen=True)
class Edges:
    """Edges of a synapse per source position, as a compressed list.

    A *position* is a pixel of the feature map; a population without pixels has one. Each edge of a position
    connects all channels there with all channels at a target position, through one *tap* of the kernel. A
    dense synapse is a kernel with as many taps as source positions and a single target position.

    Attributes:
        first: int64 ``(positions + 1,)``; edges ``first[p]:first[p + 1]`` leave position p.
        target: int64 target position per edge.
        tap: int64 tap per edge: kernel row * kernel width + column, or the source position when dense.
    """

    first: NDArray[np.int64]
    target: NDArray[np.int64]
    tap: NDArray[np.int64]

    @property
    def fan_out(self) -> NDArray[np.int64]:
        """Target positions each source position reaches."""
        return np.diff(self.first)


@dataclass(frozen=True)
class Windows:
    """What a synapse reads, per target position, as a compressed list of runs.

    With the channels of a position next to each other, a kernel row reads one run of source neurons, and its
    weights are a run, as long, of the rows of ``(taps * channels, outputs)``. Padding is in no run. A dense synapse
    is a kernel that covers the whole source.

    Attributes:
        first: int64 ``(target positions + 1,)``; runs ``first[t]:first[t + 1]`` are what position t reads.
        runs: int64 ``(runs, 3)``: the first source neuron in (position, channel) order, the first row of the
            weights, and how many of both.
    """

    first: NDArray[np.int64]
    runs: NDArray[np.int64]


def positions_and_channels(shape: Shape) -> tuple[int, int]:
    """Pixels and channels of a shape; ``(neurons,)`` is one pixel of many channels."""
    return (1, shape[0]) if len(shape) == 1 else (int(np.prod(shape[1:])), shape[0])


def edges(synapse: Synapse, source_shape: Shape) -> Edges:
    """Edges of ``synapse`` when it reads ``source_shape``; padding has no edges."""
    if synapse.kind == "dense":
        positions, _ = positions_and_channels(source_shape)
        return Edges(np.arange(positions + 1), np.zeros(positions, np.int64), np.arange(positions))
    height, width = source_shape[1:]
    _, out_height, out_width = synapse.output_shape(source_shape)
    kernel_height, kernel_width = synapse.weight.shape[2:]
    row, column, i, j = (axis.reshape(-1) for axis in np.indices((out_height, out_width, kernel_height, kernel_width)))
    source_row = row * synapse.stride + i - synapse.padding
    source_column = column * synapse.stride + j - synapse.padding
    inside = (source_row >= 0) & (source_row < height) & (source_column >= 0) & (source_column < width)
    source = (source_row * width + source_column)[inside]
    order = np.argsort(source, kind="stable")
    counts = np.bincount(source, minlength=height * width)
    return Edges(
        np.concatenate([[0], np.cumsum(counts)]),
        (row * out_width + column)[inside][order],
        (i * kernel_width + j)[inside][order],
    )


def windows(synapse: Synapse, source_shape: Shape, longest: int) -> Windows:
    """Windows of ``synapse`` when it reads ``source_shape``, in runs of at most ``longest`` neurons."""
    positions, channels = positions_and_channels(source_shape)
    if synapse.kind == "dense":
        return _split(np.array([0]), np.array([[0, 0, positions * channels]]), 1, longest)
    height, width = source_shape[1:]
    _, out_height, out_width = synapse.output_shape(source_shape)
    kernel_height, kernel_width = synapse.weight.shape[2:]
    target, tap_row = (axis.reshape(-1) for axis in np.indices((out_height * out_width, kernel_height)))
    source_row = target // out_width * synapse.stride + tap_row - synapse.padding
    left = target % out_width * synapse.stride - synapse.padding
    first_tap = np.maximum(0, -left)
    taps = np.minimum(kernel_width, width - left) - first_tap
    inside = (source_row >= 0) & (source_row < height) & (taps > 0)
    positions_read = np.stack([source_row * width + left + first_tap, tap_row * kernel_width + first_tap, taps], axis=1)
    return _split(target[inside], positions_read[inside] * channels, out_height * out_width, longest)


def _split(target: NDArray[np.int64], runs: NDArray[np.int64], targets: int, longest: int) -> Windows:
    """Windows of runs that each belong to a target, in ascending order, cut where they are too long."""
    pieces = -(-runs[:, 2] // longest)
    begin = longest * (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    source, row, length = np.repeat(runs, pieces, axis=0).T
    counts = np.bincount(np.repeat(target, pieces), minlength=targets)
    return Windows(
        np.concatenate([[0], np.cumsum(counts)]),
        np.stack([source + begin, row + begin, np.minimum(length - begin, longest)], axis=1),
    )
