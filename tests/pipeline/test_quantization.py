"""The quantiser as a whole: what it gives fits the target, keeps to its bits, agrees, and says how it came about."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hardware.bounds import require_no_wrap
from hardware.emulator import run_emulator
from hardware.errors import RuleViolations
from hardware.network import INPUT, IntegerNetwork
from hardware.targets.loihi2 import LOIHI2, check
from pipeline.attacks.targets import to_images
from pipeline.attribution import EVERYTHING, HYBRIDS, relative_error
from pipeline.folding import RealPopulation, fold
from pipeline.integer_recipe import Grid, round_population
from pipeline.models.spiking import SpikingNetwork
from pipeline.number_formats import target_format
from pipeline.quantization import (
    MAX_BITS,
    MIN_BITS,
    Quantization,
    bits_by_population,
    fitting_grids,
    headroom,
    quantize,
)
from tests.pipeline.random_networks import zoo_network
from tests.pipeline.samples import NETWORKS, random_images, spiking_network

CALIBRATION = 24


def quantized(name: str, bits: int = 8, seed: int = 0) -> tuple[SpikingNetwork, Quantization]:
    network = spiking_network(name, seed)
    codes = random_images(network.graph.input_shape, CALIBRATION, seed)
    return network, quantize(network, codes, bits, {"seed": seed})


def spikes_of(network: IntegerNetwork, codes: NDArray[np.uint8]) -> dict[str, NDArray[np.bool_]]:
    populations = run_emulator(network, codes, "spikes").populations
    return {name: one.spikes for name, one in populations.items() if one.spikes is not None}


def disagreement(network: SpikingNetwork, deployed: IntegerNetwork, codes: NDArray[np.uint8]) -> dict[str, float]:
    """Share of spikes that differ, by population."""
    _, activity = network.record(to_images(codes))
    found = spikes_of(deployed, codes)
    return {name: float((found[name] ^ layer.spikes.numpy()).mean()) for name, layer in activity.items()}


def require_consistent(network: SpikingNetwork, result: Quantization, codes: NDArray[np.uint8], bits: int) -> None:
    """The integer network fits the target, and choices and attribution tell of that very network."""
    deployed = result.network
    assert check(deployed, LOIHI2) == []
    require_no_wrap(deployed)
    assert deployed.steps == network.steps
    assert [choice.population for choice in result.choices] == [p.name for p in deployed.populations]
    everything = result.attribution[-1]
    assert everything.rounded == EVERYTHING
    assert everything.disagreement == disagreement(network, deployed, codes)
    logits = network.record(to_images(codes))[0].double().numpy()
    found = deployed.logits(run_emulator(deployed, codes).readouts)
    assert everything.logit_error == relative_error(found, logits)
    assert everything.argmax_flips == (found.argmax(1) != logits.argmax(1)).sum()
    assert everything.samples == len(codes)
    for choice in result.choices:
        incoming = deployed.incoming(choice.population)
        assert choice.scale == deployed.by_name[choice.population].scale
        assert choice.bits == bits
        assert {s.source: s.exponent for s in incoming} == choice.exponents
        assert {s.bits for s in incoming} == {bits}
        assert choice.disagreement == everything.disagreement.get(choice.population, everything.logit_error)
        for synapse in incoming:
            mantissa = synapse.weight >> synapse.exponent
            assert np.array_equal(mantissa << synapse.exponent, synapse.weight)
            assert -(2 ** (bits - 1)) <= mantissa.min() <= mantissa.max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("name", NETWORKS)
def test_at_8_bits_the_network_fits_the_target_and_all_that_is_said_of_it_is_true(name: str) -> None:
    network, result = quantized(name)
    require_consistent(network, result, random_images(network.graph.input_shape, CALIBRATION, 0), 8)
    assert result.network.provenance == {"seed": 0}
    assert [row.rounded for row in result.attribution][:2] == ["nothing", "weights"]
    assert all(value < 0.06 for value in result.attribution[-1].disagreement.values())


@pytest.mark.parametrize(("name", "bits"), [("vgg11-tiny", 6), ("wrn-16-4", 8), ("resnet-20", 4)])
def test_networks_of_the_zoo_fit_the_target(name: str, bits: int) -> None:
    network = zoo_network(name, 1)
    codes = random_images(network.graph.input_shape, 4, 3)
    result = quantize(network, codes, bits, {})
    require_consistent(network, result, codes, bits)
    first = result.choices[0]
    # The first population hears the float network's own pixels, the last the consequences of all flips before it.
    assert first.disagreement < 2.0 ** (3 - bits)
    assert all(choice.disagreement < 0.6 for choice in result.choices[1:-1])


@pytest.mark.parametrize("bits", range(MIN_BITS, MAX_BITS + 1))
@pytest.mark.parametrize("name", ["plain conv", "residual"])
def test_weights_keep_to_their_bits_and_use_them(name: str, bits: int) -> None:
    network, result = quantized(name, bits)
    require_consistent(network, result, random_images(network.graph.input_shape, CALIBRATION, 0), bits)
    finest = {choice.population: min(choice.exponents.values()) for choice in result.choices}
    for synapse in result.network.synapses:
        if len(result.network.incoming(synapse.target)) == 1:
            assert np.abs(synapse.weight >> synapse.exponent).max() >= 2 ** (bits - 2) - 1
        assert synapse.exponent >= finest[synapse.target]


def test_populations_may_have_bits_of_their_own() -> None:
    network = spiking_network("residual")
    names = [population.name for population in fold(network)]
    widths = {name: 2 + index % 7 for index, name in enumerate(names)}
    result = quantize(network, random_images((1, 6, 6), 8), widths, {})
    assert {choice.population: choice.bits for choice in result.choices} == widths
    assert {(s.target, s.bits) for s in result.network.synapses} == set(widths.items())
    assert check(result.network, LOIHI2) == []


def test_everything_that_is_wrong_with_bits_is_told_at_once() -> None:
    populations = fold(spiking_network("dense"))
    assert bits_by_population(populations, 5) == {"neurons1": 5, "neurons2": 5, "readout": 5}
    with pytest.raises(RuleViolations) as caught:
        bits_by_population(populations, {"neurons1": 9, "readuot": 8, "readout": 1})
    found = [(row.object, row.rule, row.actual) for row in caught.value.violations]
    assert found == [
        ("neurons2", "every population has its bits", "none"),
        ("readuot", "bits are of a population", "readuot"),
        ("neurons1", "weights have 2 to 8 bits", "9"),
        ("readout", "weights have 2 to 8 bits", "1"),
    ]
    assert all("neurons1, neurons2, readout" in row.remedy for row in caught.value.violations[:2])


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_bits_out_of_range_are_refused_for_every_population(bits: int) -> None:
    with pytest.raises(RuleViolations) as caught:
        quantize(spiking_network("dense"), random_images((2, 3, 3), 4), bits, {})
    assert [row.object for row in caught.value.violations] == ["neurons1", "neurons2", "readout"]


@pytest.mark.parametrize("name", ["conv", "residual", "pre-activation"])
def test_more_bits_agree_better(name: str) -> None:
    network = spiking_network(name)
    codes = random_images(network.graph.input_shape, 40, seed=9)
    found = [
        float(np.mean(list(disagreement(network, quantized(name, bits)[1].network, codes).values())))
        for bits in (2, 4, 8)
    ]
    assert found[0] > 1.5 * found[1] > 3 * found[2]
    assert found[2] < 0.04


@pytest.mark.parametrize("name", ["conv", "residual", "pre-activation"])
def test_logits_in_real_units_are_close_to_the_float_models(name: str) -> None:
    network, result = quantized(name)
    codes = random_images(network.graph.input_shape, 40, seed=9)
    deployed = result.network.logits(run_emulator(result.network, codes).readouts)
    with torch.no_grad():
        trained = network(to_images(codes)).double().numpy()
    # Of the spread over images and classes, not of the logits' size.
    assert np.sqrt(np.mean((deployed - trained) ** 2)) < 0.2 * trained.std()


@pytest.mark.parametrize("name", ["conv", "residual"])
def test_quantising_changes_nothing_in_the_float_network_and_is_repeatable(name: str) -> None:
    network = spiking_network(name).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    codes = random_images(network.graph.input_shape, 8)
    first, second = quantize(network, codes, 8, {}), quantize(network, codes, 8, {})
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert first.choices == second.choices
    assert first.attribution == second.attribution
    pairs = zip(first.network.synapses, second.network.synapses, strict=True)
    assert all(np.array_equal(one.weight, other.weight) for one, other in pairs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    network = spiking_network()
    with torch.no_grad():
        network.get_parameter("layers.conv2.weight")[0, 0, 0, 0] = value
        network.get_parameter("layers.linear2.bias")[1] = value
    with pytest.raises(RuleViolations) as caught:
        quantize(network, random_images((1, 8, 8), 4), 8, {})
    assert [row.object for row in caught.value.violations] == ["neurons2", "readout"]


@pytest.mark.parametrize(("name", "loud"), [("dense", "neurons1"), ("residual", "neurons3")])
def test_a_network_that_fits_at_no_scale_is_refused_with_its_population(name: str, loud: str) -> None:
    network = spiking_network(name)
    with torch.no_grad():
        dict(network.neurons())[loud].threshold.fill_(1e9)
    with pytest.raises(RuleViolations) as caught:
        quantize(network, random_images(network.graph.input_shape, 4), 8, {})
    assert {row.object for row in caught.value.violations} == {loud}
    assert all(re.search("17 bits", row.rule) for row in caught.value.violations)


@pytest.mark.parametrize("layer", ["linear1", "linear2", "linear3"])
def test_a_silent_layer_is_still_a_network(layer: str) -> None:
    """All weights zero: nothing to scale, nothing to refuse."""
    network = spiking_network("dense")
    with torch.no_grad():
        network.get_parameter(f"layers.{layer}.weight").zero_()
    result = quantize(network, random_images((2, 3, 3), 4), 8, {})
    assert check(result.network, LOIHI2) == []


def test_one_image_is_enough() -> None:
    network = spiking_network("residual")
    result = quantize(network, random_images((1, 6, 6), 1), 8, {})
    assert check(result.network, LOIHI2) == []
    assert {row.samples for row in result.attribution} == {1}


@pytest.mark.parametrize(("beta", "subtract"), [(0.9, False), (1.0, True), (0.75, True)])
def test_leaks_and_subtracting_resets_are_quantised(beta: float, subtract: bool) -> None:
    network = zoo_network("digits-cnn", 2, beta=beta, subtract=subtract)
    codes = random_images(network.graph.input_shape, 8)
    result = quantize(network, codes, 8, {})
    spiking = [p for p in result.network.populations if p.spiking]
    assert {p.voltage_decay for p in spiking} == {round(4096 * (1 - beta))}
    assert {p.reset for p in spiking} == {"subtract" if subtract else "zero"}
    assert [row.object for row in check(result.network, LOIHI2)] == [p.name for p in spiking] * subtract
    assert result.attribution[-1].disagreement == disagreement(network, result.network, codes)
    assert max(result.attribution[-1].disagreement.values()) < 0.08
    names = [row.rounded for row in result.attribution]
    assert ("decay" in names) == (beta == 0.9)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [3, 8])
def test_grids_are_the_coarsest_that_fit(name: str, bits: int) -> None:
    """At the scale found everything fits; at one step more, or at the ceiling, it would not or be of no use."""
    network = spiking_network(name)
    populations = fold(network)
    shapes = {INPUT: network.graph.input_shape, **{p.name: p.shape for p in populations}}
    widths = bits_by_population(populations, bits)
    grids = fitting_grids(populations, widths, shapes, network.steps, {})
    for population in populations:
        grid = grids[population.name]
        assert room(population, grid.scale, shapes, network.steps, bits) >= 1
        ceiling = grid.format.ceiling(population)
        assert grid.scale <= ceiling
        if grid.scale < 0.94 * ceiling:
            assert room(population, grid.scale / 0.95**2, shapes, network.steps, bits) < 1.1


def room(real: RealPopulation, scale: float, shapes: dict[str, tuple[int, ...]], steps: int, bits: int) -> float:
    numbers = target_format(bits)
    grid = Grid(scale, numbers, numbers.exponents_at(real, scale))
    return headroom(round_population(real, grid, shapes[INPUT]), shapes, steps)


def test_all_sources_of_difference_are_named_in_a_fixed_order() -> None:
    _, result = quantized("conv")
    names = [row.rounded for row in result.attribution]
    known = [*HYBRIDS, EVERYTHING]
    assert names == [name for name in known if name in names]
    assert all(math.isfinite(row.logit_error) for row in result.attribution)


def test_rounding_to_the_nearest_takes_each_weight_by_itself() -> None:
    network, images = spiking_network("conv", seed=1), random_images((1, 8, 8), 16, 3)
    nearest, compensated = (quantize(network, images, 3, {}, rounding) for rounding in ("nearest", "compensated"))
    low, high = target_format(3).mantissas
    for real, choice in zip(fold(network), nearest.choices, strict=True):
        for synapse in real.synapses:
            step = 2 ** choice.exponents[synapse.source]
            expected = np.clip(np.rint(synapse.weight * choice.scale / step), low, high) * step
            (found,) = (s for s in nearest.network.incoming(real.name) if s.source == synapse.source)
            assert np.array_equal(found.weight[:, : expected.shape[1]], expected)
    pairs = zip(nearest.network.synapses, compensated.network.synapses, strict=True)
    assert any(not np.array_equal(one.weight, other.weight) for one, other in pairs)
