from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hardware.errors import RuleViolations
from hardware.surrogates import RATE, RULES, TRIANGLE, Rate, SpikeRule, Surrogate
from pipeline.models import folded, neuron_kernels
from pipeline.models.folded import FoldedNetwork
from pipeline.models.neuron_kernels import RULE_IDS
from pipeline.models.spiking import SpikingNetwork
from pipeline.neurons import Leaky
from tests.pipeline.samples import NETWORKS, random_images, spiking_network

SURROGATES = [
    Surrogate("triangle", 1.0),
    Surrogate("triangle", 0.3, 2.0),
    Surrogate("rectangle", 0.5),
    Surrogate("exponential", 0.5, 0.3),
    Surrogate("arctan", 2.0, 0.7),
    Surrogate("straight_through", 1.0, 0.5),
]
RULE_SAMPLES: list[SpikeRule] = [*SURROGATES, RATE]


class Spike(torch.autograd.Function):
    """[z >= 0] forward, the rule's slope backward: one neuron layer at one step."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(z)
        ctx.surrogate = surrogate
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grad * ctx.surrogate.gradient(z), None


class Replace(torch.autograd.Function):
    """The given spikes forward; backward, the gradient where the neuron is active."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, spikes: Tensor, active: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(active)
        return spikes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (active,) = ctx.saved_tensors
        return grad * active, None, None


def restated(network: SpikingNetwork, images: Tensor, rules: Mapping[str, SpikeRule]) -> Tensor:
    """The method's neuron and surrogates, layer by layer, step by step, batch norm and all; autograd does the rest."""
    outputs = {"input": [images] * network.steps}
    for name, module in network.layers.items():
        read = [outputs[source] for source in network.graph.sources[name]]
        if not isinstance(module, Leaky):
            outputs[name] = [module(*x) for x in zip(*read, strict=True)]
            continue
        (activity,) = read
        rule, threshold = rules[name], module.effective_threshold.detach()
        v, spikes = torch.zeros_like(activity[0]), []
        for x in activity:
            u = v + x
            s = u >= threshold if isinstance(rule, Rate) else Spike.apply(u - threshold, rule)
            s = s.to(u.dtype)
            v = u * (1 - s)
            spikes.append(s)
        if isinstance(rule, Rate):
            active = (torch.stack(spikes).mean(0) > 0).to(images.dtype)
            spikes = [Replace.apply(x, s, active) for x, s in zip(activity, spikes, strict=True)]
        outputs[name] = spikes
    return torch.stack(outputs[name]).mean(0)


def images_for(name: str, samples: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(random_images(NETWORKS[name][1], samples)).to(dtype) / 255


def gradient(logits: Tensor, images: Tensor) -> Tensor:
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    (result,) = torch.autograd.grad((weights * logits).sum(), images)
    return result


def same_for_all(network: SpikingNetwork, rule: SpikeRule) -> dict[str, SpikeRule]:
    return {name: rule for name, _ in network.neurons()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", RULE_SAMPLES, ids=lambda rule: rule.name)
def test_logits_and_gradients_are_the_equations(name: str, rule: SpikeRule) -> None:
    network = spiking_network(name).double()
    images = images_for(name).requires_grad_()

    logits = FoldedNetwork(network)(images, rule)
    expected = restated(network, images, same_for_all(network, rule))

    # One spike more or less would change a logit by far more than rounding does.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    by_node, by_step = gradient(logits, images), gradient(expected, images)
    assert float(by_step.abs().max()) > 0
    torch.testing.assert_close(by_node, by_step, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_layer_follows_its_own_rule(name: str) -> None:
    network = spiking_network(name).double()
    names = [layer for layer, _ in network.neurons()]
    rules = {layer: (RATE, *SURROGATES)[index % 3] for index, layer in enumerate(names)}
    images = images_for(name).requires_grad_()

    mixed = gradient(FoldedNetwork(network)(images, rules), images)
    torch.testing.assert_close(mixed, gradient(restated(network, images, rules), images), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_in_float32_only_membranes_on_the_threshold_can_differ(name: str) -> None:
    network = spiking_network(name, steps=8)
    images = images_for(name, 60, torch.float32)
    expected, recorded = network.record(images)
    margins = [(layer.membranes - layer.threshold).abs().flatten(1).amin(1) for layer in recorded.values()]
    clear = torch.stack(margins).amin(0) > 1e-5
    with torch.no_grad():
        logits = FoldedNetwork(network)(images)
    assert int(clear.sum()) > 30
    torch.testing.assert_close(logits[clear], expected[clear], rtol=0, atol=1e-5)


class Widening:
    """A rule with memory: every call is a triangle twice as wide as the last."""

    def __init__(self) -> None:
        self.width = 0.5
        self.shapes: list[tuple[int, ...]] = []

    def gradient(self, z: Tensor) -> Tensor:
        self.width *= 2
        self.shapes.append(tuple(z.shape))
        return Surrogate("triangle", self.width).gradient(z)


def test_a_rule_that_keeps_state_sees_all_images_once_per_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded, "GROUP_ROWS", 10)
    monkeypatch.setattr(folded, "GROUP_BYTES", 0)
    network = spiking_network("conv").double()
    shapes = network.graph.shapes()
    fast, images = FoldedNetwork(network), images_for("conv", 9).requires_grad_()
    rules = {name: Widening() for name in fast.neuron_names}
    for width in (1.0, 2.0, 4.0):
        stateful = gradient(fast(images, rules), images)
        fixed = gradient(fast(images, Surrogate("triangle", width)), images)
        torch.testing.assert_close(stateful, fixed, rtol=1e-9, atol=1e-12)
    for name, rule in rules.items():
        assert rule.shapes == [(network.steps, 9, *shapes[name])] * 3


@pytest.mark.parametrize("name", NETWORKS)
def test_what_an_image_gets_does_not_depend_on_the_images_beside_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded, "GROUP_ROWS", 15)
    monkeypatch.setattr(folded, "GROUP_BYTES", 0)
    fast = FoldedNetwork(spiking_network(name).double())
    images = images_for(name, 8).requires_grad_()
    logits = fast(images)
    alone = torch.cat([fast(images[i : i + 1]) for i in range(len(images))])
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(logits, images), gradient(alone, images), rtol=1e-9, atol=1e-12)


def test_no_images_give_no_logits() -> None:
    images = torch.zeros(0, 1, 8, 8, requires_grad=True)
    logits = FoldedNetwork(spiking_network("conv"))(images)
    assert logits.shape == (0, 4)
    assert gradient(logits, images).shape == images.shape


def test_the_network_that_is_folded_stays_as_it_was() -> None:
    network = spiking_network("conv").train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fast = FoldedNetwork(network)
    images = images_for("conv", dtype=torch.float32)
    logits = fast(images)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(fast(images), logits)


def test_rules_by_name_must_name_every_spiking_layer_and_no_other() -> None:
    network = spiking_network("conv")
    first, *others = [name for name, _ in network.neurons()]
    with pytest.raises(RuleViolations) as caught:
        FoldedNetwork(network)(images_for("conv", dtype=torch.float32), {first: TRIANGLE, "elsewhere": TRIANGLE})
    assert {violation.object for violation in caught.value.violations} == {*others, "elsewhere"}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("clipped", [False, True])
def test_the_proxy_has_other_neurons_in_the_same_network(name: str, clipped: bool) -> None:
    network = spiking_network(name).double()
    images = images_for(name).requires_grad_()
    outputs: dict[str, Tensor] = {"input": images}
    for layer, module in network.layers.items():
        read = [outputs[source] for source in network.graph.sources[layer]]
        if not isinstance(module, Leaky):
            outputs[layer] = module(*read)
        elif clipped:
            outputs[layer] = torch.clip(read[0] / module.threshold.detach(), 0, 1)
        else:
            outputs[layer] = torch.relu(read[0])
    expected = outputs[layer]
    logits = FoldedNetwork(network).proxy(images, clipped)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-12)
    by_proxy, plain = gradient(logits, images), gradient(expected, images)
    assert float(plain.abs().max()) > 0
    torch.testing.assert_close(by_proxy, plain, rtol=1e-9, atol=1e-12)


def test_every_rule_is_compiled() -> None:
    assert set(RULE_IDS) == set(RULES)
    assert len(set(RULE_IDS.values())) == len(RULE_IDS)


def test_the_compiled_exponential_is_exact_to_a_rounding() -> None:
    x = -np.concatenate([np.logspace(-9, np.log10(87), 5000), np.arange(88)]).astype(np.float32)
    compiled = np.array([neuron_kernels.exponential(value) for value in x], np.float64)
    # Half a unit in the last place of float32 is 6e-8.
    assert np.abs(compiled / np.exp(x.astype(np.float64)) - 1).max() < 1.2e-7
    assert neuron_kernels.exponential(np.float32(0)) == 1
    assert 0 < neuron_kernels.exponential(np.float32(-1e30)) < 1e-37
