"""Training objectives as pure functions of a model and a mini-batch.

In the formulas f are the logits, p = softmax(f), x' the adversarial image of x. Adversarial images are made in eval
mode, the loss is taken in train mode, and gradients pass through every branch of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardware.surrogates import Surrogate
from pipeline.inner_attacks import (
    Model,
    kl_divergence,
    kl_divergences,
    mart_images,
    pgd_images,
    rfgsm_images,
    trades_images,
)

Objective = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
"""(model, images ``(samples, ...)``, labels ``(samples,)``, generator) to a loss; leaves the model in train mode."""


def natural() -> Objective:
    """CE(f(x), y)."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        model.train()
        return F.cross_entropy(model(images), labels)

    return loss


def pgd_adversarial_training(epsilon: float, steps: int = 10) -> Objective:
    """CE(f(x'), y), x' by :func:`~pipeline.inner_attacks.pgd_images` (Madry et al., ICLR 2018)."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        model.eval()
        adversarial = pgd_images(model, images, labels, epsilon, steps, generator)
        model.train()
        return F.cross_entropy(model(adversarial), labels)

    return loss


def trades(epsilon: float, steps: int = 10, beta: float = 6.0) -> Objective:
    """CE(f(x), y) + beta KL(p(x) || p(x')), x' by :func:`~pipeline.inner_attacks.trades_images`.

    Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019.
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        model.eval()
        adversarial = trades_images(model, images, epsilon, steps, generator)
        return _regularised(model, images, adversarial, labels, beta)

    return loss


def mart(epsilon: float, steps: int = 10, beta: float = 4.0) -> Objective:
    """CE(f(x'), y) - log(1.0001 - max_{k != y} p_k(x')) + beta KL(p(x) || p(x')) (1 - p_y(x)), means over the samples.

    x' by :func:`~pipeline.inner_attacks.mart_images` (Wang et al., "Improving Adversarial Robustness Requires
    Revisiting Misclassified Examples", ICLR 2020).
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        model.eval()
        adversarial = mart_images(model, images, labels, epsilon, steps, generator)
        model.train()
        clean, attacked = model(images), model(adversarial)
        is_label = F.one_hot(labels, clean.shape[1]).bool()
        largest_wrong = attacked.softmax(1).masked_fill(is_label, 0).amax(1)
        doubt = 1 - (clean.softmax(1) * is_label).sum(1)
        margins: Tensor = -(1.0001 - largest_wrong).log()
        divergences: Tensor = kl_divergences(clean, attacked) * doubt
        return F.cross_entropy(attacked, labels) + margins.mean() + beta * divergences.mean()

    return loss


def robust_finetuning(
    epsilon: float, beta: float = 2.0, *, attack_steps: int = 1, surrogates: Sequence[Surrogate] = ()
) -> Objective:
    """CE(f(x), y) + beta KL(p(x) || p(x')), x' by :func:`~pipeline.inner_attacks.rfgsm_images`.

    Özdenizci & Legenstein, TMLR 2024, with one attack step through the gradient the SNN learns with. Both can be
    changed, the gradient of the loss itself cannot.

    Args:
        epsilon: l-infinity radius in pixel units.
        beta: weight of the KL term.
        attack_steps: gradients per adversarial image.
        surrogates: the inner attack of each batch goes through one of them, drawn at random, so that the SNN does not
            learn to hide from a single one; none leaves it to the model, which then need not be spiking.
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        model.eval()
        attacked = _through_one_of(surrogates, model, generator)
        adversarial = rfgsm_images(attacked, images, epsilon, generator, steps=attack_steps)
        return _regularised(model, images, adversarial, labels, beta)

    return loss


def _regularised(model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    model.train()
    clean = model(images)
    return F.cross_entropy(clean, labels) + beta * kl_divergence(clean, model(adversarial))


def _through_one_of(surrogates: Sequence[Surrogate], model: nn.Module, generator: torch.Generator) -> Model:
    if not surrogates:
        return model
    drawn = torch.randint(len(surrogates), (), generator=generator, device=generator.device)
    return partial(model, surrogate=surrogates[int(drawn)])
