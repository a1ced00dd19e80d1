from __future__ import annotations

import numpy as np
import pytest
import torch

from hardware.trace import PopulationTrace, Trace
from pipeline.fidelity.divergence import layer_rows
from pipeline.models.spiking import LayerActivity

SHAPE = (3, 4, 5)
THRESHOLD = 0.5


def activity(seed: int = 0) -> dict[str, LayerActivity]:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in ("first", "second"):
        membranes = torch.rand(SHAPE, generator=generator)
        layers[name] = LayerActivity(membranes >= THRESHOLD, membranes, THRESHOLD)
    return layers


def trace(layers: dict[str, LayerActivity], flipped: dict[str, list[tuple[int, int, int]]]) -> Trace:
    populations = {}
    for name, layer in layers.items():
        spikes = layer.spikes.numpy().copy()
        for place in flipped.get(name, []):
            spikes[place] = ~spikes[place]
        populations[name] = PopulationTrace(spikes, None)
    return Trace(np.zeros((3, 2), np.int64), populations)


def test_equal_spikes_agree_fully() -> None:
    layers = activity()
    for row in layer_rows(layers, trace(layers, {})):
        assert row["spike_agreement"] == 1.0
        assert row["rate_error"] == 0.0
        assert row["first_divergence"] is None


def test_the_first_divergence_is_the_earliest_step_then_sample_then_neuron() -> None:
    layers = activity()
    flips = {"second": [(0, 3, 0), (2, 1, 4), (2, 1, 2), (1, 1, 3), (0, 2, 0)]}
    first, second = layer_rows(layers, trace(layers, flips))
    assert first["first_divergence"] is None
    divergence = second["first_divergence"]
    assert (divergence["step"], divergence["sample"], divergence["neuron"]) == (1, 1, 3)
    expected = float(layers["second"].membranes[1, 1, 3]) - THRESHOLD
    assert divergence["margin"] == pytest.approx(expected)
    assert second["spike_agreement"] == pytest.approx(1 - 5 / 60)


def test_the_rate_error_is_over_steps_so_that_shifted_spikes_do_not_count() -> None:
    spikes = torch.zeros(SHAPE, dtype=torch.bool)
    spikes[:, 0] = True
    layers = {"first": LayerActivity(spikes, torch.zeros(SHAPE), THRESHOLD)}
    shifted = Trace(np.zeros((3, 2), np.int64), {"first": PopulationTrace(np.roll(spikes.numpy(), 1, axis=1), None)})
    (row,) = layer_rows(layers, shifted)
    assert row["rate_error"] == 0.0
    assert row["spike_agreement"] == pytest.approx(0.5)
    (row,) = layer_rows(layers, trace(layers, {"first": [(0, 1, 0)]}))
    assert row["rate_error"] == pytest.approx(1 / 4 / 15)
