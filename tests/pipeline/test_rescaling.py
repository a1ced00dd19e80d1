from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.conversion import convert
from pipeline.models.spiking import RateNetwork, SpikingNetwork, rebuild
from pipeline.models.tracing import trace_network
from pipeline.neurons import MIN_THRESHOLD
from pipeline.rescaling import rescale
from tests.pipeline.samples import NETWORKS, random_images, rate_network, spiking_network


def images_for(name: str, samples: int = 24) -> Tensor:
    return torch.from_numpy(random_images(NETWORKS[name][1], samples)).float() / 255


def centred(logits: Tensor) -> Tensor:
    logits = logits.double()
    return logits - logits.mean(1, keepdim=True)


def agreeing(name: str) -> tuple[SpikingNetwork, RateNetwork]:
    """An SNN that spikes, and an ANN whose logits do not run against its own, as after training."""
    network, source = spiking_network(name, steps=6), rate_network(name)
    images = images_for(name)
    with torch.no_grad():
        for neuron, threshold in zip((neuron for _, neuron in network.neurons()), (0.13, 0.4, 3.1, 0.6), strict=False):
            neuron.threshold.fill_(threshold)
        if (centred(network(images)) * centred(source(images))).sum() < 0:
            list(source.layers.values())[-1].weight.neg_()
    return network, source


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_spikes_and_decisions_are_the_same_bit_for_bit(name: str) -> None:
    network, source = agreeing(name)
    images = images_for(name)
    logits, before = network.record(images)
    rescale(network, source, [images[:10], images[10:]])
    scaled, after = network.record(images)
    assert any(layer.spikes.any() for layer in before.values())
    assert all(torch.equal(after[key].spikes, layer.spikes) for key, layer in before.items())
    factors = [after[key].threshold / layer.threshold for key, layer in before.items()]
    assert all(
        torch.equal(after[key].membranes, factor * layer.membranes)
        for factor, (key, layer) in zip(factors, before.items(), strict=True)
    )
    assert any(factor != 1 for factor in factors)
    assert all(2**-0.5 <= layer.threshold <= 2**0.5 for layer in after.values())
    ratio = float(scaled.abs().sum() / logits.abs().sum())
    assert torch.equal(scaled, 2.0 ** round(torch.tensor(ratio).log2().item()) * logits)


@torch.no_grad()
def test_logits_are_as_large_as_the_anns_to_half_a_power_of_two() -> None:
    network, source = agreeing("conv")
    network.layers["linear2"].weight.mul_(0.01)
    network.layers["linear2"].bias.mul_(0.01)
    images = images_for("conv")
    rescale(network, source, [images])
    wanted, found = centred(source(images)), centred(network(images))
    left = float((wanted * found).sum() / found.square().sum())
    assert 2**-0.5 <= left <= 2**0.5


@torch.no_grad()
def test_training_mode_and_a_threshold_below_its_clamp_are_no_different() -> None:
    network, source = agreeing("conv")
    network.layers["neurons1"].threshold.fill_(MIN_THRESHOLD / 2)
    rescaled = copy.deepcopy(network)
    images = images_for("conv")
    rescale(rescaled, source, [images])
    assert float(rescaled.layers["neurons1"].threshold) == 32 * torch.tensor(MIN_THRESHOLD)
    assert torch.equal(network.train()(images).argmax(1), rescaled.train()(images).argmax(1))


class PlainShortcuts(nn.Module):
    """Spikes enter both sums as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        spikes = torch.relu(self.first(x.flatten(1)))
        spikes = torch.relu(spikes + self.second(spikes))
        spikes = torch.relu(self.third(spikes))
        return spikes + self.last(spikes)


def test_sums_that_hold_plain_spikes_are_refused_all_at_once() -> None:
    source = rebuild(trace_network(PlainShortcuts(), (1, 8, 8)), 4)
    assert isinstance(source, RateNetwork)
    network = convert(source, 4)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuleViolations, match=r"leave conversion\.weights copied") as caught:
        rescale(network, source, [images_for("conv")])
    assert [violation.object for violation in caught.value.violations] == ["relu", "add"]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_logits_that_run_against_the_anns_are_refused() -> None:
    network, source = agreeing("conv")
    with torch.no_grad():
        network.layers["linear2"].weight.neg_()
        network.layers["linear2"].bias.neg_()
    with pytest.raises(SpikeguardError, match="run against the ANN's"):
        rescale(network, source, [images_for("conv")])
