"""Rounding weights so that the errors cancel on real activity, not each weight for itself.

What a population feels of the rounding is the error of its weighted sums. Its mean is put right by the bias; the rest
is governed by the covariance of the inputs, so each weight in turn is rounded and those after it take over what they
can of its error (Frantar et al., GPTQ, ICLR 2023, after Hassibi & Stork, Optimal Brain Surgeon, 1993).

The inputs of all synapses of a population count as one row of inputs: a sum does not know where its parts come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hardware.network import INPUT
from pipeline.folding import RealSynapse

Float64Array = NDArray[np.float64]
DAMPING = 0.01
"""Share of the mean variance added to each input's, so that inputs that hardly vary do not absorb everything."""
MAX_INPUTS = 2304
"""Inputs per neuron up to which the covariance (its square) is worth keeping: a 3x3 kernel over 256 channels."""
BLOCK_INPUTS = 512
"""Beyond that, inputs of one synapse whose errors may cancel among themselves."""
PRODUCTS, VALUES = 3 * 10**10, 2**25
"""Multiplications spent on a covariance, and values read for it; more rows than they allow are sampled, but at least
four per input."""
PANEL = 32
"""Columns rounded before the rest of the matrix hears of their errors, all at once."""
CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class InputStatistics:
    """What the inputs of one neuron of a population are like.

    Attributes:
        mean: ``(inputs,)``, of all synapses one after the other, kernel taps in C order of (channel, row, column).
        factors: one ``(n, n)`` upper triangular matrix for each run of n inputs whose errors may cancel, see
            :func:`compensation_factor`.
    """

    mean: Float64Array
    factors: tuple[Float64Array, ...]


def compensation_factor(covariance: Float64Array, variances: Float64Array) -> Float64Array:
    """The upper triangular U with ``U^T U`` the inverse of the damped covariance; its row j says how the inputs
    after j can make up for an error at j.

    Args:
        covariance: ``(inputs, inputs)``.
        variances: per input, what its damping is a share of: the mean variance of its like.
    """
    damped = covariance.copy()
    damped[np.diag_indices_from(damped)] += DAMPING * np.maximum(variances, 1e-12)
    factor: Float64Array = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor


def input_statistics(
    synapses: Sequence[RealSynapse], activity: Mapping[str, NDArray[np.generic]], seed: int = 0, timed: bool = False
) -> InputStatistics:
    """Moments over samples, steps, and for a conv over positions, padding included.

    Args:
        synapses: all that enter one population, in the order in which their weights will be rounded.
        activity: by source: of the input ``(samples, *shape)``, of populations ``(samples, steps, *shape)``.
        seed: of the choice of rows, where there are more than are needed.
        timed: whether the input changes over time and has the form of a population's.
    """
    sizes = [synapse.weight[0].size for synapse in synapses]
    mean = np.empty(sum(sizes))
    factors = []
    first = 0
    for members in _blocks(synapses, sizes):
        block_mean, covariance, like = _moments(members, activity, seed, timed)
        variances = np.diag(covariance)
        mean_variances = np.bincount(like, variances) / np.bincount(like)
        factors.append(compensation_factor(covariance, mean_variances[like]))
        mean[first : first + len(block_mean)] = block_mean
        first += len(block_mean)
    return InputStatistics(mean, tuple(factors))


@dataclass(frozen=True)
class _Part:
    """Some of the inputs that a synapse gives."""

    synapse: RealSynapse
    inputs: slice


def _blocks(synapses: Sequence[RealSynapse], sizes: Sequence[int]) -> Iterator[list[_Part]]:
    """Runs of inputs that share one covariance: all of a population, or of a synapse, or parts of one."""
    if sum(sizes) <= MAX_INPUTS:
        yield [_Part(synapse, slice(0, size)) for synapse, size in zip(synapses, sizes, strict=True)]
        return
    for synapse, size in zip(synapses, sizes, strict=True):
        ends = [0, size] if size <= MAX_INPUTS else [*range(0, size, BLOCK_INPUTS), size]
        for start, stop in pairwise(ends):
            yield [_Part(synapse, slice(start, stop))]


def _moments(
    parts: Sequence[_Part], activity: Mapping[str, NDArray[np.generic]], seed: int, timed: bool
) -> tuple[Float64Array, Float64Array, NDArray[np.int64]]:
    """Mean ``(inputs,)``, covariance ``(inputs, inputs)``, and per input the number of the part it is of."""
    sizes = [part.inputs.stop - part.inputs.start for part in parts]
    inputs = sum(sizes)
    frames = _frames(parts, activity, timed)
    per_frame = len(_rows(parts, activity, frames[:1], timed))
    wanted = max(1, max(4 * inputs, min(PRODUCTS // inputs**2, VALUES // inputs)) // per_frame)
    if wanted < len(frames):
        chosen = np.random.default_rng(seed).choice(len(frames), wanted, replace=False)
        frames = frames[np.sort(chosen)]
    # What a neuron reads through one synapse lies within wider patches of its source.
    widest = max(part.synapse.weight[0].size for part in parts) + inputs
    group = max(1, CHUNK_BYTES // (4 * widest * per_frame))
    shift: Tensor | None = None
    total, products, count = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 0
    for start in range(0, len(frames), group):
        rows = _rows(parts, activity, frames[start : start + group], timed)
        # Moments are taken about a point near the mean, lest they cancel.
        shift = rows.mean(0) if shift is None else shift
        rows -= shift
        total = total + (rows.new_ones(len(rows)) @ rows).double()
        products = products + (rows.T @ rows).double()
        count += len(rows)
    assert shift is not None
    offset = (total / count).numpy()
    covariance = products.numpy() / count - np.outer(offset, offset)
    return shift.double().numpy() + offset, covariance, np.repeat(np.arange(len(parts)), sizes)


def _frames(parts: Sequence[_Part], activity: Mapping[str, NDArray[np.generic]], timed: bool) -> NDArray[np.int64]:
    """All (sample, step) that differ, ``(frames, 2)``."""
    moving = [part.synapse.source for part in parts if timed or part.synapse.source != INPUT]
    samples, steps = activity[moving[0]].shape[:2] if moving else (len(activity[INPUT]), 1)
    return np.stack(np.unravel_index(np.arange(samples * steps), (samples, steps)), 1)


def _rows(
    parts: Sequence[_Part], activity: Mapping[str, NDArray[np.generic]], frames: NDArray[np.int64], timed: bool
) -> Tensor:
    """What each neuron position reads in each frame: float32 ``(frames * positions, inputs)``."""
    read = []
    for part in parts:
        synapse, values = part.synapse, activity[part.synapse.source]
        held = synapse.source == INPUT and not timed
        chosen = values[frames[:, 0]] if held else values[frames[:, 0], frames[:, 1]]
        images = torch.from_numpy(np.ascontiguousarray(chosen, dtype=np.float32))
        if synapse.kind == "conv":
            patches = F.unfold(images, synapse.weight.shape[2], padding=synapse.padding, stride=synapse.stride)
            patches = patches[:, part.inputs]
            read.append(patches.transpose(1, 2).reshape(-1, patches.shape[1]))
        else:
            read.append(images.flatten(1)[:, part.inputs])
    return read[0] if len(read) == 1 else torch.cat(read, 1)


def round_compensated(
    weight: Float64Array, statistics: InputStatistics, low: int, high: int, steps: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Round weights to multiples ``low..high`` of their step.

    Args:
        weight: ``(out, inputs)`` in weight units.
        statistics: of the inputs.
        low, high: range of the mantissas.
        steps: of the grid, ``(inputs,)``.

    Returns:
        The rounded weights, and per output the mean error of its sums, which the bias is to take back.
    """
    # A copy, transposed: the weights of an input lie together.
    remaining = np.array(weight.T, order="C")
    first = 0
    for factor in statistics.factors:
        block = slice(first, first + len(factor))
        _round_block(remaining[block], factor, low, high, steps[block])
        first = block.stop
    rounded = np.ascontiguousarray(remaining.T)
    return rounded, rounded @ statistics.mean - weight @ statistics.mean


def _round_block(remaining: Float64Array, factor: Float64Array, low: int, high: int, steps: Float64Array) -> None:
    """Round weights ``(inputs, out)`` in place."""
    inputs = len(remaining)
    for start in range(0, inputs, PANEL):
        stop = min(start + PANEL, inputs)
        errors = np.empty((stop - start, remaining.shape[1]))
        for j in range(start, stop):
            kept = np.clip(np.rint(remaining[j] / steps[j]), low, high) * steps[j]
            error = (remaining[j] - kept) / factor[j, j]
            remaining[j + 1 : stop] -= np.outer(factor[j, j + 1 : stop], error)
            remaining[j], errors[j - start] = kept, error
        remaining[stop:] -= factor[start:stop, stop:].T @ errors
