from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.inner_attacks import (
    kl_divergence,
    kl_divergences,
    mart_images,
    pgd_images,
    rfgsm_images,
    trades_images,
)

LABELS = torch.arange(9) % 3
Attack = Callable[[nn.Module, Tensor, float, torch.Generator], Tensor]
ATTACKS: dict[str, Attack] = {
    "pgd": lambda network, x, epsilon, g: pgd_images(network, x, LABELS, epsilon, 4, g),
    "trades": lambda network, x, epsilon, g: trades_images(network, x, epsilon, 4, g),
    "mart": lambda network, x, epsilon, g: mart_images(network, x, LABELS, epsilon, 4, g),
    "rfgsm": lambda network, x, epsilon, g: rfgsm_images(network, x, epsilon, g),
    "kl pgd": lambda network, x, epsilon, g: rfgsm_images(network, x, epsilon, g, steps=4),
}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def images(samples: int = 9) -> Tensor:
    pixels = torch.rand(samples, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    pixels[:, :, 0] = 0.0
    pixels[:, :, 3] = 1.0
    return pixels


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=generator()).double()


def restated_kl(clean: Tensor, other: Tensor) -> Tensor:
    """sum p log(p / q), p of the clean image."""
    p, q = clean.softmax(1), other.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


def climbed(x: Tensor, start: Tensor, epsilon: float, sizes: list[float], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Sign-gradient steps of the given sizes, each clipped to the ball first and to [0, 1] then."""
    for size in sizes:
        start = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(start), start)
        moved = start.detach() + size * gradient.sign()
        start = (x + (moved - x).clamp(-epsilon, epsilon)).clamp(0, 1)
    return start


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_kl_divergence_is_of_the_clean_distribution_from_the_other() -> None:
    clean, other = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 3.0]]), torch.tensor([[0.0, 0.5, 0.0], [1.0, 0.0, 2.0]])
    assert kl_divergence(clean, other).item() == pytest.approx(restated_kl(clean, other).item(), rel=1e-5)
    assert kl_divergence(clean, other).item() != pytest.approx(restated_kl(other, clean).item(), rel=0.1)
    assert kl_divergences(clean, other)[1].item() == pytest.approx(restated_kl(clean[1:], other[1:]).item(), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_pgd_is_its_formula(steps: int) -> None:
    network, x, epsilon = model(), images(), 0.2
    uniform = 2 * torch.rand(x.shape, generator=generator()).double() - 1
    start = (x + epsilon * uniform).clamp(0, 1)
    expected = climbed(
        x, start, epsilon, [2.5 * epsilon / steps] * steps, lambda at: F.cross_entropy(network(at), LABELS)
    )
    close(pgd_images(network, x, LABELS, epsilon, steps, generator()), expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_mart_is_pgd_from_a_gaussian_start(steps: int) -> None:
    network, x, epsilon = model(), images(), 0.2
    start = x + 0.001 * noise(x)
    expected = climbed(
        x, start, epsilon, [2.5 * epsilon / steps] * steps, lambda at: F.cross_entropy(network(at), LABELS)
    )
    close(mart_images(network, x, LABELS, epsilon, steps, generator()), expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_trades_climbs_the_divergence_from_a_gaussian_start(steps: int) -> None:
    network, x, epsilon = model(), images(), 0.2
    clean = network(x).detach()
    start = x + 0.001 * noise(x)
    expected = climbed(x, start, epsilon, [2.5 * epsilon / steps] * steps, lambda at: restated_kl(clean, network(at)))
    close(trades_images(network, x, epsilon, steps, generator()), expected)


@pytest.mark.parametrize(
    ("steps", "sizes"),
    [(1, [0.05]), (2, [0.0625, 0.0625]), (5, [0.025] * 5)],
)
def test_rfgsm_and_its_iteration_are_their_formula(steps: int, sizes: list[float]) -> None:
    """alpha = epsilon / 2 = 0.05; one step of epsilon - alpha, or steps of 2.5 (epsilon - alpha) / steps."""
    network, x, epsilon = model(), images(), 0.1
    clean = network(x).detach()
    start = (x + 0.05 * noise(x).sign()).clamp(0, 1)
    expected = climbed(x, start, epsilon, sizes, lambda at: restated_kl(clean, network(at)))
    close(rfgsm_images(network, x, epsilon, generator(), steps=steps), expected)


@pytest.mark.parametrize("epsilon", [0.0, 0.003, 0.1, 1.0])
@pytest.mark.parametrize("name", ATTACKS)
def test_adversarial_images_stay_in_the_ball_and_in_range(name: str, epsilon: float) -> None:
    x = images()
    made = ATTACKS[name](model(), x, epsilon, generator())
    assert float((made - x).abs().max()) <= epsilon + 1e-12
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1


def test_pgd_raises_the_loss_and_more_steps_raise_it_further() -> None:
    network, x = model(), images()

    def loss(pixels: Tensor) -> float:
        return F.cross_entropy(network(pixels), LABELS).item()

    one, many = (pgd_images(network, x, LABELS, 0.1, steps, generator()) for steps in (1, 20))
    assert loss(x) < loss(one) <= loss(many)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_generator_gives_the_same_images(name: str) -> None:
    network, x, attack = model(), images(), ATTACKS[name]
    assert torch.equal(attack(network, x, 0.1, generator()), attack(network, x, 0.1, generator()))
    if name in ("pgd", "rfgsm", "kl pgd"):  # the others start so near the image that noise rarely turns a sign
        assert not torch.equal(attack(network, x, 0.1, generator()), attack(network, x, 0.1, generator(8)))


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_leave_no_gradient_in_the_parameters(name: str) -> None:
    network = model()
    ATTACKS[name](network, images(), 0.1, generator())
    assert all(parameter.grad is None for parameter in network.parameters())
