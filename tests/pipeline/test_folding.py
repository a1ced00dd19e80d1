"""Folding in float64: the folded populations must give the SNN's own currents and spikes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.folding import RealPopulation, fold
from pipeline.models.spiking import SpikingNetwork
from pipeline.neurons import MIN_THRESHOLD
from tests.pipeline.samples import NETWORKS, random_images, spiking_network

Array = NDArray[np.float64]


def drive(population: RealPopulation, activity: Tensor) -> Tensor:
    """What a population's synapse, constant part and bias add in one step."""
    weight, bias = torch.from_numpy(population.weight), torch.from_numpy(population.bias)
    if population.kind == "dense":
        return F.linear(activity.flatten(1), weight, bias)
    stride, padding = population.stride, population.padding
    current = F.conv2d(activity, weight, bias, stride, padding)
    if population.constant is not None:
        ones = torch.ones(1, 1, *activity.shape[2:], dtype=torch.float64)
        current = current + F.conv2d(ones, torch.from_numpy(population.constant)[:, None], None, stride, padding)
    return current


def run_folded(populations: list[RealPopulation], codes: NDArray[np.uint8], steps: int) -> dict[str, Tensor]:
    """Membranes before reset of every population, ``(steps, samples, *shape)``; of the readout its currents."""
    activity = {"input": torch.from_numpy(codes).double()}
    v: dict[str, Tensor] = {}
    history: dict[str, list[Tensor]] = {population.name: [] for population in populations}
    for _ in range(steps):
        for population in populations:
            current = drive(population, activity[population.source])
            if population.threshold is None:
                history[population.name].append(current)
                continue
            u = v.get(population.name, torch.zeros_like(current)) + current
            spikes = u >= population.threshold
            v[population.name] = torch.where(spikes, 0.0, u)
            activity[population.name] = spikes.double()
            history[population.name].append(u)
    return {name: torch.stack(values) for name, values in history.items()}


def run_network(network: SpikingNetwork, codes: NDArray[np.uint8]) -> dict[str, Tensor]:
    """The same of the float SNN itself, by its own layers."""
    activity = (torch.from_numpy(codes).double() / 255).unsqueeze(0)
    found: dict[str, Tensor] = {}
    neurons = dict(network.neurons())
    for name, module in network.layers.items():
        if name in neurons:
            found[name] = neurons[name].membranes(activity, network.steps)
        activity = network.advance(module, activity)
    found["readout"] = activity.expand(network.steps, *activity.shape[1:])
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_folded_populations_compute_what_the_network_computes(name: str, seed: int) -> None:
    network = spiking_network(name, seed).double()
    codes = random_images(network.graph.input_shape, 6, seed)
    expected = run_network(network, codes)
    found = run_folded(fold(network), codes, network.steps)
    assert list(found) == list(expected)
    for population in expected:
        torch.testing.assert_close(found[population], expected[population], rtol=1e-10, atol=1e-10)
    rates = [
        float((expected[layer] >= neuron.effective_threshold).double().mean()) for layer, neuron in network.neurons()
    ]
    assert all(0.01 < rate < 0.99 for rate in rates), rates


@torch.no_grad()
def test_a_black_image_has_another_current_at_the_border() -> None:
    """Zeros are padded after normalisation: there the padding is the mean, not black."""
    network = spiking_network("conv", 0).double()
    first = fold(network)[0]
    assert first.constant is not None
    black = drive(first, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    taps = torch.from_numpy(first.constant)
    bias = torch.from_numpy(first.bias)
    torch.testing.assert_close(black[0, :, 4, 4], taps.sum((1, 2)) + bias)
    torch.testing.assert_close(black[0, :, 0, 4], taps[:, 1:].sum((1, 2)) + bias)
    torch.testing.assert_close(black[0, :, 7, 7], taps[:, :2, :2].sum((1, 2)) + bias)
    assert float((black[0, :, 0, 0] - black[0, :, 4, 4]).abs().min()) > 1e-3


@torch.no_grad()
def test_padding_that_meets_the_mean_is_invisible() -> None:
    """An image whose every pixel is the mean gives the bias alone, at the border as inside."""
    network = spiking_network("conv", 0).double()
    network.get_buffer("layers.normalize1.mean").fill_(51 / 255)
    first = fold(network)[0]
    current = drive(first, torch.full((1, 1, 8, 8), 51, dtype=torch.float64))
    torch.testing.assert_close(current, torch.from_numpy(first.bias).view(1, -1, 1, 1).expand_as(current))


def test_networks_without_normalisation_need_no_constant_part() -> None:
    assert all(population.constant is None for population in fold(spiking_network("plain conv")))


def test_shapes_sources_and_geometry() -> None:
    first, second, third, readout = fold(spiking_network("conv"))
    assert [first.source, second.source, third.source, readout.source] == ["input", first.name, second.name, third.name]
    assert (first.shape, second.shape, third.shape, readout.shape) == ((4, 8, 8), (6, 4, 4), (10,), (4,))
    assert (second.weight.shape, second.stride, second.padding) == ((6, 4, 6, 6), 2, 2)
    assert third.weight.shape == (10, 6 * 4 * 4)
    assert readout.threshold is None
    assert readout.name == "readout"


def test_thresholds_below_the_floor_are_folded_as_the_floor() -> None:
    network = spiking_network("features")
    with torch.no_grad():
        dict(network.neurons())["neurons1"].threshold.fill_(-1.0)
    assert fold(network)[0].threshold == MIN_THRESHOLD


def test_folding_changes_nothing_in_the_network() -> None:
    network = spiking_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fold(network)[0].weight.fill(7.0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
