from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hardware.emulator import run_emulator
from hardware.trace import PopulationTrace, Trace
from pipeline.fidelity.divergence import layer_rows, run_teacher_forced
from pipeline.models.spiking import LayerActivity
from pipeline.quantization import quantize
from tests.pipeline.samples import NETWORKS, random_images, spiking_network

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


def same(layers: dict[str, LayerActivity]) -> dict[str, NDArray[np.bool_]]:
    return {name: layer.spikes.numpy() for name, layer in layers.items()}


def test_equal_spikes_agree_fully() -> None:
    layers = activity()
    for row in layer_rows(layers, trace(layers, {}), same(layers)):
        assert row["spike_agreement"] == 1.0
        assert row["rate_error"] == 0.0
        assert row["first_divergence"] is None


def test_the_first_divergence_is_the_earliest_step_then_sample_then_neuron() -> None:
    layers = activity()
    flips = {"second": [(0, 3, 0), (2, 1, 4), (2, 1, 2), (1, 1, 3), (0, 2, 0)]}
    first, second = layer_rows(layers, trace(layers, flips), same(layers))
    assert first["first_divergence"] is None
    divergence = second["first_divergence"]
    assert (divergence["step"], divergence["sample"], divergence["neuron"]) == (1, 1, 3)
    expected = float(layers["second"].membranes[1, 1, 3]) - THRESHOLD
    assert divergence["margin"] == pytest.approx(expected)
    assert second["spike_agreement"] == pytest.approx(1 - 5 / 60)
    assert second["step_agreement"] == pytest.approx([1, 1 - 3 / 15, 1 - 1 / 15, 1 - 1 / 15])
    assert second["teacher_forced"]["spike_agreement"] == 1.0


def test_the_rate_error_is_over_steps_so_that_shifted_spikes_do_not_count() -> None:
    spikes = torch.zeros(SHAPE, dtype=torch.bool)
    spikes[:, 0] = True
    layers = {"first": LayerActivity(spikes, torch.zeros(SHAPE), THRESHOLD)}
    shifted = Trace(np.zeros((3, 2), np.int64), {"first": PopulationTrace(np.roll(spikes.numpy(), 1, axis=1), None)})
    (row,) = layer_rows(layers, shifted, same(layers))
    assert row["rate_error"] == 0.0
    assert row["spike_agreement"] == pytest.approx(0.5)
    (row,) = layer_rows(layers, trace(layers, {"first": [(0, 1, 0)]}), same(layers))
    assert row["rate_error"] == pytest.approx(1 / 4 / 15)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_integer_network_taught_by_itself_does_what_it_does_alone(name: str) -> None:
    reference = spiking_network(name, 2)
    codes = random_images(reference.graph.input_shape, 6, 2)
    network = quantize(reference, codes, 4, {}).network
    alone = run_emulator(network, codes, "spikes").populations
    spikes = {population: trace.spikes for population, trace in alone.items() if trace.spikes is not None}
    taught = run_teacher_forced(network, codes, spikes)
    assert taught.keys() == spikes.keys()
    for population, found in taught.items():
        assert np.array_equal(found, spikes[population])


def test_taught_layers_differ_by_their_own_making_alone() -> None:
    reference = spiking_network("conv", 2)
    codes = random_images(reference.graph.input_shape, 6, 2)
    network = quantize(reference, codes, 2, {}).network
    _, layers = reference.record(reference.images(codes))
    trace, forced = run_emulator(network, codes, "traces"), run_teacher_forced(network, codes, same(layers))
    first, *later = layer_rows(layers, trace, forced)
    assert first["spike_agreement"] == first["teacher_forced"]["spike_agreement"] < 1
    assert any(row["spike_agreement"] != row["teacher_forced"]["spike_agreement"] for row in later)
