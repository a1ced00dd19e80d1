from __future__ import annotations

from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor

from hardware.surrogates import Surrogate
from pipeline.neurons import MIN_THRESHOLD, Leaky

STEPS = 6
SURROGATES = [
    Surrogate("triangle", 1.0),
    Surrogate("triangle", 0.5),
    Surrogate("rectangle", 2.0),
    Surrogate("exponential", 0.7, 0.3),
    Surrogate("straight_through"),
]


class Spike(torch.autograd.Function):
    """[z >= 0] forward, the surrogate backward: one step, so that autograd does the rest."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(z)
        ctx.surrogate = surrogate
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return grad * ctx.surrogate.gradient(z), None


def restated(current: Tensor, threshold: Tensor, steps: int, surrogate: Surrogate) -> Tensor:
    """The method's neuron, one line per equation."""
    v = torch.zeros_like(current[0])
    spikes = []
    for t in range(steps):
        u = v + current[t if len(current) > 1 else 0]
        s: Tensor = Spike.apply(u - threshold, surrogate)  # type: ignore[no-untyped-call]
        v = u * (1 - s)
        spikes.append(s)
    return torch.stack(spikes)


def neuron(threshold: float) -> Leaky:
    return Leaky(threshold).double()


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: s.name)
@pytest.mark.parametrize("static", [True, False], ids=["static", "changing"])
def test_spikes_and_gradients_are_the_equations(surrogate: Surrogate, static: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (1 if static else STEPS, 4, 7)
    current = (0.6 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.15).requires_grad_()
    weights = torch.randn((STEPS, 4, 7), generator=generator, dtype=torch.float64)
    layer = neuron(0.4)

    spikes = layer(current, STEPS, surrogate)
    by_node = torch.autograd.grad((spikes * weights).sum(), [current, layer.threshold])
    expected = restated(current, layer.threshold, STEPS, surrogate)
    by_step = torch.autograd.grad((expected * weights).sum(), [current, layer.threshold])

    assert torch.equal(spikes, expected)
    assert 0.1 < float(spikes.detach().mean()) < 0.9
    for fused, plain in zip(by_node, by_step, strict=True):
        assert float(plain.abs().sum()) > 0
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_the_reset_is_in_the_gradient() -> None:
    """A detached reset would leave (1 - s) alone and lose u times the surrogate."""
    current = torch.tensor([[[0.6]], [[0.1]]], dtype=torch.float64, requires_grad=True)
    spikes = neuron(0.5)(current, 2)
    assert spikes.flatten().tolist() == [1.0, 0.0]
    (gradient,) = torch.autograd.grad(spikes[1].sum(), current)
    slope_now, slope_before = 1 - abs(0.1 - 0.5), 1 - abs(0.6 - 0.5)
    expected = slope_now * (0.0 - 0.6 * slope_before)
    assert gradient[0].item() == pytest.approx(expected, rel=1e-12)


def test_membranes_lead_to_the_spikes() -> None:
    current = torch.randn(STEPS, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = neuron(0.4)
    spikes, membranes = layer(current, STEPS), layer.membranes(current, STEPS)
    assert torch.equal(spikes, (membranes >= layer.threshold).double())
    after = membranes * (1 - spikes)
    assert torch.equal(membranes[1:], after[:-1] + current[1:])


def test_nothing_is_carried_over_between_calls() -> None:
    current = torch.full((1, 2, 3), 0.3)
    layer = Leaky(1.0)
    assert torch.equal(layer(current, 5), layer(current, 5))


def test_the_threshold_in_force_never_falls_below_its_floor() -> None:
    layer = Leaky(-1.0)
    assert layer.effective_threshold.item() == pytest.approx(MIN_THRESHOLD)
    assert layer(torch.full((1, 1, 1), MIN_THRESHOLD / 2), 1).item() == 0
    layer.clamp_threshold()
    assert layer.threshold.item() == pytest.approx(MIN_THRESHOLD)


def leaky(current: Tensor, threshold: float) -> tuple[list[float], list[float]]:
    layer = snntorch.Leaky(beta=1.0, threshold=threshold, reset_mechanism="zero")
    membrane = layer.init_leaky()
    spikes, membranes = [], []
    for value in current.flatten():
        spike, membrane = layer(value.reshape(1), membrane)
        spikes.append(spike.item())
        membranes.append(membrane.item())
    return spikes, membranes


def test_spikes_are_those_of_snntorch_away_from_ties() -> None:
    current = torch.rand(40, 1, generator=torch.Generator().manual_seed(5))
    assert Leaky(0.9)(current, 40).flatten().tolist() == leaky(current, 0.9)[0]


def test_a_membrane_on_the_threshold_spikes_here_and_not_in_snntorch() -> None:
    current = torch.tensor([[0.5], [0.5], [0.25]])
    assert Leaky(1.0)(current, 3).flatten().tolist() == [0.0, 1.0, 0.0]
    assert leaky(current, 1.0)[0] == [0.0, 0.0, 1.0]


def test_snntorch_keeps_the_membrane_of_a_spike_until_the_next_step() -> None:
    current = torch.tensor([[0.6], [0.6]])
    spikes, membranes = leaky(current, 1.0)
    assert spikes == [0.0, 1.0]
    assert membranes[1] == pytest.approx(1.2)
    layer = Leaky(1.0)
    after = layer.membranes(current, 2) * (1 - layer(current, 2))
    assert after[1].item() == 0.0
