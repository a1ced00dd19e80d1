"""Folding in float64: the folded populations must give the SNN's own currents and spikes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from torch import Tensor

from hardware.errors import RuleViolations
from pipeline.folding import READOUT, RealPopulation, RealSynapse, fold, merge_synapses
from pipeline.models.graph import INPUT, Layer, LayerGraph
from pipeline.models.spiking import SpikingNetwork
from pipeline.neurons import MIN_THRESHOLD
from pipeline.unrounded import current, run_unrounded
from tests.pipeline.random_networks import random_network, spiking_networks, zoo_network
from tests.pipeline.samples import NETWORKS, random_images, spiking_network

RATES = (0.005, 0.995)


@torch.no_grad()
def layer_by_layer(network: SpikingNetwork, codes: NDArray[np.uint8]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Currents that enter neurons and readout, and spikes, ``(steps or 1, samples, *shape)``, by the float64 SNN's
    own layers."""
    currents: dict[str, Tensor] = {}
    spikes: dict[str, Tensor] = {}

    def apply(layer: Layer, read: list[Tensor]) -> Tensor:
        after = network.advance(layer.name, read)
        if layer.kind == "spike":
            currents[layer.name], spikes[layer.name] = read[0], after
        return after

    images = (torch.from_numpy(codes).double() / 255).unsqueeze(0)
    currents[READOUT] = network.graph.evaluate(images, apply)  # type: ignore[arg-type]
    return currents, spikes


def require_the_same(network: SpikingNetwork, codes: NDArray[np.uint8]) -> dict[str, Tensor]:
    """Folded, a float64 SNN has the same currents to rounding and the very same spikes; they are returned."""
    currents, spikes = layer_by_layer(network, codes)
    populations = fold(network)
    assert [p.name for p in populations] == [*spikes, READOUT]
    activity = {INPUT: torch.from_numpy(codes).double()[None], **spikes}
    for population in populations:
        assert len({synapse.source for synapse in population.synapses}) == len(population.synapses)
        found = current(population, activity)
        assert found.shape[2:] == population.shape
        expected = currents[population.name]
        steps = max(len(found), len(expected))
        found, expected = found.expand(steps, *found.shape[1:]), expected.expand(steps, *expected.shape[1:])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    free, readout = run_unrounded(populations, codes, network.steps)
    for name, expected in spikes.items():
        assert np.array_equal(free[name], expected.transpose(0, 1).bool().numpy()), name
    np.testing.assert_allclose(readout, currents[READOUT].mean(0).numpy(), rtol=1e-9, atol=1e-9)
    return spikes


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_folded_populations_compute_what_the_network_computes(name: str, seed: int) -> None:
    network = spiking_network(name, seed).double()
    spikes = require_the_same(network, random_images(network.graph.input_shape, 6, seed))
    rates = [float(one.mean()) for one in spikes.values()]
    assert all(RATES[0] < rate < RATES[1] for rate in rates), rates


@settings(max_examples=120)
@given(spiking_networks())
def test_any_graph_folds(network: SpikingNetwork) -> None:
    """Kernels of 1 to 5, strides, padding beyond kernels, pools, shortcuts of all kinds, dense neurons, leaks."""
    require_the_same(network.double(), random_images(network.graph.input_shape, 3))


def test_graphs_drawn_at_random_are_of_all_kinds_and_spike() -> None:
    networks = [random_network(seed) for seed in range(60)]
    graphs = [{layer.kind for layer in network.graph.layers} for network in networks]
    for kind in ("normalize", "batch_norm", "avg_pool", "add", "scale"):
        assert 10 < sum(kind in kinds for kinds in graphs) < 60
    assert sum(len(p.synapses) > 1 for network in networks for p in fold(network)) > 20
    assert sum(len([p for p in fold(network) if reads_pixels(p)]) > 1 for network in networks) >= 3
    rates = [
        float(one.mean())
        for network in networks[:20]
        for one in layer_by_layer(network.double(), random_images(network.graph.input_shape, 3))[1].values()
    ]
    assert np.mean([0.01 < rate < 0.99 for rate in rates]) > 0.85


def reads_pixels(population: RealPopulation) -> bool:
    return any(synapse.source == INPUT for synapse in population.synapses)


@pytest.mark.parametrize(("beta", "subtract"), [(0.75, False), (1.0, True), (0.9, True)])
def test_leaks_and_resets_are_folded(beta: float, subtract: bool) -> None:
    network = zoo_network("resnet-20", 4, beta=beta, subtract=subtract).double()
    require_the_same(network, random_images(network.graph.input_shape, 4))
    spiking = fold(network)[:-1]
    assert {(p.beta, p.subtract) for p in spiking} == {(beta, subtract)}


def black(population: RealPopulation, shape: tuple[int, ...], code: int = 0) -> Tensor:
    """What enters a population, ``(*shape)``, of an image of one code."""
    return current(population, {INPUT: torch.full((1, 1, *shape), float(code), dtype=torch.float64)})[0, 0]


def test_a_black_image_has_another_current_at_the_border() -> None:
    """Zeros are padded after normalisation: there the padding is the mean, not black."""
    first = fold(spiking_network("conv", 0).double())[0]
    constant = first.synapses[0].constant
    assert constant is not None
    found = black(first, (1, 8, 8))
    taps, bias = torch.from_numpy(constant), torch.from_numpy(first.bias)
    torch.testing.assert_close(found[:, 4, 4], taps.sum((1, 2)) + bias)
    torch.testing.assert_close(found[:, 0, 4], taps[:, 1:].sum((1, 2)) + bias)
    torch.testing.assert_close(found[:, 7, 7], taps[:, :2, :2].sum((1, 2)) + bias)
    assert float((found[:, 0, 0] - found[:, 4, 4]).abs().min()) > 1e-3


def test_padding_that_meets_the_mean_is_invisible() -> None:
    """An image whose every pixel is the mean gives the bias alone, at the border as inside."""
    network = spiking_network("conv", 0).double()
    network.get_buffer("layers.normalize1.mean").fill_(51 / 255)
    first = fold(network)[0]
    found = black(first, (1, 8, 8), 51)
    torch.testing.assert_close(found, torch.from_numpy(first.bias).view(-1, 1, 1).expand_as(found))


def test_networks_without_normalisation_need_no_constant_part() -> None:
    synapses = [synapse for population in fold(spiking_network("plain conv")) for synapse in population.synapses]
    assert all(synapse.constant is None for synapse in synapses)


def test_shapes_sources_and_geometry() -> None:
    first, second, third, readout = fold(spiking_network("conv"))
    sources = [[synapse.source for synapse in p.synapses] for p in (first, second, third, readout)]
    assert sources == [["input"], [first.name], [second.name], [third.name]]
    assert (first.shape, second.shape, third.shape, readout.shape) == ((4, 8, 8), (6, 4, 4), (10,), (4,))
    (pooled,) = second.synapses
    assert (pooled.weight.shape, pooled.stride, pooled.padding) == ((6, 4, 6, 6), 2, 2)
    assert third.synapses[0].weight.shape == (10, 6 * 4 * 4)
    assert readout.threshold is None
    assert readout.name == "readout"


def test_sums_are_synapses_from_all_that_is_summed() -> None:
    """Post-activation blocks read two populations; what is never spiked on its way comes from ever more."""
    residual = fold(spiking_network("residual"))
    assert [len(p.synapses) for p in residual] == [1, 1, 2, 1, 2, 1]
    stem, _, after = residual[:3]
    identity = next(synapse for synapse in after.synapses if synapse.source == stem.name)
    assert identity.weight.shape == (3, 3, 1, 1)
    assert np.count_nonzero(identity.weight) == 3
    carried = fold(spiking_network("pre-activation"))
    assert [[s.source for s in p.synapses] for p in carried][:4] == [
        ["input"],
        [carried[0].name],
        ["input", carried[1].name],
        [carried[2].name],
    ]
    assert {synapse.source for synapse in carried[4].synapses} == {"input", carried[1].name, carried[3].name}


def test_synapses_of_different_reach_merge_about_the_same_pixel() -> None:
    rng = np.random.default_rng(0)
    first = RealSynapse("x", "conv", rng.normal(size=(2, 3, 3, 3)), None, 2, 1)
    second = RealSynapse("x", "conv", rng.normal(size=(2, 3, 2, 2)), rng.normal(size=(2, 2, 2)), 2, 0)
    merged = merge_synapses(first, second)
    assert merged is not None
    assert (merged.stride, merged.padding, merged.weight.shape) == (2, 1, (2, 3, 3, 3))
    assert np.array_equal(merged.weight[:, :, 0], first.weight[:, :, 0])
    assert np.array_equal(merged.weight[:, :, 1:, 1:], first.weight[:, :, 1:, 1:] + second.weight)
    assert merged.constant is not None
    assert not merged.constant[:, 0].any()
    assert np.array_equal(merged.constant[:, 1:, 1:], second.constant)


def test_a_source_read_on_two_grids_by_one_sum_is_refused() -> None:
    def conv(name: str, kernel: int, stride: int, source: str) -> Layer:
        sizes = {"in_channels": 1, "out_channels": 1, "kernel_size": kernel, "stride": stride, "padding": 0}
        return Layer(name, "conv", {**sizes, "bias": False}, inputs=(source,))

    neuron = {"beta": 1.0, "subtract": False}
    layers = (
        conv("stem", 1, 1, "input"),
        Layer("first", "spike", neuron),
        conv("slow", 3, 1, "first"),
        conv("fast", 1, 2, "first"),
        Layer("sum", "add", path="block.sum", inputs=("slow", "fast")),
        Layer("second", "spike", neuron),
        Layer("flat", "flatten"),
        Layer("out", "linear", {"in_features": 4, "out_features": 2, "bias": True}),
    )
    network = SpikingNetwork(LayerGraph((1, 4, 4), layers), 2)
    with pytest.raises(RuleViolations) as caught:
        fold(network)
    (row,) = caught.value.violations
    assert (row.object, row.actual) == ("block.sum", "strides 1 and 2 over first")


def test_thresholds_below_the_floor_are_folded_as_the_floor() -> None:
    network = spiking_network("features")
    with torch.no_grad():
        dict(network.neurons())["neurons1"].threshold.fill_(-1.0)
    assert fold(network)[0].threshold == MIN_THRESHOLD


def test_folding_changes_nothing_in_the_network() -> None:
    network = spiking_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    for population in fold(network):
        population.bias.fill(7.0)
        for synapse in population.synapses:
            synapse.weight.fill(7.0)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
