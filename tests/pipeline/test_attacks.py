from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pipeline.attacks.gradient import Crafted, pgd
from torch import Tensor

from hardware.surrogates import Surrogate
from pipeline.attacks import gradient
from pipeline.attacks.black_box import margins, random_noise, square
from pipeline.attacks.ensemble import QUICK, pgd_ensemble
from pipeline.attacks.targets import (
    Codes,
    FloatTarget,
    GradientTarget,
    IntegerTarget,
    Labels,
    Logits,
    budget_of,
    correct,
    to_images,
)
from pipeline.quantization import quantize
from tests.pipeline.samples import random_images, spiking_network

SHAPE = (1, 8, 8)
TRIANGLE = QUICK[0]
MODELS = ["float", "integer"]


@cache
def target(model: str) -> GradientTarget:
    network = spiking_network("conv", seed=1)
    if model == "float":
        return FloatTarget(network)
    return IntegerTarget(quantize(network, random_images(SHAPE, 16, 3), 8, {}).network)


@cache
def clean(samples: int = 24) -> Codes:
    return random_images(SHAPE, samples, seed=5)


def own_answers(model: str, codes: Codes) -> Labels:
    answers: Labels = target(model).logits(codes).argmax(1)
    return answers


def indices(count: int) -> NDArray[np.int64]:
    return np.arange(count) + 100


def run_pgd(model: str, codes: Codes, labels: Labels, budget: int, **options: Any) -> Crafted:
    settings: dict[str, Any] = {"steps": 4, "surrogate": TRIANGLE, "seed": 2, **options}
    return pgd(target(model), codes, labels, indices(len(codes)), budget=budget, **settings)


def run_ensemble(model: str, codes: Codes, labels: Labels, budget: int) -> Crafted:
    return pgd_ensemble(target(model), codes, labels, indices(len(codes)), budget=budget, steps=3, seed=2)


def run_square(model: str, codes: Codes, labels: Labels, budget: int, queries: int = 12) -> Crafted:
    return square(target(model), codes, labels, indices(len(codes)), budget=budget, queries=queries, seed=2)


ATTACKS = {"pgd": run_pgd, "ensemble": run_ensemble, "square": run_square}


def assert_within(made: Codes, codes: Codes, budget: int) -> None:
    assert made.dtype == np.uint8
    assert made.shape == codes.shape
    assert np.abs(made.astype(int) - codes.astype(int)).max() <= budget


@settings(max_examples=12)
@given(budget=st.sampled_from([0, 1, 2, 25, 128, 255]), seed=st.integers(0, 50), edges=st.booleans())
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_budgets_and_the_pixel_range_are_kept(attack: str, model: str, budget: int, seed: int, edges: bool) -> None:
    codes = random_images(SHAPE, 3, seed)
    if edges:
        codes = np.where(codes < 128, 0, 255).astype(np.uint8)
    made = ATTACKS[attack](model, codes, np.arange(3), budget)
    assert_within(made.codes, codes, budget)
    assert made.fooled.shape == (3,)


@given(budget=st.integers(0, 255), seed=st.integers(0, 1000))
def test_noise_moves_every_pixel_by_the_whole_budget_where_there_is_room(budget: int, seed: int) -> None:
    codes = random_images(SHAPE, 3, seed)
    noisy = random_noise(codes, indices(3), budget=budget, seed=seed)
    assert_within(noisy, codes, budget)
    moved = np.abs(noisy.astype(int) - codes)
    cut = (noisy == 0) | (noisy == 255)
    assert np.all((moved == budget) | cut)


@pytest.mark.parametrize(
    ("epsilon", "codes"), [(0.0, 0), (1.0, 255), (0.1, 25), (1 / 255, 1), (8 / 255, 8), (0.5, 127), (0.003, 0)]
)
def test_a_budget_is_the_whole_codes_within_epsilon(epsilon: float, codes: int) -> None:
    assert budget_of(epsilon) == codes


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_called_fooled_is_fooled_and_nothing_else(attack: str, model: str) -> None:
    labels = own_answers(model, clean())
    made = ATTACKS[attack](model, clean(), labels, 40)
    assert made.fooled.any()
    judged = ~correct(target(model), made.codes, labels)
    assert np.array_equal(made.fooled, judged)


@pytest.mark.parametrize("model", MODELS)
def test_an_image_that_is_wrong_already_stays_as_it_is_and_counts(model: str) -> None:
    labels = (own_answers(model, clean()) + 1) % 4
    made = run_ensemble(model, clean(), labels, 10)
    assert made.fooled.all()
    assert np.array_equal(made.codes, clean())
    assert made.queries == 1


@dataclass(frozen=True)
class Scripted:
    """A target with one weight per pixel whose answer flips only in the middle of the attack."""

    name: str = "scripted"
    asked: list[Tensor] = field(default_factory=list)

    def logits(self, codes: Codes) -> Logits:  # noqa: ARG002
        raise AssertionError("not asked without gradients")

    def forward(self, images: Tensor, surrogate: Surrogate) -> Tensor:  # noqa: ARG002
        self.asked.append(images.detach().clone())
        call = len(self.asked)
        total = images.flatten(1).sum(1)
        right = 5.0 if call != 2 else -5.0
        return torch.stack([right - 0.01 * total, 0.01 * total], 1)


def test_any_iterate_counts_and_the_one_that_fooled_is_returned() -> None:
    scripted, codes = Scripted(), clean(3)
    made = pgd(scripted, codes, np.zeros(3, np.int64), indices(3), budget=20, steps=4, surrogate=TRIANGLE, seed=0)
    assert len(scripted.asked) == 5
    assert made.fooled.all()
    assert np.array_equal(made.codes, (scripted.asked[1] * 255).round().numpy().astype(np.uint8))


def test_what_is_shown_to_the_model_lies_on_the_code_grid() -> None:
    scripted = Scripted()
    pgd(scripted, clean(3), np.zeros(3, np.int64), indices(3), budget=7, steps=4, surrogate=TRIANGLE, seed=0)
    for images in scripted.asked:
        codes = images * 255
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_neither_order_nor_batching_matters(attack: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, labels, count = clean(10), own_answers(model, clean(10)), 10
    whole = ATTACKS[attack](model, codes, labels, 30)
    order = np.random.default_rng(0).permutation(count)
    monkeypatch.setattr(gradient, "BATCH", 3)

    def again(rows: NDArray[np.int64]) -> Crafted:
        options: dict[str, Any] = {"budget": 30, "seed": 2}
        arguments = (target(model), codes[rows], labels[rows], indices(count)[rows])
        if attack == "pgd":
            return pgd(*arguments, steps=4, surrogate=TRIANGLE, **options)
        if attack == "ensemble":
            return pgd_ensemble(*arguments, steps=3, **options)
        return square(*arguments, queries=12, **options)

    shuffled = again(order)
    assert np.array_equal(shuffled.codes, whole.codes[order])
    assert np.array_equal(shuffled.fooled, whole.fooled[order])


def test_another_seed_starts_elsewhere() -> None:
    labels = own_answers("integer", clean())
    first, second = (run_pgd("integer", clean(), labels, 10, seed=seed) for seed in (1, 2))
    assert not np.array_equal(first.codes, second.codes)


@pytest.mark.parametrize("model", MODELS)
def test_pgd_is_stronger_than_noise_and_the_ensemble_than_its_first_member(model: str) -> None:
    codes = clean(64)
    labels, budget = own_answers(model, codes), 25
    noisy = random_noise(codes, indices(64), budget=budget, seed=0)
    by_noise = int((~correct(target(model), noisy, labels)).sum())
    one = run_pgd(model, codes, labels, budget, steps=8)
    every = pgd_ensemble(target(model), codes, labels, indices(64), budget=budget, steps=8, seed=2)
    assert one.fooled.sum() > 2 * by_noise
    assert np.all(every.fooled >= one.fooled)
    assert every.fooled.sum() > one.fooled.sum()


def test_the_ensemble_keeps_what_its_first_success_returned() -> None:
    codes, labels = clean(), own_answers("integer", clean())
    first = run_pgd("integer", codes, labels, 30, steps=3)
    every = run_ensemble("integer", codes, labels, 30)
    assert np.array_equal(every.codes[first.fooled], first.codes[first.fooled])


@pytest.mark.parametrize("model", MODELS)
def test_square_never_worsens_the_margin(model: str) -> None:
    codes = clean(6)
    labels = own_answers(model, codes)

    class Watched:
        name = "watched"

        def __init__(self) -> None:
            self.calls: list[tuple[Codes, NDArray[np.float64]]] = []

        def logits(self, shown: Codes) -> Logits:
            logits = target(model).logits(shown)
            self.calls.append((shown.copy(), logits))
            return logits

    watched = Watched()
    made = square(watched, codes, labels, indices(6), budget=20, queries=30, seed=4)
    start = margins(watched.calls[0][1], labels)
    end = margins(target(model).logits(made.codes), labels)
    assert np.all(end <= start)
    assert np.any(end < start)
    assert len(watched.calls) <= 30


def test_margins_are_the_label_against_the_best_other() -> None:
    logits = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    assert margins(logits, np.array([0, 1])).tolist() == [1.0, 0.0]
    assert margins(logits, np.array([1, 0])).tolist() == [-2.0, 0.0]


def test_square_on_no_images_at_all() -> None:
    none = clean(4)[:0]
    made = run_square("integer", none, np.zeros(0, np.int64), 10)
    assert made.codes.shape == none.shape
    assert made.fooled.shape == (0,)


def test_a_surrogate_that_is_zero_everywhere_is_counted() -> None:
    labels = own_answers("integer", clean(6))
    dead = Surrogate("rectangle", 1e-12)
    for model in MODELS:
        made = run_pgd(model, clean(6), labels, 20, surrogate=dead)
        assert made.zero_gradients == 1.0
        alive = run_pgd(model, clean(6), labels, 20)
        assert alive.zero_gradients is not None
        assert alive.zero_gradients < 0.5


def test_no_attack_changes_the_images_it_was_given() -> None:
    codes, labels = clean(6).copy(), own_answers("integer", clean(6))
    for attack in ATTACKS.values():
        attack("integer", codes, labels, 30)
    assert np.array_equal(codes, clean(6))


def test_targets_answer_in_any_batch_alike() -> None:
    codes = random_images(SHAPE, 150, 8)
    for model in MODELS:
        whole = target(model).logits(codes)
        parts = np.concatenate([target(model).logits(codes[:1]), target(model).logits(codes[1:])])
        assert whole.shape == (150, 4)
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


def test_the_integer_target_is_the_emulator_and_its_twin_alike() -> None:
    codes = clean()
    twin = target("integer").forward(to_images(codes), TRIANGLE).detach().numpy()
    np.testing.assert_allclose(twin, target("integer").logits(codes), rtol=1e-6)
