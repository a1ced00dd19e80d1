from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hardware.bounds import WRAP_LIMIT, synaptic_bounds
from hardware.emulator import run_emulator
from hardware.network import STATE_LIMIT, IntegerNetwork
from hardware.surrogates import ENSEMBLE, RATE, SpikeRule
from hardware.targets.rules import check
from hardware.twin import Twin
from pipeline.attacks.targets import to_images
from pipeline.conversion import convert
from pipeline.folding import fold
from pipeline.models.spiking import SpikingNetwork
from pipeline.objectives import robust_finetuning
from pipeline.quantization import SCALABLE, Quantization, quantize
from pipeline.quantization_aware import FINETUNED, RoundedNetwork, finetune_quantized, remeasured
from pipeline.training import Schedule
from tests.pipeline.samples import NETWORKS, easy_data, random_images, rate_network, spiking_network
from tests.pipeline.test_finetuning import converted

STRAIGHT_THROUGH = ENSEMBLE[-1]
TRAIN, VALIDATION = easy_data(96, seed=1), easy_data(64, seed=2)
SCHEDULE = Schedule(3, 16, 0.02, 1e-3)


@cache
def quantized(name: str, bits: int, seed: int = 0) -> tuple[SpikingNetwork, IntegerNetwork]:
    network = spiking_network(name, seed)
    return network, quantize(network, random_images(network.graph.input_shape, 16, seed), bits, {}).network


def integers(network: IntegerNetwork) -> list[NDArray[np.generic]]:
    return [
        *(synapse.weight for synapse in network.synapses),
        *(population.bias for population in network.populations),
        np.array([population.threshold for population in network.populations]),
    ]


def same_integers(one: IntegerNetwork, other: IntegerNetwork) -> bool:
    return all(map(np.array_equal, integers(one), integers(other)))


def readouts(learner: RoundedNetwork, codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """In weight units, over all steps; float32 leaves them within a hundredth of an integer."""
    with torch.no_grad():
        logits = learner(to_images(codes)).double().numpy()
    found: NDArray[np.float64] = logits * learner.steps * learner.quantized.readout.scale
    assert np.abs(found - np.rint(found)).max() < 0.01
    return np.rint(found)


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_starts_as_the_integer_network_and_answers_like_it(name: str, bits: int) -> None:
    network, start = quantized(name, bits)
    learner = RoundedNetwork(fold(network), start)
    learner.keep_to_limits()
    assert same_integers(learner.deployed(), start)
    codes = random_images(start.input.shape, 24, seed=5)
    assert np.array_equal(readouts(learner, codes), run_emulator(start, codes).readouts)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_wherever_it_learns_to_what_is_deployed_keeps_the_limits_and_answers_alike(name: str, bits: int) -> None:
    network, start = quantized(name, bits)
    learner = RoundedNetwork(fold(network), start)
    generator = torch.Generator().manual_seed(bits)
    with torch.no_grad():
        for value in learner.parameters():
            value.add_(0.3 * value.abs().mean() * torch.randn(value.shape, generator=generator))
    learner.keep_to_limits()
    deployed = learner.deployed()
    assert not same_integers(deployed, start)
    assert check(deployed, SCALABLE) == []
    codes = random_images(start.input.shape, 24, seed=6)
    assert np.array_equal(readouts(learner, codes), run_emulator(deployed, codes).readouts)


@pytest.mark.parametrize("name", ["conv", "dense", "residual", "features"])
def test_parameters_far_beyond_every_limit_are_brought_back(name: str) -> None:
    network, start = quantized(name, 8)
    learner = RoundedNetwork(fold(network), start)
    with torch.no_grad():
        for value in learner.parameters():
            value.mul_(1000)
    learner.keep_to_limits()
    deployed = learner.deployed()
    assert check(deployed, SCALABLE) == []
    largest = max(max(map(abs, bounds.range)) for bounds in synaptic_bounds(deployed).values())
    assert largest < WRAP_LIMIT
    learner.keep_to_limits()
    assert same_integers(learner.deployed(), deployed)


def test_negative_thresholds_are_brought_back() -> None:
    network, start = quantized("conv", 8)
    learner = RoundedNetwork(fold(network), start)
    with torch.no_grad():
        for name, value in learner.named_parameters():
            if name.endswith("threshold"):
                value.fill_(-1.0)
    learner.keep_to_limits()
    assert min(p.threshold for p in learner.deployed().populations) >= 0


@pytest.mark.parametrize("options", [{"beta": 0.9}, {"subtract": True}], ids=str)
def test_other_neurons_are_followed_closely(options: Mapping[str, float | bool]) -> None:
    network = convert(rate_network("plain conv"), 6, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for _, neuron in network.neurons():
            neuron.threshold.fill_(0.31)
    codes = random_images(network.graph.input_shape, 32)
    start = quantize(network, codes, 8, {}).network
    learner = RoundedNetwork(fold(network), start)
    assert same_integers(learner.deployed(), start)
    with torch.no_grad():
        found = learner(to_images(codes)).double().numpy()
    expected = start.logits(run_emulator(start, codes).readouts)
    assert np.median(np.abs(found - expected)) < 0.01 * expected.std()


@pytest.mark.parametrize("rule", [*ENSEMBLE[::5], STRAIGHT_THROUGH, RATE], ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", ["conv", "dense", "residual", "pre-activation"])
def test_gradients_to_the_pixels_are_the_twins(name: str, rule: SpikeRule) -> None:
    """Where no membrane saturates: there the twin's stays at its limit, and u, which the reset multiplies, differs."""
    network, start = quantized(name, 4)
    twin = Twin(start)
    codes = random_images(start.input.shape, 24, seed=3)
    recorded = [p.membranes for p in twin.trace(codes).populations.values() if p.membranes is not None]
    saturated = np.stack([(abs(m) >= STATE_LIMIT).reshape(len(codes), -1).any(1) for m in recorded]).any(0)
    images = to_images(codes[~saturated])
    assert len(images) > 0
    slopes = []
    for model in (RoundedNetwork(fold(network), start), twin):
        x = images.clone().requires_grad_()
        logits = model(x, rule)
        slopes.append(torch.autograd.grad((logits * torch.arange(1.0, logits.shape[1] + 1)).sum(), x)[0])
    assert float(slopes[1].abs().max()) > 0
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-5 * float(slopes[1].abs().max()))


def test_rounding_passes_gradients_to_every_parameter() -> None:
    """As if the integers themselves, in real units, were the parameters: what is on the grid already has them too."""
    network, start = quantized("conv", 3)
    images = to_images(random_images(start.input.shape, 8, seed=3))
    found = []
    for on_the_grid in (False, True):
        learner = RoundedNetwork(fold(network), start)
        if on_the_grid:
            with torch.no_grad():
                for part in learner.populations.values():
                    for index, weight in enumerate(part.weights):  # type: ignore[union-attr,arg-type]
                        weight.copy_(part.integers(index) / part.units[index])  # type: ignore[union-attr,operator,index]
        learner(images)[:, 0].sum().backward()
        found.append([value.grad for value in learner.parameters()])
    for loose, exact in zip(*found, strict=True):
        assert loose is not None
        assert exact is not None
        assert float(loose.abs().sum()) > 0
        torch.testing.assert_close(loose, exact)


def trained(bits: int) -> tuple[SpikingNetwork, Quantization]:
    network = converted()
    return network, quantize(network, TRAIN.codes[:32], bits, {"made": "here"})


def accuracy(network: IntegerNetwork) -> float:
    answers = run_emulator(network, VALIDATION.codes).readouts.argmax(1)
    return float((answers == VALIDATION.labels).mean())


def test_it_mends_what_two_bits_break() -> None:
    network, before = trained(2)
    objective = robust_finetuning(0.05, 2.0)
    deployed, history = finetune_quantized(
        network, before.network, objective, TRAIN, VALIDATION, replace(SCHEDULE, epochs=8), epsilon=0.05, seed=0
    )
    assert len(history) == 8
    assert accuracy(deployed) == max(history, key=lambda epoch: epoch.clean + epoch.robust).clean
    assert accuracy(deployed) > accuracy(before.network)
    assert {synapse.bits for synapse in deployed.synapses} == {2}
    assert deployed.provenance == {"made": "here"}
    assert [p.scale for p in deployed.populations] == [p.scale for p in before.network.populations]
    after = remeasured(network, before, deployed, TRAIN.codes)
    assert after.network is deployed
    assert after.attribution[:-1] == before.attribution
    assert after.attribution[-1].rounded == FINETUNED
    assert set(after.attribution[-1].disagreement) == {p.name for p in deployed.populations if p.spiking}
    assert [choice.scale for choice in after.choices] == [choice.scale for choice in before.choices]


@pytest.mark.parametrize(("name", "bits"), [("wide kernel", 3), ("dense", 2), ("residual", 3)])
def test_classes_are_ranked_as_by_the_integers_ties_included(name: str, bits: int) -> None:
    """With so few bits sums often tie, and the first class wins; a rounding of floats must not choose another."""
    network, deployed = quantized(name, bits)
    images = random_images(deployed.input.shape, 400, 5)
    sums = torch.from_numpy(run_emulator(deployed, images).readouts)
    with torch.no_grad():
        logits = RoundedNetwork(fold(network), deployed)(to_images(images))
    ranks, expected = (torch.sign(one[:, :, None] - one[:, None]).int() for one in (logits, sums))
    assert torch.equal(ranks, expected)
    assert (expected == 0).sum() > sums.numel()


def test_it_changes_nothing_it_was_given_and_is_repeatable() -> None:
    network, before = trained(4)
    state = copy.deepcopy(network.state_dict())
    start = copy.deepcopy(before.network)
    results = [
        finetune_quantized(
            network, before.network, robust_finetuning(0.05), TRAIN, VALIDATION, SCHEDULE, epsilon=0.05, seed=3
        )
        for _ in range(2)
    ]
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert same_integers(before.network, start)
    assert same_integers(results[0][0], results[1][0])
    assert not same_integers(results[0][0], start)
    assert results[0][1] == results[1][1]
