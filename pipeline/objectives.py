"""Training objectives and the adversarial examples they train on, as pure functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LossOfLogits = Callable[[Tensor], Tensor]
Objective = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def kl_divergence(clean_logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(p(x) || p(x')), mean over the samples."""
    return F.kl_div(
        F.log_softmax(other_logits, 1), F.log_softmax(clean_logits, 1), reduction="batchmean", log_target=True
    )


def input_gradient(model: nn.Module, images: Tensor, loss: LossOfLogits) -> Tensor:
    """Gradient of a loss of the logits with respect to the images; parameters gather nothing."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(images)), images)
    return gradient


def pgd_images(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, steps: int, generator: torch.Generator
) -> Tensor:
    """PGD for training: cross-entropy, uniform start in the ball, steps of 2.5 epsilon / steps.

    Args:
        model: in eval mode while the images are made.
        images: ``(samples, ...)`` in [0, 1].
        epsilon: l-infinity radius in pixel units.
    """
    low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    adversarial = images + epsilon * (2 * torch.rand(images.shape, generator=generator) - 1)
    adversarial = adversarial.clamp(low, high)
    for _ in range(steps):
        gradient = input_gradient(model, adversarial, lambda logits: F.cross_entropy(logits, labels))
        adversarial = (adversarial + 2.5 * epsilon / steps * gradient.sign()).clamp(low, high)
    return adversarial


def rfgsm_images(model: nn.Module, images: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """RFGSM on the KL divergence (Özdenizci & Legenstein, TMLR 2024)::

        x0 = clip(x + a sign(n)), n ~ N(0, I);   x' = clip(x + clip_e(x0 + (e - a) sign(grad KL(p(x) || p(x0))) - x))

    with a = epsilon / 2.
    """
    alpha = epsilon / 2
    with torch.no_grad():
        clean_logits = model(images)
    noise = torch.randn(images.shape, generator=generator)
    start = (images + alpha * noise.sign()).clamp(0, 1)
    gradient = input_gradient(model, start, lambda logits: kl_divergence(clean_logits, logits))
    moved = start + (epsilon - alpha) * gradient.sign()
    return (images + (moved - images).clamp(-epsilon, epsilon)).clamp(0, 1)


def natural() -> Objective:
    """CE(f(x), y)."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        return F.cross_entropy(model(images), labels)

    return loss


def pgd_adversarial_training(epsilon: float, steps: int) -> Objective:
    """CE(f(x'), y), x' by PGD in eval mode, the loss in train mode (Madry et al., ICLR 2018)."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        model.eval()
        adversarial = pgd_images(model, images, labels, epsilon, steps, generator)
        model.train()
        return F.cross_entropy(model(adversarial), labels)

    return loss


def robust_finetuning(epsilon: float, beta: float) -> Objective:
    """CE(f(x), y) + beta KL(p(x) || p(x')), x' by RFGSM in eval mode, gradients through both branches."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        model.eval()
        adversarial = rfgsm_images(model, images, epsilon, generator)
        model.train()
        clean_logits = model(images)
        return F.cross_entropy(clean_logits, labels) + beta * kl_divergence(clean_logits, model(adversarial))

    return loss
