"""Each objective against its formula, restated sample by sample, on a network whose two modes differ."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hardware.surrogates import ENSEMBLE, Surrogate
from pipeline.inner_attacks import mart_images, pgd_images, rfgsm_images, trades_images
from pipeline.objectives import Objective, mart, natural, pgd_adversarial_training, robust_finetuning, trades
from tests.pipeline.samples import easy_data, spiking_network

LABELS = torch.arange(9) % 3
EPSILON = 0.1


def model() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3))
    return network.double()


def images() -> Tensor:
    return torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ce(f: Tensor, y: int) -> Tensor:
    return -(f[y].exp() / f.exp().sum()).log()


def kl(f: Tensor, g: Tensor) -> Tensor:
    p, q = f.exp() / f.exp().sum(), g.exp() / g.exp().sum()
    return sum((p[k] * (p[k] / q[k]).log() for k in range(len(p))), start=torch.zeros(()))


def mart_term(f: Tensor, g: Tensor, y: int, beta: float) -> Tensor:
    p, q = f.exp() / f.exp().sum(), g.exp() / g.exp().sum()
    wrong = max((q[k] for k in range(len(q)) if k != y), key=lambda probability: probability.item())
    return ce(g, y) - (1.0001 - wrong).log() + beta * kl(f, g) * (1 - p[y])


# Adversarial images of the model in eval mode, and the loss of one sample from its clean and attacked logits.
Made = Callable[[nn.Module, Tensor, torch.Generator], Tensor]
OfSample = Callable[[Tensor, Tensor, int], Tensor]
CASES: dict[str, tuple[Objective, Made, OfSample]] = {
    "natural": (natural(), lambda _m, x, _g: x, lambda f, _, y: ce(f, y)),
    "pgd-at": (
        pgd_adversarial_training(EPSILON, 3),
        lambda m, x, g: pgd_images(m, x, LABELS, EPSILON, 3, g),
        lambda _, g, y: ce(g, y),
    ),
    "pgd-at of 10 steps": (
        pgd_adversarial_training(EPSILON),
        lambda m, x, g: pgd_images(m, x, LABELS, EPSILON, 10, g),
        lambda _, g, y: ce(g, y),
    ),
    "trades": (
        trades(EPSILON),
        lambda m, x, g: trades_images(m, x, EPSILON, 10, g),
        lambda f, g, y: ce(f, y) + 6 * kl(f, g),
    ),
    "trades of other weight": (
        trades(EPSILON, 2, 1.5),
        lambda m, x, g: trades_images(m, x, EPSILON, 2, g),
        lambda f, g, y: ce(f, y) + 1.5 * kl(f, g),
    ),
    "mart": (
        mart(EPSILON),
        lambda m, x, g: mart_images(m, x, LABELS, EPSILON, 10, g),
        lambda f, g, y: mart_term(f, g, y, 4),
    ),
    "mart of other weight": (
        mart(EPSILON, 2, 1.5),
        lambda m, x, g: mart_images(m, x, LABELS, EPSILON, 2, g),
        lambda f, g, y: mart_term(f, g, y, 1.5),
    ),
    "fine-tuning": (
        robust_finetuning(EPSILON),
        lambda m, x, g: rfgsm_images(m, x, EPSILON, g),
        lambda f, g, y: ce(f, y) + 2 * kl(f, g),
    ),
    "fine-tuning of 3 steps": (
        robust_finetuning(EPSILON, 8.0, attack_steps=3),
        lambda m, x, g: rfgsm_images(m, x, EPSILON, g, steps=3),
        lambda f, g, y: ce(f, y) + 8 * kl(f, g),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_formula(name: str) -> None:
    objective, made, of_sample = CASES[name]
    network, x = model(), images()
    restated = copy.deepcopy(network)
    loss = objective(network, x, LABELS, generator())

    adversarial = made(restated.eval(), x, generator())
    restated.train()
    if name == "natural":
        clean = attacked = restated(x)
    elif name.startswith("pgd-at"):
        clean = attacked = restated(adversarial)
    else:
        clean, attacked = restated(x), restated(adversarial)
    samples = [of_sample(f, g, y) for f, g, y in zip(clean, attacked, LABELS.tolist(), strict=True)]
    expected = torch.stack(samples).mean()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    wanted = torch.autograd.grad(expected, list(restated.parameters()))
    for found, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-10)
    # Batch norm has seen what it should, in the same order, and nothing of the attack.
    for key, value in restated.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], value)
    assert network.training


class ModeProbe(nn.Module):
    """Notes in which mode it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()
        self.modes: list[bool] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.modes.append(self.training)
        logits: Tensor = self.inner(pixels)
        return logits


@pytest.mark.parametrize(
    ("objective", "attack_calls", "loss_calls"),
    [
        (natural(), 0, 1),
        (pgd_adversarial_training(EPSILON, 3), 3, 1),
        (trades(EPSILON, 3), 4, 2),
        (mart(EPSILON, 3), 3, 2),
        (robust_finetuning(EPSILON), 2, 2),
        (robust_finetuning(EPSILON, attack_steps=3), 4, 2),
    ],
    ids=["natural", "pgd-at", "trades", "mart", "fine-tuning", "fine-tuning of 3 steps"],
)
def test_attacks_run_in_eval_mode_and_losses_in_train_mode(
    objective: Objective, attack_calls: int, loss_calls: int
) -> None:
    probe = ModeProbe()
    objective(probe, images(), LABELS, generator())
    assert probe.modes == [False] * attack_calls + [True] * loss_calls


class SurrogateProbe(nn.Module):
    """A spiking network that notes through which surrogate it is asked, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = spiking_network(steps=3)
        self.asked: list[tuple[bool, Surrogate | None]] = []

    def forward(self, pixels: Tensor, surrogate: Surrogate | None = None) -> Tensor:
        self.asked.append((self.training, surrogate))
        return self.inner(pixels, surrogate)


DATA = easy_data(8)
PIXELS, CLASSES = torch.from_numpy(DATA.codes).float() / 255, torch.from_numpy(DATA.labels)


def test_each_batch_is_attacked_through_one_rule_of_the_ensemble_and_learns_with_its_own() -> None:
    probe, source, drawn = SurrogateProbe(), generator(), []
    objective = robust_finetuning(EPSILON, surrogates=ENSEMBLE)
    for _ in range(60):
        probe.asked.clear()
        objective(probe, PIXELS, CLASSES, source)
        (in_attack,) = {rule for training, rule in probe.asked if not training}
        assert [rule for training, rule in probe.asked if training] == [None, None]
        drawn.append(in_attack)
    assert set(drawn) <= set(ENSEMBLE)
    assert len(set(drawn)) > 10
    again = generator()
    for rule in drawn[:5]:
        probe.asked.clear()
        objective(probe, PIXELS, CLASSES, again)
        assert probe.asked[0][1] == rule


def test_without_an_ensemble_the_attack_goes_through_the_network_as_it_is() -> None:
    probe = SurrogateProbe()
    robust_finetuning(EPSILON)(probe, PIXELS, CLASSES, generator())
    assert {rule for _, rule in probe.asked} == {None}


def test_the_surrogate_drawn_changes_the_images_but_not_the_gradient_of_the_loss() -> None:
    """With the images fixed, the loss of a network attacked through another rule has the triangle's gradient."""
    network, rule, epsilon = spiking_network(steps=8), Surrogate("straight_through"), 0.4
    start = copy.deepcopy(network)
    loss = robust_finetuning(epsilon, surrogates=(rule,))(network, PIXELS, CLASSES, generator())

    def after_the_draw() -> torch.Generator:
        source = generator()
        torch.randint(1, (), generator=source)
        return source

    start.eval()
    adversarial = rfgsm_images(lambda x: start(x, rule), PIXELS, epsilon, after_the_draw())
    assert not torch.equal(adversarial, rfgsm_images(start, PIXELS, epsilon, after_the_draw()))
    start.train()
    clean, attacked = start(PIXELS), start(adversarial)
    expected = torch.stack(
        [ce(f, y) + 2 * kl(f, g) for f, g, y in zip(clean, attacked, CLASSES.tolist(), strict=True)]
    ).mean()
    for found, right in zip(
        torch.autograd.grad(loss, list(network.parameters())),
        torch.autograd.grad(expected, list(start.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)
