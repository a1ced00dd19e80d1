"""Adversarial images for training: the inner maximisations of the objectives, each by plain sign-gradient ascent.

The model is any function of the images to logits, in eval mode while the images are made. Random numbers are drawn
where the generator is, so a generator on the CPU gives the same noise on any device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor], Tensor]
LossOfLogits = Callable[[Tensor], Tensor]

GAUSSIAN_START = 0.001
"""Standard deviation, in pixel units, of the noise TRADES and MART start from."""


def kl_divergences(clean_logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(p(x) || p(x')) of each sample, ``(samples,)``."""
    return F.kl_div(
        F.log_softmax(other_logits, 1), F.log_softmax(clean_logits, 1), reduction="none", log_target=True
    ).sum(1)


def kl_divergence(clean_logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(p(x) || p(x')), mean over the samples."""
    return kl_divergences(clean_logits, other_logits).mean()


def input_gradient(model: Model, images: Tensor, loss: LossOfLogits) -> Tensor:
    """Gradient of a loss of the logits with respect to the images; parameters gather nothing."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(images)), images)
    return gradient


def ascend(
    model: Model, images: Tensor, start: Tensor, loss: LossOfLogits, *, epsilon: float, steps: int, step_size: float
) -> Tensor:
    """Projected sign-gradient ascent in the ball B of radius epsilon around x, within [0, 1]::

        x_{k+1} = clip_B(x_k + step_size sign(grad loss(f(x_k))))

    Args:
        model: what is attacked.
        images: x, ``(samples, ...)`` in [0, 1].
        start: x_0, taken as it is; every later iterate lies in B.
        loss: of the logits, to be raised.
        epsilon: l-infinity radius in pixel units.
        steps: gradients.
        step_size: pixel units.
    """
    low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    for _ in range(steps):
        start = (start + step_size * input_gradient(model, start, loss).sign()).clamp(low, high)
    return start


def pgd_images(
    model: Model, images: Tensor, labels: Tensor, epsilon: float, steps: int, generator: torch.Generator
) -> Tensor:
    """PGD on the cross-entropy (Madry et al., ICLR 2018): steps of 2.5 epsilon / steps from a uniform start in B.

    Arguments as for :func:`ascend`; ``labels`` are ``(samples,)`` class numbers.
    """
    noise = 2 * torch.rand(images.shape, generator=generator, device=generator.device).to(images) - 1
    start = (images + epsilon * noise).clamp(0, 1)
    return _ascend_cross_entropy(model, images, start, labels, epsilon, steps)


def mart_images(
    model: Model, images: Tensor, labels: Tensor, epsilon: float, steps: int, generator: torch.Generator
) -> Tensor:
    """The inner maximisation of MART (Wang et al., ICLR 2020): as PGD, from x + 0.001 N(0, I)."""
    return _ascend_cross_entropy(model, images, _gaussian_start(images, generator), labels, epsilon, steps)


def trades_images(model: Model, images: Tensor, epsilon: float, steps: int, generator: torch.Generator) -> Tensor:
    """The inner maximisation of TRADES (Zhang et al., ICML 2019): raises KL(p(x) || p(x')), p(x) held fixed.

    From x + 0.001 N(0, I), steps of 2.5 epsilon / steps. Arguments as for :func:`ascend`.
    """
    start = _gaussian_start(images, generator)
    return _ascend_kl(model, images, start, epsilon, steps, 2.5 * epsilon / steps)


def rfgsm_images(model: Model, images: Tensor, epsilon: float, generator: torch.Generator, *, steps: int = 1) -> Tensor:
    """RFGSM on the KL divergence (Özdenizci & Legenstein, TMLR 2024), or PGD from the same start::

        x_0 = clip(x + a sign(n)),  n ~ N(0, I),  a = epsilon / 2
        x_{k+1} = clip(x + clip_e(x_k + h sign(grad KL(p(x) || p(x_k))) - x)),  k = 0 .. steps - 1

    with h = epsilon - a for one step, the paper's, and h = 2.5 (epsilon - a) / steps for more; p(x) is held fixed.
    Arguments as for :func:`ascend`.
    """
    alpha = epsilon / 2
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
    start = (images + alpha * noise.sign()).clamp(0, 1)
    step_size = epsilon - alpha if steps == 1 else 2.5 * (epsilon - alpha) / steps
    return _ascend_kl(model, images, start, epsilon, steps, step_size)


def _gaussian_start(images: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
    return images + GAUSSIAN_START * noise


def _ascend_cross_entropy(
    model: Model, images: Tensor, start: Tensor, labels: Tensor, epsilon: float, steps: int
) -> Tensor:
    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    return ascend(model, images, start, loss, epsilon=epsilon, steps=steps, step_size=2.5 * epsilon / steps)


def _ascend_kl(model: Model, images: Tensor, start: Tensor, epsilon: float, steps: int, step_size: float) -> Tensor:
    with torch.no_grad():
        clean_logits = model(images)

    def loss(logits: Tensor) -> Tensor:
        return kl_divergence(clean_logits, logits)

    return ascend(model, images, start, loss, epsilon=epsilon, steps=steps, step_size=step_size)
