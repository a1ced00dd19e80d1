"""Our attacks against two independent libraries, on a float CNN and on the SNN with one fixed surrogate.

What makes the comparison exact enough to count images:

- both sides start at the same points; ours are given to pyautoattack, those of torchattacks to us;
- both judge and differentiate iterates rounded to pixel codes (``OnCodes``), and the budget is a whole number of codes;
- both count any iterate that fooled, torchattacks' PGD through ``AnyIterate``;
- both aim targeted DLR at the runner-up on the clean image.

What remains is float rounding (code units here, [0, 1] there; batch norm folded or not), which now and then rounds a
pixel or a spike the other way, and APGD's count of rises at the first checkpoint, which the libraries start from a loss
of 0 and we from the loss of the start. Hence one image in sixty instead of none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyautoattack.square
import pytest
import torch
import torchattacks
from numpy.typing import NDArray
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn

from hardware.surrogates import TRIANGLE
from pipeline.attacks.black_box import square
from pipeline.attacks.losses import cross_entropy, difference_of_logits_ratio, targeted_difference_of_logits_ratio
from pipeline.attacks.search import Search, generators_of
from pipeline.attacks.steps import apgd, pgd
from pipeline.attacks.targets import Codes, FloatTarget, GradientTarget, IntegerTarget, Labels, Loss
from pipeline.statistics import mcnemar, pair
from tests.pipeline import float_models
from tests.pipeline.attack_samples import PlainTarget
from tests.pipeline.float_models import AnyIterate, FixedSurrogate, OnCodes, Victim

Fooled = NDArray[np.bool_]
SAMPLES, STEPS, ALLOWED = 60, 20, 1
ALLOWED_SINGLY = 3  # images on which one side succeeds and the other does not, in either direction
# Budgets at which some images of each fall and some do not.
VICTIMS: dict[str, tuple[Callable[[int], Victim], int]] = {
    "natural CNN": (float_models.natural_cnn, 24),
    "robust CNN": (float_models.robust_cnn, 32),
    "float SNN": (float_models.spiking, 32),
    "integer SNN": (float_models.integer, 32),
}


def our_target(victim: Victim) -> GradientTarget:
    """The victim as the pipeline attacks it: spiking models by their own fast paths."""
    if not isinstance(victim.module, FixedSurrogate):
        return PlainTarget(victim.module)
    network = victim.module.network
    if isinstance(network, float_models.Twin):
        return IntegerTarget(network.network)
    return FloatTarget(network)


def arrays_of(victim: Victim) -> tuple[Codes, Labels]:
    return (victim.images * 255).round().numpy().astype(np.uint8), victim.labels.numpy()


def right_ones(name: str, samples: int = SAMPLES) -> tuple[Victim, int]:
    """A victim with images that it gets right, so that every success is an attack's; and the budget in codes."""
    make, budget = VICTIMS[name]
    victim = make(samples + 30)
    with torch.no_grad():
        right = victim.module(victim.images).argmax(1) == victim.labels
    return Victim(victim.module, victim.images[right][:samples], victim.labels[right][:samples]), budget


class Recorded(Search):
    """A search that starts where it is told and remembers its first iterate before rounding.

    Attributes:
        given: a start in code units, or None for its own.
    """

    given: Tensor | None = None
    first: Tensor | None = None

    def uniform_start(self) -> Tensor:
        return super().uniform_start() if self.given is None else self.given

    def ask(self, iterate: Tensor, differentiate: bool = True) -> tuple[Tensor, Tensor]:
        if self.first is None:
            self.first = iterate.clone()
        return super().ask(iterate, differentiate)


def our_search(victim: Victim, budget: int, loss: Loss, seed: int) -> Recorded:
    codes, labels = arrays_of(victim)
    oracle = our_target(victim).oracle(TRIANGLE, loss)
    return Recorded(oracle, codes, labels, budget, generators_of(np.arange(len(labels)), seed, 0))


def assert_agree(ours: Fooled, theirs: Fooled) -> None:
    assert 5 <= ours.sum() <= len(ours) - 3, f"an attack that fools {ours.sum()} of {len(ours)} compares nothing"
    assert abs(int(ours.sum()) - int(theirs.sum())) <= ALLOWED, (ours.sum(), theirs.sum())
    assert (ours != theirs).sum() <= ALLOWED_SINGLY


def our_loss(kind: str, victim: Victim) -> Loss:
    if kind == "ce":
        return cross_entropy
    if kind == "dlr":
        return difference_of_logits_ratio
    loss = targeted_difference_of_logits_ratio(2)
    with torch.no_grad():
        loss(victim.module(victim.images), victim.labels)  # the first images asked about choose the targets
    return loss


def their_apgd(kind: str, model: nn.Module, victim: Victim, budget: int, start: Tensor) -> Fooled:
    options = {"n_iter": STEPS, "eps": budget / 255, "n_restarts": 1, "seed": 0, "device": "cpu"}
    if kind == "dlr-targeted":
        attack = APGDAttack_targeted(model, **options)
        with torch.no_grad():
            attack.y_target = model(victim.images).sort(dim=1)[1][:, -2]
        attack.loss = kind
    else:
        attack = APGDAttack(model, loss=kind, **options)
    attack.init_hyperparam(victim.images)
    _, right, _, _ = attack.attack_single_run(victim.images, victim.labels, x_init=start)
    fooled: Fooled = ~right.bool().numpy()
    return fooled


@pytest.mark.parametrize("kind", ["ce", "dlr", "dlr-targeted"])
@pytest.mark.parametrize("name", VICTIMS)
def test_apgd_is_that_of_pyautoattack(name: str, kind: str) -> None:
    victim, budget = right_ones(name)
    search = our_search(victim, budget, our_loss(kind, victim), seed=1)
    apgd(search, STEPS)
    assert search.first is not None
    theirs = their_apgd(kind, OnCodes(victim.module), victim, budget, search.first / 255)
    assert_agree(search.result().fooled, theirs)


@pytest.mark.parametrize("name", VICTIMS)
def test_pgd_is_that_of_torchattacks(name: str) -> None:
    victim, budget = right_ones(name)
    epsilon = budget / 255
    torch.manual_seed(3)
    start = (victim.images + torch.empty_like(victim.images).uniform_(-epsilon, epsilon)).clamp(0, 1)
    search = our_search(victim, budget, cross_entropy, seed=0)
    search.given = start * 255
    pgd(search, STEPS)
    watched = AnyIterate(OnCodes(victim.module), victim.labels)
    torch.manual_seed(3)
    last = torchattacks.PGD(watched, eps=epsilon, alpha=2.5 * epsilon / STEPS, steps=STEPS)(
        victim.images, victim.labels
    )
    with torch.no_grad():
        watched(last)
    assert_agree(search.result().fooled, watched.fooled.numpy())


@pytest.mark.parametrize("kind", ["ce", "dlr"])
@pytest.mark.parametrize("name", VICTIMS)
def test_apgd_is_as_strong_as_that_of_torchattacks_from_its_own_starts(name: str, kind: str) -> None:
    """torchattacks cannot be given starts, so the shares are compared, allowing for chance."""
    victim, budget = right_ones(name)
    search = our_search(victim, budget, our_loss(kind, victim), seed=1)
    apgd(search, STEPS)
    watched = AnyIterate(OnCodes(victim.module), victim.labels)
    torchattacks.APGD(watched, eps=budget / 255, steps=STEPS, loss=kind, seed=1)(victim.images, victim.labels)
    assert mcnemar(pair(~search.result().fooled, ~watched.fooled.numpy())) > 0.01


QUERIES, MORE_SAMPLES, GROUP = 150, 180, 20


class Cropped(nn.Module):
    """Ignores the last row and column: the libraries' windows never reach them, and now need not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images[..., :-1, :-1])
        return logits


def their_square(library: str, model: nn.Module, images: Tensor, labels: Tensor, budget: int, seed: int) -> Fooled:
    """On images with a row and a column more, and windows as large as they would be without."""
    padded, model = nn.functional.pad(images, (0, 1, 0, 1)), Cropped(model)
    share = 0.8 * images[0, 0].numel() / padded[0, 0].numel()
    options = {"norm": "Linf", "eps": budget / 255, "n_queries": QUERIES, "p_init": share, "seed": seed}
    if library == "torchattacks":
        adversarial = torchattacks.Square(model, loss="margin", **options)(padded, labels)
    else:
        attack = pyautoattack.square.SquareAttack(model, loss="margin", device="cpu", **options)
        adversarial = attack.perturb(padded, labels)
    with torch.no_grad():
        fooled: Fooled = (model(adversarial).argmax(1) != labels).numpy()
    return fooled


@pytest.mark.parametrize("library", ["pyautoattack", "torchattacks"])
@pytest.mark.parametrize("name", ["natural CNN", "float SNN"])
def test_square_fools_as_many_as_those_of_the_libraries(name: str, library: str) -> None:
    """The libraries draw one window and sign for a whole batch, so only shares can agree, within chance; groups of
    their own seeds keep the images nearly independent.
    """
    victim, budget = right_ones(name, MORE_SAMPLES)
    codes, labels = arrays_of(victim)
    target, rows = our_target(victim), np.arange(len(labels))
    ours = square(target, codes, labels, rows, budget=budget, queries=QUERIES, seed=0).fooled
    groups = zip(victim.images.split(GROUP), victim.labels.split(GROUP), strict=True)
    model = OnCodes(victim.module)
    theirs = np.concatenate([their_square(library, model, *group, budget, seed) for seed, group in enumerate(groups)])
    assert ours.sum() >= 10
    assert mcnemar(pair(~ours, ~theirs)) > 0.01, (ours.sum(), theirs.sum())
