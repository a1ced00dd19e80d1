from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.objectives import (
    kl_divergence,
    natural,
    pgd_adversarial_training,
    pgd_images,
    rfgsm_images,
    robust_finetuning,
)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


def images(samples: int = 9) -> Tensor:
    pixels = torch.rand(samples, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    pixels[:, :, 0] = 0.0
    pixels[:, :, 3] = 1.0
    return pixels


LABELS = torch.arange(9) % 3


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def restated_kl(clean: Tensor, other: Tensor) -> Tensor:
    """sum p log(p / q), p of the clean image."""
    p, q = clean.softmax(1), other.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


def test_kl_divergence_is_of_the_clean_distribution_from_the_other() -> None:
    clean, other = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.5, 0.0]])
    assert kl_divergence(clean, other).item() == pytest.approx(restated_kl(clean, other).item(), rel=1e-5)
    assert kl_divergence(clean, other).item() != pytest.approx(restated_kl(other, clean).item(), rel=0.1)


def test_rfgsm_is_its_formula() -> None:
    network, x, epsilon = model(), images(), 0.1
    alpha = epsilon / 2
    noise = torch.randn(x.shape, generator=generator())
    x0 = (x + alpha * noise.sign()).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(restated_kl(network(x).detach(), network(x0)), x0)
    moved = x0.detach() + (epsilon - alpha) * gradient.sign() - x
    expected = (x + moved.clamp(-epsilon, epsilon)).clamp(0, 1)
    torch.testing.assert_close(rfgsm_images(network, x, epsilon, generator()), expected, rtol=0, atol=1e-7)


def test_pgd_with_one_step_is_its_formula() -> None:
    network, x, epsilon = model(), images(), 0.2
    start = epsilon * (2 * torch.rand(x.shape, generator=generator()) - 1)
    x0 = torch.max(torch.min((x + start).clamp(0, 1), x + epsilon), x - epsilon).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(x0), LABELS), x0)
    moved = x0.detach() + 2.5 * epsilon * gradient.sign()
    expected = torch.max(torch.min(moved, x + epsilon), x - epsilon).clamp(0, 1)
    torch.testing.assert_close(pgd_images(network, x, LABELS, epsilon, 1, generator()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.003, 0.1, 1.0])
def test_adversarial_images_stay_in_the_ball_and_in_range(epsilon: float) -> None:
    network, x = model(), images()
    for made in (
        pgd_images(network, x, LABELS, epsilon, 4, generator()),
        rfgsm_images(network, x, epsilon, generator()),
    ):
        assert float((made - x).abs().max()) <= epsilon + 1e-6
        assert float(made.min()) >= 0
        assert float(made.max()) <= 1


def test_pgd_raises_the_loss_and_more_steps_raise_it_further() -> None:
    network, x = model(), images()

    def loss(pixels: Tensor) -> float:
        return F.cross_entropy(network(pixels), LABELS).item()

    one, many = (pgd_images(network, x, LABELS, 0.1, steps, generator()) for steps in (1, 20))
    assert loss(x) < loss(one) <= loss(many)


def test_the_same_generator_gives_the_same_images() -> None:
    network, x = model(), images()
    assert torch.equal(rfgsm_images(network, x, 0.1, generator()), rfgsm_images(network, x, 0.1, generator()))
    assert not torch.equal(rfgsm_images(network, x, 0.1, generator()), rfgsm_images(network, x, 0.1, generator(8)))


def test_attacks_leave_no_gradient_in_the_parameters() -> None:
    network, x = model(), images()
    pgd_images(network, x, LABELS, 0.1, 2, generator())
    rfgsm_images(network, x, 0.1, generator())
    assert all(parameter.grad is None for parameter in network.parameters())


class ModeProbe(nn.Module):
    """Notes in which mode, and with which images, it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()
        self.calls: list[tuple[bool, Tensor]] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls.append((self.training, pixels.detach().clone()))
        logits: Tensor = self.inner(pixels)
        return logits


def test_adversarial_training_attacks_in_eval_mode_and_learns_in_train_mode() -> None:
    probe, x = ModeProbe(), images()
    loss = pgd_adversarial_training(0.1, 3)(probe, x, LABELS, generator())
    assert [training for training, _ in probe.calls] == [False, False, False, True]
    adversarial = pgd_images(probe.inner, x, LABELS, 0.1, 3, generator())
    assert loss.item() == pytest.approx(F.cross_entropy(probe.inner(adversarial), LABELS).item(), rel=1e-6)


def test_robust_finetuning_is_its_formula_with_gradients_through_both_branches() -> None:
    probe, x = ModeProbe(), images()
    loss = robust_finetuning(0.1, 2.0)(probe, x, LABELS, generator())
    assert [training for training, _ in probe.calls] == [False, False, True, True]
    network = probe.inner
    adversarial = rfgsm_images(network, x, 0.1, generator())
    clean, other = network(x), network(adversarial)
    expected = F.cross_entropy(clean, LABELS) + 2 * restated_kl(clean, other)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = list(network.parameters())
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_natural_is_the_cross_entropy() -> None:
    network, x = model(), images()
    assert natural()(network, x, LABELS, generator()).item() == F.cross_entropy(network(x), LABELS).item()
