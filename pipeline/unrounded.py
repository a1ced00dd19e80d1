"""Folded populations run in float64: the mapping without any rounding, or with rounded values put in by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hardware.network import INPUT
from pipeline.folding import RealPopulation, RealSynapse
from pipeline.models.layers import LeakyReadout, SynapticCurrent

CHUNK_BYTES = 2**26


def run_unrounded(
    populations: Sequence[RealPopulation], codes: NDArray[np.uint8], steps: int, *, timed: bool = False
) -> tuple[dict[str, NDArray[np.bool_]], NDArray[np.float64]]:
    """Run folded populations, in whatever units each of them is.

    Args:
        populations: in topological order, the readout last.
        codes: uint8 ``(samples, [steps,] *shape)``.
        steps: T.
        timed: whether codes change over time.

    Returns:
        Spikes ``(samples, steps, *shape)`` by spiking population, and the readout ``(samples, classes)``: the mean
        over the steps, or of one that leaks the last membrane.
    """
    largest = max(int(np.prod(population.shape)) for population in populations)
    group = max(1, CHUNK_BYTES // (8 * largest * steps))
    presented = codes.swapaxes(0, 1) if timed else codes[None]
    parts = [_run(populations, presented[:, start : start + group], steps) for start in range(0, len(codes), group)]
    spikes = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    return spikes, np.concatenate([part[1] for part in parts])


def _run(
    populations: Sequence[RealPopulation], codes: NDArray[np.uint8], steps: int
) -> tuple[dict[str, NDArray[np.bool_]], NDArray[np.float64]]:
    # Axes (steps or 1, samples, *shape): what is the same at every step is computed once.
    activity = {INPUT: torch.from_numpy(codes.astype(np.float64))}
    spikes: dict[str, NDArray[np.bool_]] = {}
    for population in populations:
        total = current(population, activity)
        if population.alpha:
            total = SynapticCurrent(population.alpha).sequence(total, steps)
        if population.threshold is None:
            if population.is_leaky:
                total = LeakyReadout(population.beta).sequence(total, steps)
            return spikes, total.mean(0).flatten(1).numpy()
        fired = _fire(population, total, steps)
        activity[population.name] = fired.double()
        spikes[population.name] = fired.transpose(0, 1).numpy()
    raise AssertionError("the last population is the readout")


def current(population: RealPopulation, activity: Mapping[str, Tensor]) -> Tensor:
    """What enters a population ``(steps or 1, samples, *shape)``, given what its sources did in that form."""
    bias = torch.from_numpy(population.bias)
    total = bias.reshape(*bias.shape, *([1] * (len(population.shape) - bias.ndim)))[None, None]
    for synapse in population.synapses:
        source = activity[synapse.source]
        entering = _propagate(synapse, source.flatten(0, 1))
        total = total + entering.reshape(*source.shape[:2], *entering.shape[1:])
    return total


def _propagate(synapse: RealSynapse, rows: Tensor) -> Tensor:
    weight = torch.from_numpy(synapse.weight)
    if synapse.kind == "dense":
        return F.linear(rows.flatten(1), weight)
    total = F.conv2d(rows, weight, None, synapse.stride, synapse.padding)
    if synapse.constant is not None:
        ones = rows.new_ones(1, 1, *rows.shape[2:])
        total += F.conv2d(ones, torch.from_numpy(synapse.constant)[:, None], None, synapse.stride, synapse.padding)
    return total


def _fire(population: RealPopulation, total: Tensor, steps: int) -> Tensor:
    assert population.threshold is not None
    spikes = torch.empty((steps, *total.shape[1:]), dtype=torch.bool)
    v = torch.zeros_like(total[0])
    for t in range(steps):
        v = population.beta * v + total[t if len(total) > 1 else 0]
        torch.ge(v, population.threshold, out=spikes[t])
        v = v - population.threshold * spikes[t] if population.subtract else v.masked_fill(spikes[t], 0.0)
    return spikes
