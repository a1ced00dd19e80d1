"""Rounding weights so that the errors cancel on real activity, not each weight for itself.

What a population feels of the rounding is the error of its weighted sums. Its mean is put right by the bias; the rest
is governed by the covariance of the inputs, so each weight in turn is rounded and those after it take over what they
can of its error (Frantar et al., GPTQ, ICLR 2023, after Hassibi & Stork, Optimal Brain Surgeon, 1993).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from pipeline.folding import RealPopulation

Float64Array = NDArray[np.float64]
DAMPING = 0.01
"""Share of the mean variance added to each input's, so that inputs that hardly vary do not absorb everything."""
MAX_INPUTS = 4096
"""Inputs per neuron up to which the covariance (its square) is worth keeping."""


@dataclass(frozen=True)
class InputStatistics:
    """First and second moments of what one neuron of a population reads.

    Attributes:
        mean: ``(inputs,)``, kernel taps in C order of (channel, row, column).
        covariance: ``(inputs, inputs)``.
    """

    mean: Float64Array
    covariance: Float64Array


def input_statistics(real: RealPopulation, activity: NDArray[np.generic]) -> InputStatistics:
    """Moments over all samples, and for a conv over all positions, padding included.

    Args:
        real: the population that reads.
        activity: of its source, ``(samples, *source_shape)``.
    """
    values = torch.from_numpy(np.ascontiguousarray(activity, dtype=np.float32))
    if real.kind == "conv":
        kernel = real.weight.shape[2]
        patches = F.unfold(values, kernel, padding=real.padding, stride=real.stride)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    else:
        rows = values.flatten(1)
    mean = rows.mean(0, dtype=torch.float64)
    centred = rows - mean.float()
    covariance = (centred.T @ centred).double() / max(len(rows), 1)
    return InputStatistics(mean.numpy(), covariance.numpy())


def round_compensated(
    weight: Float64Array, statistics: InputStatistics, low: int, high: int, step: int
) -> tuple[Float64Array, Float64Array]:
    """Round weights to multiples of ``step`` in ``step * [low, high]``.

    Args:
        weight: ``(out, inputs)`` in weight units.
        statistics: of the inputs.
        low, high: range of the mantissas.
        step: of the grid.

    Returns:
        The rounded weights, and per output the mean error of its sums, which the bias is to take back.
    """
    covariance = statistics.covariance.copy()
    damping = DAMPING * max(float(np.diag(covariance).mean()), 1e-12)
    covariance[np.diag_indices_from(covariance)] += damping
    # Row j of this upper factor says how the inputs after j can make up for an error at j.
    factor = np.linalg.cholesky(np.linalg.inv(covariance)).T
    remaining, rounded = weight.copy(), np.empty_like(weight)
    for j in range(weight.shape[1]):
        column = np.clip(np.rint(remaining[:, j] / step), low, high) * step
        error = (remaining[:, j] - column) / factor[j, j]
        remaining[:, j + 1 :] -= np.outer(error, factor[j, j + 1 :])
        rounded[:, j] = column
    return rounded, (rounded - weight) @ statistics.mean
