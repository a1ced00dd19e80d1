from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hardware.bounds import require_no_wrap
from hardware.emulator import run_emulator
from hardware.errors import RuleViolations
from hardware.network import IntegerNetwork
from hardware.reference import run_reference
from hardware.targets.loihi2 import LOIHI2, check
from pipeline.attacks.targets import to_images
from pipeline.folding import RealPopulation, fold
from pipeline.models.spiking import SpikingNetwork
from pipeline.quantization import (
    EXPONENT,
    Quantization,
    Recipe,
    fitting_scales,
    quantize,
    require_finite,
    round_population,
    split_constant,
    threshold_mantissa,
)
from tests.pipeline.samples import NETWORKS, random_images, spiking_network

CALIBRATION = 24


def quantized(name: str, bits: int = 8, seed: int = 0) -> tuple[SpikingNetwork, Quantization]:
    network = spiking_network(name, seed)
    codes = random_images(network.graph.input_shape, CALIBRATION, seed)
    return network, quantize(network, codes, bits, {"seed": seed})


@pytest.mark.parametrize("name", NETWORKS)
def test_at_8_bits_the_network_fits_the_target_and_cannot_wrap(name: str) -> None:
    network, result = quantized(name)
    assert check(result.network, LOIHI2) == []
    require_no_wrap(result.network)
    assert result.network.steps == network.steps
    assert result.network.provenance == {"seed": 0}
    assert [choice.population for choice in result.choices] == [p.name for p in result.network.populations]
    assert {p.name: p.scale for p in result.network.populations} == {c.population: c.scale for c in result.choices}


def spike_disagreement(network: SpikingNetwork, deployed: IntegerNetwork, codes: NDArray[np.uint8]) -> float:
    _, activity = network.record(to_images(codes))
    trace = run_emulator(deployed, codes, "traces")
    different = []
    for name, layer in activity.items():
        spikes = trace.populations[name].spikes
        assert spikes is not None
        different.append((spikes ^ layer.spikes.numpy()).ravel())
    return float(np.concatenate(different).mean())


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_keep_to_their_bits(bits: int) -> None:
    _, result = quantized("plain conv", bits)
    assert check(result.network, LOIHI2) == []
    for synapse in result.network.synapses:
        mantissa = synapse.weight >> synapse.exponent
        assert synapse.bits == bits
        assert -(2 ** (bits - 1)) <= mantissa.min() <= mantissa.max() <= 2 ** (bits - 1) - 1
        assert np.array_equal(mantissa << synapse.exponent, synapse.weight)
        assert np.abs(mantissa).max() >= 2 ** (bits - 2) - 1  # the width is used


def test_more_bits_agree_better() -> None:
    network = spiking_network("conv")
    codes = random_images((1, 8, 8), 40, seed=9)
    disagreement = [spike_disagreement(network, quantized("conv", bits)[1].network, codes) for bits in (2, 4, 8)]
    assert disagreement[0] > 2 * disagreement[1] > 4 * disagreement[2]
    assert disagreement[2] < 0.02


def test_logits_in_real_units_are_close_to_the_float_models() -> None:
    network, result = quantized("conv")
    codes = random_images((1, 8, 8), 40, seed=9)
    deployed = result.network.logits(run_emulator(result.network, codes).readouts)
    with torch.no_grad():
        trained = network(to_images(codes)).double().numpy()
    assert np.sqrt(np.mean((deployed - trained) ** 2)) < 0.1 * trained.std()


def test_quantising_changes_nothing_in_the_float_network_and_is_repeatable() -> None:
    network = spiking_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    codes = random_images((1, 8, 8), 8)
    first, second = quantize(network, codes, 8, {}), quantize(network, codes, 8, {})
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert first.choices == second.choices


def on_the_grid(population: RealPopulation, unit: float) -> RealPopulation:
    """The population with everything a multiple of ``unit``, the threshold between two multiples.

    Weights of dense synapses become even multiples, as their exponent demands.
    """

    def snap(values: NDArray[np.float64], multiple: int) -> NDArray[np.float64]:
        step = multiple * unit
        return np.rint(values / step) * step

    threshold = population.threshold
    return replace(
        population,
        weight=snap(population.weight, 2 if population.kind == "dense" else 1),
        constant=None if population.constant is None else snap(population.constant, 1),
        bias=snap(population.bias, 1),
        threshold=None if threshold is None else (np.rint(threshold / unit) - 0.375) * unit,
    )


def run_real(
    populations: list[RealPopulation], codes: NDArray[np.uint8], steps: int
) -> tuple[dict[str, NDArray[np.bool_]], NDArray[np.float64]]:
    """Spikes ``(samples, steps, neurons)`` and summed readout of folded populations, in float64."""
    activity = {"input": codes.astype(np.float64)}
    v: dict[str, NDArray[np.float64]] = {}
    spikes: dict[str, list[NDArray[np.bool_]]] = {p.name: [] for p in populations}
    readout = np.zeros((len(codes), len(populations[-1].bias)))
    for _ in range(steps):
        for p in populations:
            source = activity[p.source]
            if p.kind == "dense":
                current = source.reshape(len(source), -1) @ p.weight.T + p.bias
            else:
                kernel, total = p.weight, source
                if p.constant is not None:
                    kernel = np.concatenate([kernel, p.constant[:, None]], axis=1)
                    total = np.concatenate([source, np.ones_like(source[:, :1])], axis=1)
                convolved = torch.conv2d(
                    torch.from_numpy(total),
                    torch.from_numpy(np.ascontiguousarray(kernel)),
                    torch.from_numpy(p.bias),
                    p.stride,
                    p.padding,
                )
                current = convolved.numpy()
            if p.threshold is None:
                readout += current
                continue
            u = v.get(p.name, np.zeros_like(current)) + current
            fired = u >= p.threshold
            v[p.name] = np.where(fired, 0.0, u)
            activity[p.name] = fired.astype(np.float64)
            spikes[p.name].append(fired.reshape(len(codes), -1))
    return {name: np.stack(history, 1) for name, history in spikes.items() if history}, readout


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_with_weights_wide_enough_every_spike_is_the_float_networks(name: str, seed: int) -> None:
    """Mapping, not rounding: on the integer grid the integer network must be the folded one, border included."""
    network = spiking_network(name, seed)
    shape, steps = network.graph.input_shape, network.steps
    folded = fold(network)
    units = {p.name: 2.0**-11 if p.source == "input" else 2.0**-8 for p in folded}
    populations = [on_the_grid(p, units[p.name]) for p in folded]
    recipe = Recipe(tuple(populations), shape, steps, 26, {})
    deployed = recipe.assemble({name: 1 / unit for name, unit in units.items()})
    codes = random_images(shape, 6, seed)
    spikes, readout = run_real(populations, codes, steps)
    trace = run_reference(deployed, codes)
    for population, expected in spikes.items():
        found = trace.populations[population].spikes
        assert found is not None
        assert 0.01 < expected.mean() < 0.99
        assert np.array_equal(found, expected), population
    assert np.array_equal(trace.readouts, np.rint(readout / units["readout"]).astype(np.int64))


def integer_constant(network: IntegerNetwork) -> NDArray[np.int64]:
    """What the constant channel and the bias add to the first population in one step, weight units."""
    first = network.populations[0]
    black = run_reference(replace(network, steps=1), np.zeros((1, *network.input.shape), np.uint8))
    membranes, spikes = black.populations[first.name].membranes, black.populations[first.name].spikes
    assert membranes is not None
    assert spikes is not None
    assert not spikes.any()
    units: NDArray[np.int64] = membranes[0, 0].reshape(first.shape).astype(np.int64) // 64
    return units


@pytest.mark.parametrize("name", ["conv", "wide kernel", "padded beyond the kernel"])
def test_the_constant_part_is_right_at_every_pixel(name: str) -> None:
    """Each tap is rounded to a multiple of half the code; the tap over the pixel itself has no error at all."""
    network = spiking_network(name)
    recipe = Recipe(tuple(fold(network)), network.graph.input_shape, network.steps, 8, {})
    scale = fitting_scales(recipe)[recipe.populations[0].name]
    first = recipe.populations[0]
    assert first.constant is not None
    kernel, code, bias = split_constant(first, scale, first.bias * scale, 8, recipe.input_shape)
    assert 1 <= code <= 255
    assert np.abs(kernel).max() <= 127
    ones = torch.ones(1, 1, *recipe.input_shape[1:], dtype=torch.float64)

    def spread(taps: NDArray[np.float64], offset: NDArray[np.float64]) -> NDArray[np.float64]:
        constant = torch.conv2d(ones, torch.from_numpy(taps), torch.from_numpy(offset), first.stride, first.padding)
        return constant[0].numpy()

    wanted = spread(first.constant[:, None] * scale, first.bias * scale)
    found = spread(kernel * code, bias)
    anchored = first.weight.shape[2] >= 2 * first.padding + 1
    inexact_taps = kernel[0].size - anchored
    assert np.abs(found - wanted).max() <= inexact_taps * code / 2 + 0.5
    silent = replace(first, threshold=1e3 * abs(first.threshold or 1.0))
    deployed = replace(recipe, populations=(silent, *recipe.populations[1:])).assemble(
        {p.name: scale if p is first else 1.0 for p in recipe.populations}
    )
    assert np.array_equal(integer_constant(deployed), np.rint(found).astype(np.int64))


def test_a_single_tap_carries_constant_and_bias_without_error() -> None:
    real = RealPopulation(
        "p", "input", "conv", np.full((2, 1, 1, 1), 0.01), np.array([[[-3.31]], [[4.72]]]), np.array([0.6, -9.2]), 1.0,
        (2, 4, 4),
    )  # fmt: skip
    kernel, code, bias = split_constant(real, 1000.0, real.bias * 1000.0, 8, (1, 4, 4))
    assert kernel[:, 0, 0, 0] * code + bias == pytest.approx(1000 * np.array([-2.71, -4.48]))
    assert 0 < np.abs(bias).max() <= code


def test_a_constant_too_large_for_any_code_is_refused() -> None:
    real = RealPopulation(
        "p", "input", "conv", np.ones((1, 1, 1, 1)), np.full((1, 1, 1), 9.0), np.zeros(1), 1.0, (1, 4, 4)
    )
    with pytest.raises(RuleViolations, match="constant input has 8 bits"):
        split_constant(real, 1e4, real.bias * 1e4, 8, (1, 4, 4))


@pytest.mark.parametrize(("threshold", "scale"), [(0.5, 10.0), (0.51, 100.0), (3.0, 7.0), (0.04, 1.0)])
def test_the_strict_mantissa_is_the_threshold_less_one(threshold: float, scale: float) -> None:
    mantissa = threshold_mantissa(threshold, scale)
    assert mantissa >= 0
    units = np.arange(0, 60)
    spikes, wanted = units > mantissa, units >= max(round(threshold * scale), 1)
    assert np.array_equal(spikes, wanted)


def test_weights_beyond_the_width_are_clipped_not_wrapped() -> None:
    weight = np.array([[-9.0, -0.5, 0.24, 0.26, 9.0]])
    conv = RealPopulation("p", "x", "conv", weight.reshape(1, 5, 1, 1), None, np.zeros(1), 1.0, (1, 1, 1))
    assert round_population(conv, 2.0, 4, None)[0].ravel().tolist() == [-8, -1, 0, 1, 7]
    dense = RealPopulation("p", "x", "dense", weight, None, np.zeros(1), 1.0, (1,))
    assert EXPONENT["dense"] == 1
    assert round_population(dense, 4.0, 4, None)[0].ravel().tolist() == [-16, -2, 0, 2, 14]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    network = spiking_network()
    with torch.no_grad():
        network.get_parameter("layers.conv2.weight")[0, 0, 0, 0] = value
        network.get_parameter("layers.linear2.bias")[1] = value
    with pytest.raises(RuleViolations) as caught:
        quantize(network, random_images((1, 8, 8), 4), 8, {})
    assert [row.object for row in caught.value.violations] == ["neurons2", "readout"]


def test_every_part_of_a_population_is_looked_at() -> None:
    good = RealPopulation("p", "input", "conv", np.ones((1, 1, 1, 1)), np.ones((1, 1, 1)), np.ones(1), 1.0, (1, 2, 2))
    require_finite([good])
    for broken in (
        replace(good, weight=np.full((1, 1, 1, 1), np.nan)),
        replace(good, constant=np.full((1, 1, 1), np.nan)),
        replace(good, bias=np.full(1, np.inf)),
        replace(good, threshold=np.nan),
    ):
        with pytest.raises(RuleViolations, match="p: parameters are finite"):
            require_finite([broken])


def test_a_network_that_fits_at_no_scale_is_refused_with_its_population() -> None:
    network = spiking_network("dense")
    with torch.no_grad():
        dict(network.neurons())["neurons1"].threshold.fill_(1e9)
    with pytest.raises(RuleViolations) as caught:
        quantize(network, random_images((2, 3, 3), 4), 8, {})
    assert {row.object for row in caught.value.violations} == {"neurons1"}
    assert all(re.search("17 bits", row.rule) for row in caught.value.violations)


def test_a_silent_layer_is_still_a_network() -> None:
    """All weights zero: nothing to scale, nothing to refuse."""
    network = spiking_network("dense")
    with torch.no_grad():
        network.get_parameter("layers.linear2.weight").zero_()
    result = quantize(network, random_images((2, 3, 3), 4), 8, {})
    assert check(result.network, LOIHI2) == []
