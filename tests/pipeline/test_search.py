from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hardware.surrogates import Surrogate
from pipeline.attacks import ensemble
from pipeline.attacks.backward import Adaptive
from pipeline.attacks.ensemble import Member
from pipeline.attacks.search import Crafted, batches, join, unit_gradient
from pipeline.attacks.targets import budget_of, correct, to_images
from tests.pipeline.attack_samples import (
    EVERY_WALK,
    MODELS,
    SHAPE,
    ScriptedOracle,
    assert_same,
    assert_within,
    attack,
    brighter,
    brightness,
    clean,
    indices,
    own_answers,
    short,
    target,
    walk_along,
)
from tests.pipeline.samples import random_images

BUDGETS = [0, 1, 25, 255]


@pytest.mark.parametrize(
    ("epsilon", "codes"), [(0.0, 0), (1.0, 255), (0.1, 25), (1 / 255, 1), (8 / 255, 8), (0.5, 127), (0.003, 0)]
)
def test_a_budget_is_the_whole_codes_within_epsilon(epsilon: float, codes: int) -> None:
    assert budget_of(epsilon) == codes


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("walk", EVERY_WALK)
def test_budgets_are_kept_on_spiking_models_and_what_is_called_fooled_is_fooled(
    walk: str, budget: int, model: str
) -> None:
    codes, labels = clean(12), own_answers(model, clean(12))
    codes[:2] = 0
    codes[2:4] = 255
    made = attack(model, short(walk), codes, labels, budget)
    assert_within(made.codes, codes, budget)
    assert np.array_equal(made.fooled, ~correct(target(model), made.codes, labels))


@given(
    seed=st.integers(0, 10_000), budget=st.integers(0, 255), walk=st.sampled_from(EVERY_WALK), shift=st.integers(0, 1)
)
def test_fooled_on_the_integer_model_is_what_the_emulator_says(seed: int, budget: int, walk: str, shift: int) -> None:
    """The attack asks the twin; the judgement is the emulator's. Half the labels are right to begin with."""
    codes = random_images(SHAPE, 6, seed)
    labels = (own_answers("integer", codes) + shift * np.arange(6)) % 4
    made = attack("integer", short(walk), codes, labels, budget)
    assert np.array_equal(made.fooled, ~correct(target("integer"), made.codes, labels))


@pytest.mark.parametrize("walk", [*EVERY_WALK, "adaptive"])
def test_neither_order_nor_batching_changes_an_outcome(walk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    member = Member(Adaptive(0.35, warm_start=True), "SA-PGD", 6) if walk == "adaptive" else short(walk)
    codes, labels = clean(10), own_answers("integer", clean(10))
    whole = attack("integer", member, codes, labels, 30)
    order = np.random.default_rng(0).permutation(10)
    monkeypatch.setattr(ensemble, "BATCH", 3)
    shuffled = ensemble.run_member(
        target("integer"), member, codes[order], labels[order], indices(10)[order], budget=30, seed=2
    )
    assert np.array_equal(shuffled.codes, whole.codes[order])
    assert np.array_equal(shuffled.fooled, whole.fooled[order])
    assert np.array_equal(shuffled.strength, whole.strength[order])
    assert shuffled.gradients == whole.gradients


def test_another_seed_and_another_restart_start_elsewhere() -> None:
    labels = own_answers("integer", clean())
    first, again, second = (attack("integer", short("PGD"), clean(), labels, 10, seed) for seed in (1, 1, 2))
    assert_same(first, again)
    assert not np.array_equal(first.codes, second.codes)


def test_restarts_go_on_with_what_was_not_fooled_and_lose_nothing() -> None:
    codes, labels = clean(), own_answers("integer", clean())
    once = attack("integer", Member(steps=3, backward=Surrogate("triangle")), codes, labels, 12)
    thrice = attack("integer", Member(steps=3, backward=Surrogate("triangle"), restarts=3), codes, labels, 12)
    assert np.all(thrice.fooled >= once.fooled)
    assert thrice.fooled.sum() > once.fooled.sum()
    assert np.array_equal(thrice.codes[once.fooled], once.codes[once.fooled])
    assert once.gradients < thrice.gradients < 3 * once.gradients
    assert np.all(thrice.strength >= once.strength)


def test_an_image_that_fools_beats_a_stronger_one_that_does_not() -> None:
    oracle = ScriptedOracle(
        lambda q, _: torch.full((2,), [5.0, 1.0, 9.0][q]), lambda q, _: torch.full((2,), q == 1), brighter
    )
    made = walk_along(oracle, "PGD", clean(2), 9, 2).result()
    assert np.array_equal(made.codes, oracle.shown[1].round().numpy().astype(np.uint8))
    assert made.strength.tolist() == [1.0, 1.0]


def test_gradients_of_any_scale_become_unit_ones() -> None:
    slope = torch.tensor([[1.0, -0.5, 0.0]])
    for scale in (1e-38, 1.0, 1e38):
        torch.testing.assert_close(unit_gradient(scale * slope), slope)
    assert unit_gradient(torch.tensor([[torch.inf, -torch.inf, 2.0]])).tolist() == [[1.0, -1.0, 0.0]]
    assert unit_gradient(torch.tensor([[torch.nan, 4.0, 2.0]])).tolist() == [[0.0, 1.0, 0.5]]
    assert unit_gradient(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_zero_gradients_are_counted_per_image() -> None:
    slope = torch.ones(4, 1, 8, 8)
    slope[:3] = 0
    slope[2, 0, 0, 0] = 1e-30
    oracle = ScriptedOracle(brightness, lambda *_: torch.zeros(4, dtype=torch.bool), lambda *_: slope)
    assert walk_along(oracle, "PGD", clean(4), 9, 5).result().zero_gradients == 0.5


@pytest.mark.parametrize("model", MODELS)
def test_a_surrogate_that_is_zero_everywhere_is_counted(model: str) -> None:
    labels = own_answers(model, clean(6))
    dead = attack(model, Member(Surrogate("rectangle", 1e-12)), clean(6), labels, 20)
    alive = attack(model, short("PGD"), clean(6), labels, 20)
    assert dead.zero_gradients == 1.0
    assert alive.zero_gradients is not None
    assert alive.zero_gradients < 0.5


@pytest.mark.parametrize("walk", EVERY_WALK)
def test_no_attack_changes_the_images_it_was_given(walk: str) -> None:
    codes, labels = clean(6), own_answers("integer", clean(6))
    attack("integer", short(walk), codes, labels, 30)
    assert np.array_equal(codes, clean(6))


@pytest.mark.parametrize("walk", EVERY_WALK)
def test_no_images_at_all(walk: str) -> None:
    made = attack("integer", short(walk), clean(4)[:0], np.zeros(0, np.int64), 10)
    assert made.codes.shape == (0, *SHAPE)
    assert made.fooled.shape == made.strength.shape == (0,)
    assert made.zero_gradients is None


def test_batches_cover_everything_once() -> None:
    assert [list(range(10))[part] for part in batches(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(batches(0, 4)) == []


def test_joined_batches_weigh_their_shares_by_their_gradients() -> None:
    def part(share: float | None, gradients: int) -> Crafted:
        return Crafted(np.zeros((1, 2), np.uint8), np.ones(1, bool), np.zeros(1), share, gradients)

    joined = join([part(1.0, 10), part(0.0, 30)], np.zeros((0, 2), np.uint8))
    assert joined.zero_gradients == 0.25
    assert joined.gradients == 40
    assert joined.codes.shape == (2, 2)
    assert join([part(None, 5)], np.zeros((0, 2), np.uint8)).zero_gradients is None


@pytest.mark.parametrize("model", MODELS)
def test_targets_answer_in_any_batch_alike(model: str) -> None:
    codes = random_images(SHAPE, 150, 8)
    whole = target(model).logits(codes)
    parts = np.concatenate([target(model).logits(codes[:1]), target(model).logits(codes[1:])])
    assert whole.shape == (150, 4)
    if model == "integer":
        assert np.array_equal(parts, whole)
    else:
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


def test_the_oracle_of_the_integer_target_answers_as_the_emulator_does() -> None:
    codes = random_images(SHAPE, 150, 8)
    labels = np.arange(150) % 4
    oracle = target("integer").oracle(
        Surrogate("triangle"), lambda logits, labels: logits.gather(1, labels[:, None])[:, 0]
    )
    answer = oracle(to_images(codes), torch.from_numpy(labels), False)
    assert np.array_equal(answer.fooled.numpy(), target("integer").logits(codes).argmax(1) != labels)
    np.testing.assert_allclose(answer.loss.numpy(), target("integer").logits(codes)[np.arange(150), labels], rtol=1e-6)
