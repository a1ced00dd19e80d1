"""Between float and integer network: kind after kind of number becomes the integers', and at the end all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from hardware.emulator import run_emulator
from hardware.network import IntegerNetwork
from pipeline.fidelity.waterfall import mean_activity
from pipeline.folding import RealPopulation, fold
from pipeline.hybrids import STEPS, hybrids
from pipeline.models.spiking import SpikingNetwork
from pipeline.quantization import quantize
from pipeline.unrounded import run_unrounded
from tests.pipeline.samples import NETWORKS, random_images, spiking_network

Codes = NDArray[np.uint8]


def sample(name: str, bits: int) -> tuple[SpikingNetwork, IntegerNetwork, Codes]:
    network = spiking_network(name, 2)
    codes = random_images(network.graph.input_shape, 8, 2)
    return network, quantize(network, codes, bits, {}).network, codes


def mixed(name: str, bits: int) -> tuple[dict[str, list[RealPopulation]], IntegerNetwork, Codes]:
    network, integers, codes = sample(name, bits)
    return dict(hybrids(fold(network), integers, mean_activity(network, integers, codes))), integers, codes


@pytest.mark.parametrize("name", NETWORKS)
def test_after_the_last_step_the_numbers_are_the_integer_networks(name: str) -> None:
    found, integers, codes = mixed(name, 3)
    spikes, readouts = run_unrounded(list(found.values())[-1], codes, integers.steps)
    expected = run_emulator(integers, codes, "traces")
    for population, trace in expected.populations.items():
        if integers.by_name[population].spiking:
            assert trace.spikes is not None
            assert np.array_equal(spikes[population].reshape(trace.spikes.shape), trace.spikes), population
    assert np.array_equal(np.rint(readouts * integers.steps), expected.readouts)


def test_each_step_changes_its_own_kind_of_number_and_keeps_those_before() -> None:
    found, integers, _ = mixed("conv", 4)
    assert list(found) == ["float64", *(name for name in STEPS if name in found)]
    for index, population in enumerate(integers.populations[:-1]):
        thresholds = {name: populations[index].threshold for name, populations in found.items()}
        assert thresholds.pop("float64") != population.threshold + 1
        assert set(thresholds.values()) == {population.threshold + 1}
        weights = {name: populations[index].synapses[0].weight for name, populations in found.items()}
        integer = integers.incoming(population.name)[0].weight[:, : weights["float64"].shape[1]]
        assert not np.array_equal(weights["thresholds"], integer)
        assert np.array_equal(weights["weights"], integer)


def test_a_bias_that_makes_up_for_the_weights_counts_with_them() -> None:
    found, _, _ = mixed("conv", 2)
    for before, after in zip(found["thresholds"], found["weights"], strict=True):
        assert not np.array_equal(before.bias, after.bias)
    last = found["weights"][-1], found["bias"][-1]
    assert np.abs(last[0].bias - last[1].bias).max() <= 1


def test_a_bias_that_was_lost_is_not_laid_to_the_weights() -> None:
    network, integers, codes = sample("conv", 8)
    means = mean_activity(network, integers, codes)
    healthy = dict(hybrids(fold(network), integers, means))
    readout = integers.populations[-1]
    damaged = replace(integers, populations=(*integers.populations[:-1], replace(readout, bias=readout.bias + 100_000)))
    found = dict(hybrids(fold(network), damaged, means))
    assert np.abs(found["weights"][-1].bias - found["thresholds"][-1].bias).max() < 1
    assert np.array_equal(found["bias"][-1].bias, healthy["bias"][-1].bias + 100_000)
