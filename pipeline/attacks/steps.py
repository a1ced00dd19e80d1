"""The trajectories of gradient attacks: each walks a :class:`Search` for a number of gradient steps.

Sources: FGSM (Goodfellow et al., ICLR 2015), RFGSM (Tramèr et al., ICLR 2018), PGD (Madry et al., ICLR 2018), APGD
(Croce & Hein, ICML 2020), SA-PGD (arXiv 2512.22522).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.attacks.search import Search

Walk = Callable[[Search, int], None]
MOMENTUM, RHO = 0.75, 0.75


def fgsm(search: Search, steps: int) -> None:  # noqa: ARG001 - one step by definition
    """x + budget sign(g)."""
    _, gradient = search.ask(search.clean)
    search.ask(search.project(search.clean + search.budget * gradient.sign()), differentiate=False)


def rfgsm(search: Search, steps: int) -> None:  # noqa: ARG001 - one step by definition
    """Half the budget at random, the other half along the gradient there."""
    half = search.budget / 2
    start = search.project(search.clean + half * search.normal_signs())
    _, gradient = search.ask(start)
    search.ask(search.project(start + (search.budget - half) * gradient.sign()), differentiate=False)


def pgd(search: Search, steps: int) -> None:
    """Uniform start, signed steps of 2.5 budget / steps."""
    iterate = search.uniform_start()
    for _ in range(steps):
        _, gradient = search.ask(iterate)
        iterate = search.project(iterate + 2.5 * search.budget / steps * gradient.sign())
    search.ask(iterate, differentiate=False)


def apgd(search: Search, steps: int) -> None:
    """Signed steps with momentum; the step starts at twice the budget and is halved, going back to the best point,
    at checkpoints where it brought too little.
    """
    iterate = _full_start(search)
    loss, gradient = search.ask(iterate)
    control = StepControl(iterate, loss, gradient, 2.0 * search.budget, steps)
    previous = iterate
    for step in range(steps):
        size = control.size_like(iterate)
        proposal = search.project(iterate + size * gradient.sign())
        momentum = 1.0 if step == 0 else MOMENTUM
        moved = iterate + momentum * (proposal - iterate) + (1 - momentum) * (iterate - previous)
        previous, iterate = iterate, search.project(moved)
        last = step == steps - 1
        loss, gradient = search.ask(iterate, differentiate=not last)
        if not last:
            iterate, gradient = control.after(step, iterate, loss, gradient)


def sa_pgd(search: Search, steps: int) -> None:
    """Steps along the gradient's momentum, each pixel scaled by its own history::

    m <- 0.5 m + g / mean|g|;  v <- 0.8 v + g^2 / mean(g^2);  x <- P(x + clip(eta m / sqrt(v), +-eta))

    eta starts at the budget and is halved by APGD's schedule.
    """
    iterate = search.uniform_start()
    loss, gradient = search.ask(iterate)
    control = StepControl(iterate, loss, gradient, float(search.budget), steps)
    first, second = torch.zeros_like(iterate), torch.zeros_like(iterate)
    for step in range(steps):
        first = 0.5 * first + gradient / _mean(gradient.abs())
        second = 0.8 * second + gradient**2 / _mean(gradient**2)
        size = control.size_like(iterate)
        move = size * first / (second.sqrt() + 1e-12)
        iterate = search.project(iterate + torch.minimum(torch.maximum(move, -size), size))
        last = step == steps - 1
        loss, gradient = search.ask(iterate, differentiate=not last)
        if not last:
            iterate, gradient = control.after(step, iterate, loss, gradient)


WALKS: Mapping[str, Walk] = {"FGSM": fgsm, "RFGSM": rfgsm, "PGD": pgd, "APGD": apgd, "SA-PGD": sa_pgd}


def checkpoints(steps: int) -> list[int]:
    """Steps at which APGD looks back: shares 0.22, then gaps that shrink by 0.03 down to 0.06 of all steps."""
    found: list[int] = []
    gap, reached = max(int(0.22 * steps), 1), 0
    while reached + gap <= steps:
        reached += gap
        found.append(reached)
        gap = max(gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found


class StepControl:
    """APGD's step size, per image.

    At a checkpoint the step is halved and the walk returns to its best point if fewer than ``RHO`` of the steps since
    the last one raised the loss, or if neither the step nor the best loss changed since then.
    """

    def __init__(self, iterate: Tensor, loss: Tensor, gradient: Tensor, size: float, steps: int) -> None:
        self._best, self._best_loss, self._best_gradient = iterate.clone(), loss.clone(), gradient.clone()
        self._size = torch.full((len(iterate),), size)
        self._checkpoints = checkpoints(steps)
        self._last_checkpoint = 0
        self._previous_loss = loss
        self._raised = torch.zeros(len(iterate))
        self._loss_at_checkpoint = loss.clone()
        self._halved = torch.ones(len(iterate), dtype=torch.bool)

    def size_like(self, iterate: Tensor) -> Tensor:
        """Step sizes in codes, shaped to multiply ``iterate``."""
        return self._size.view(-1, *([1] * (iterate.ndim - 1)))

    def after(self, step: int, iterate: Tensor, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Book a step; the point and gradient to go on from."""
        self._raised += (loss > self._previous_loss).float()
        self._previous_loss = loss
        better = loss > self._best_loss
        self._best[better], self._best_loss[better] = iterate[better], loss[better]
        self._best_gradient[better] = gradient[better]
        if step + 1 not in self._checkpoints:
            return iterate, gradient
        too_few = self._raised <= RHO * (step + 1 - self._last_checkpoint)
        stuck = ~self._halved & (self._best_loss <= self._loss_at_checkpoint)
        self._halved = too_few | stuck
        self._size[self._halved] /= 2
        self._last_checkpoint, self._raised = step + 1, torch.zeros_like(self._raised)
        self._loss_at_checkpoint = self._best_loss.clone()
        iterate, gradient = iterate.clone(), gradient.clone()
        iterate[self._halved], gradient[self._halved] = self._best[self._halved], self._best_gradient[self._halved]
        return iterate, gradient


def _full_start(search: Search) -> Tensor:
    """A random direction, stretched until its largest pixel uses the whole budget."""
    offset = search.uniform_start() - search.clean
    largest = offset.flatten(1).abs().amax(1).clamp(min=1e-9).view(-1, *([1] * (offset.ndim - 1)))
    return search.project(search.clean + search.budget * offset / largest)


def _mean(values: Tensor) -> Tensor:
    per_image = values.flatten(1).mean(1).clamp(min=1e-30)
    return per_image.view(-1, *([1] * (values.ndim - 1)))
