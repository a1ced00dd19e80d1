"""The method followed for one mini-batch against its formulas, written down once more without any of our machinery:
dictionaries of parameters, explicit steps, sorting instead of order statistics, sign by sign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.conversion import calibrate, convert
from pipeline.models.graph import LayerGraph
from pipeline.models.spiking import SpikingNetwork
from pipeline.objectives import robust_finetuning
from tests.pipeline.samples import NETWORKS, rate_network

T, CALIBRATION_STEPS, KAPPA, PERCENTILE = 4, 12, 0.3, 97.0
EPSILON, BETA, GAMMA = 0.1, 2.0, 1.0


class Triangle(torch.autograd.Function):
    """[z >= 0], backward max(0, gamma - |z|) / gamma^2."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return gradient * (GAMMA - z.abs()).clamp(min=0) / GAMMA**2


@dataclass
class Statement:
    """The network as its graph names it, and numbers; every activity is a list of T tensors."""

    graph: LayerGraph
    numbers: dict[str, Tensor]
    batch_statistics: bool = True

    def layer(
        self, index: int, outputs: dict[str, list[Tensor]], spike: Callable[[str, list[Tensor]], list[Tensor]]
    ) -> None:
        layer = self.graph.layers[index]
        read = [outputs[name] for name in self.graph.sources[layer.name]]
        n = {key.split(".")[-1]: value for key, value in self.numbers.items() if key.split(".")[1] == layer.name}
        x, o = read[0], layer.options
        if layer.kind == "spike":
            y = spike(layer.name, x)
        elif layer.kind == "batch_norm":
            y = self.batch_norm(x, n, float(o["eps"]))
        elif layer.kind == "add":
            y = [sum(terms[1:], terms[0]) for terms in zip(*read, strict=True)]
        else:
            y = [self.static(layer.kind, o, n, one) for one in x]
        outputs[layer.name] = y

    def static(self, kind: str, o: Any, n: dict[str, Tensor], x: Tensor) -> Tensor:
        if kind == "normalize":
            return (x - n["mean"].view(1, -1, *[1] * (x.ndim - 2))) / n["std"].view(1, -1, *[1] * (x.ndim - 2))
        if kind == "conv":
            return torch.nn.functional.conv2d(x, n["weight"], n.get("bias"), int(o["stride"]), int(o["padding"]))
        if kind == "linear":
            return x @ n["weight"].T + n.get("bias", 0)
        if kind == "avg_pool":
            return torch.nn.functional.avg_pool2d(x, int(o["kernel_size"]))
        if kind == "scale":
            return n["value"] * x
        return x.flatten(1) if kind == "flatten" else x

    def batch_norm(self, x: list[Tensor], n: dict[str, Tensor], eps: float) -> list[Tensor]:
        shape = (1, -1, *[1] * (x[0].ndim - 2))
        mean, variance = n["running_mean"], n["running_var"]
        if self.batch_statistics:
            everything = torch.cat(x)
            axes = [axis for axis in range(everything.ndim) if axis != 1]
            mean = everything.mean(axes)
            variance = ((everything - mean.view(shape)) ** 2).mean(axes)
        scale = n["weight"] / (variance + eps).sqrt()
        return [(one - mean.view(shape)) * scale.view(shape) + n["bias"].view(shape) for one in x]

    def logits(self, images: Tensor, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = {"input": [images] * steps}
        for index in range(len(self.graph.layers)):
            self.layer(index, outputs, self.spikes)
        spikes = {x.name: torch.stack(outputs[x.name]) for x in self.graph.layers if x.kind == "spike"}
        return sum(outputs[self.graph.layers[-1].name]) / steps, spikes  # type: ignore[return-value]

    def spikes(self, name: str, currents: list[Tensor]) -> list[Tensor]:
        threshold, v, fired = self.numbers[f"layers.{name}.threshold"], torch.zeros_like(currents[0]), []
        for current in currents:
            u = v + current
            s = Triangle.apply(u - threshold)
            v = u * (1 - s)
            fired.append(s)
        return fired


def thresholds_by_sorting(statement: Statement, batches: list[Tensor], second: list[Tensor]) -> dict[str, float]:
    """Section by section: each layer from the currents that unscaled thresholds before it give."""
    found: dict[str, float] = {}
    started: set[str] = set()
    for layer in statement.graph.layers:
        if layer.kind != "spike":
            continue
        candidates = []
        for batch in second if layer.block in started else batches:
            currents: dict[str, list[Tensor]] = {}

            def watch(name: str, x: list[Tensor], currents: dict[str, list[Tensor]] = currents) -> list[Tensor]:
                currents[name] = x
                return statement.spikes(name, x)

            outputs = {"input": [batch] * CALIBRATION_STEPS}
            for index in range(len(statement.graph.layers)):
                statement.layer(index, outputs, watch)
            ordered = torch.cat([one.flatten() for one in currents[layer.name]]).sort().values
            candidates.append(float(ordered[round(PERCENTILE / 100 * (len(ordered) - 1))]))
        found[layer.name] = max(candidates)
        statement.numbers[f"layers.{layer.name}.threshold"] = torch.tensor(found[layer.name], dtype=torch.float64)
        started |= {layer.block} - {""}
    return {name: KAPPA * value for name, value in found.items()}


def kl(clean: Tensor, other: Tensor) -> Tensor:
    p, q = clean.softmax(1), other.softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean()


def numbers_of(network: SpikingNetwork) -> dict[str, Tensor]:
    numbers = {key: value.detach().clone() for key, value in network.state_dict().items()}
    for name, _ in network.named_parameters():
        numbers[name].requires_grad_()
    return numbers


@pytest.fixture(params=["conv", "dense", "residual", "pre-activation"])
def converted(request: pytest.FixtureRequest) -> tuple[SpikingNetwork, list[Tensor], list[Tensor]]:
    shape = NETWORKS[request.param][1]
    generator = torch.Generator().manual_seed(5)
    images = [torch.rand(6, *shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    network = convert(rate_network(request.param), T).double()
    calibrate(
        network,
        images[:3],
        percentile=PERCENTILE,
        calibration_steps=CALIBRATION_STEPS,
        scale=KAPPA,
        second_batches=images[3:],
    )
    return network, images[:3], images[3:]


def test_thresholds_are_those_of_the_formulas(
    converted: tuple[SpikingNetwork, list[Tensor], list[Tensor]],
) -> None:
    network, batches, second = converted
    statement = Statement(network.graph, {key: value.detach().clone() for key, value in network.state_dict().items()})
    for name, _ in network.neurons():
        statement.numbers[f"layers.{name}.threshold"] = torch.tensor(1.0, dtype=torch.float64)
    expected = thresholds_by_sorting(statement, batches, second)
    assert {name: float(n.threshold.detach()) for name, n in network.neurons()} == pytest.approx(expected, rel=1e-10)
    assert min(expected.values()) > 0.03


def test_one_fine_tuning_step_is_that_of_the_formulas(
    converted: tuple[SpikingNetwork, list[Tensor], list[Tensor]],
) -> None:
    network, batches, _ = converted
    images, labels = batches[0], torch.tensor([0, 1, 2, 0, 1, 2])
    # Training starts from the same numbers; gradients gather in both.
    numbers = numbers_of(network)
    loss = robust_finetuning(EPSILON, BETA)(network, images, labels, torch.Generator().manual_seed(9))
    loss.backward()

    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    alpha = EPSILON / 2
    start = (images + alpha * noise.sign()).clamp(0, 1).requires_grad_()
    deployed = Statement(network.graph, numbers, batch_statistics=False)
    clean, _ = deployed.logits(images, T)
    (gradient,) = torch.autograd.grad(kl(clean.detach(), deployed.logits(start, T)[0]), start)
    assert float(gradient.abs().max()) > 0
    moved = start.detach() + (EPSILON - alpha) * gradient.sign()
    adversarial = (images + (moved - images).clamp(-EPSILON, EPSILON)).clamp(0, 1)

    trained = Statement(network.graph, numbers)
    clean, spikes = trained.logits(images, T)
    attacked, _ = trained.logits(adversarial, T)
    cross_entropy = -clean.log_softmax(1)[torch.arange(len(labels)), labels].mean()
    expected = cross_entropy + BETA * kl(clean, attacked)
    parameters = {name: numbers[name] for name, _ in network.named_parameters()}
    expected_gradients = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))

    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected_gradients[name], rtol=1e-7, atol=1e-10)
    network.train()
    with torch.no_grad():
        _, recorded = network.record(images)
    for name, activity in recorded.items():
        assert torch.equal(activity.spikes.transpose(0, 1).double(), spikes[name].detach().flatten(2)), name
        assert 0 < float(spikes[name].detach().mean()) < 1, name
