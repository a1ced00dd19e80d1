from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.attacks.black_box import margins, random_noise, square
from pipeline.attacks.ensemble import SquareMember
from pipeline.attacks.targets import Codes, Labels, Logits, correct
from tests.pipeline.attack_samples import (
    MODELS,
    assert_within,
    attack,
    clean,
    indices,
    own_answers,
    short,
    target,
)
from tests.pipeline.samples import random_images


class Watched:
    """A target that remembers what it was asked."""

    name = "watched"

    def __init__(self, model: str = "integer") -> None:
        self.model = model
        self.asked: list[Codes] = []
        self.answers: list[Logits] = []

    def logits(self, codes: Codes) -> Logits:
        self.asked.append(codes.copy())
        self.answers.append(target(self.model).logits(codes))
        return self.answers[-1]


@given(budget=st.integers(0, 255), seed=st.integers(0, 1000))
def test_noise_moves_every_pixel_by_the_whole_budget_where_there_is_room(budget: int, seed: int) -> None:
    codes = random_images((1, 8, 8), 3, seed)
    noisy = random_noise(codes, indices(3), budget=budget, seed=seed)
    assert_within(noisy, codes, budget)
    moved = np.abs(noisy.astype(int) - codes)
    cut = (noisy == 0) | (noisy == 255)
    assert np.all((moved == budget) | cut)


def test_noise_depends_on_the_seed_and_the_index_alone() -> None:
    codes = clean(6)
    whole = random_noise(codes, indices(6), budget=9, seed=1)
    assert np.array_equal(random_noise(codes[[4, 1]], indices(6)[[4, 1]], budget=9, seed=1), whole[[4, 1]])
    assert not np.array_equal(random_noise(codes, indices(6), budget=9, seed=2), whole)


@settings(max_examples=20)
@given(budget=st.sampled_from([0, 1, 25, 255]), seed=st.integers(0, 1000), edges=st.booleans())
def test_square_keeps_the_budget_in_all_it_asks_and_what_is_called_fooled_is(
    budget: int, seed: int, edges: bool
) -> None:
    codes = random_images((1, 8, 8), 4, seed)
    if edges:
        codes = np.where(codes < 128, 0, 255).astype(np.uint8)
    labels: Labels = np.arange(4)
    watched = Watched()
    made = square(watched, codes, labels, np.zeros(4, np.int64), budget=budget, queries=15, seed=seed)
    assert_within(made.codes, codes, budget)
    assert np.array_equal(made.fooled, ~correct(target("integer"), made.codes, labels))
    assert_within(watched.asked[0], codes, budget)
    lows = np.maximum(codes.astype(int) - budget, 0).min(0)
    highs = np.minimum(codes.astype(int) + budget, 255).max(0)
    assert all(np.all((asked >= lows) & (asked <= highs)) for asked in watched.asked)


def test_square_never_asks_more_than_it_may_and_counts_what_it_asked() -> None:
    codes, watched = clean(6), Watched()
    made = square(watched, codes, own_answers("integer", codes), indices(6), budget=3, queries=30, seed=4)
    assert len(watched.asked) <= 30
    assert made.gradients == sum(len(asked) for asked in watched.asked)
    assert made.zero_gradients is None


@pytest.mark.parametrize("model", MODELS)
def test_square_never_worsens_the_margin_and_betters_some(model: str) -> None:
    codes, watched = clean(24), Watched(model)
    labels = own_answers(model, codes)
    made = square(watched, codes, labels, indices(24), budget=6, queries=120, seed=4)
    start = margins(watched.answers[0], labels)
    end = margins(target(model).logits(made.codes), labels)
    assert np.all(end <= start + 1e-6)
    assert np.any((end < start - 1e-6) & (start > 0))


class Unmoved:
    """Always right and equally sure."""

    name = "unmoved"

    def __init__(self) -> None:
        self.asked: list[Codes] = []

    def logits(self, codes: Codes) -> Logits:
        self.asked.append(codes)
        return np.stack([np.ones(len(codes)), np.zeros(len(codes))], 1)


def test_windows_cover_the_whole_image_up_to_the_last_row_and_column_and_shrink() -> None:
    unmoved, codes = Unmoved(), np.full((1, 1, 9, 7), 100, np.uint8)
    square(unmoved, codes, np.zeros(1, np.int64), np.arange(1), budget=10, queries=2000, seed=0)
    stripes, *proposals = (asked[0, 0].astype(int) for asked in unmoved.asked)
    assert np.all(stripes == stripes[0])
    touched = np.array([proposal != stripes for proposal in proposals])
    assert touched.any(0).all()
    assert touched[-1000:].any(0)[-1, -1]
    # A window flips about half of the stripes it covers, so its area is about twice what it changes.
    covered = [2 * part.sum((1, 2)).mean() / 63 for part in (touched[2:10], touched[40:100], touched[1600:])]
    assert covered[0] > covered[1] > covered[2]
    # 0.8 halved as often as the fractions of the queries passed; the last windows are single pixels.
    assert covered[0] == pytest.approx(0.4, rel=0.6)
    assert touched[1600:].sum((1, 2)).max() == 1


def test_margins_are_the_label_against_the_best_other() -> None:
    logits = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    assert margins(logits, np.array([0, 1])).tolist() == [1.0, 0.0]
    assert margins(logits, np.array([1, 0])).tolist() == [-2.0, 0.0]
    assert logits.tolist() == [[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]]


def test_square_on_no_images_at_all() -> None:
    made = attack("integer", SquareMember(5), clean(4)[:0], np.zeros(0, np.int64), 10)
    assert made.codes.shape == (0, 1, 8, 8)
    assert made.fooled.shape == (0,)


def test_neither_order_nor_batching_changes_what_square_finds() -> None:
    codes, labels = clean(12), own_answers("integer", clean(12))

    def run(rows: NDArray[np.int64]) -> tuple[Codes, NDArray[np.bool_]]:
        arguments = (codes[rows], labels[rows], indices(12)[rows])
        made = square(target("integer"), *arguments, budget=15, queries=25, seed=3)
        return made.codes, made.fooled

    whole, fooled = run(np.arange(12))
    assert 0 < fooled.sum() < 12
    for rows in (np.array([7, 2, 11]), np.arange(12)[::-1].copy()):
        part, part_fooled = run(rows)
        assert np.array_equal(part, whole[rows])
        assert np.array_equal(part_fooled, fooled[rows])


@pytest.mark.parametrize("model", MODELS)
def test_queries_and_gradients_beat_noise(model: str) -> None:
    codes = clean(64)
    labels, budget = own_answers(model, codes), 6
    noisy = random_noise(codes, indices(64), budget=budget, seed=0)
    by_noise = (~correct(target(model), noisy, labels)).sum()
    for member in (SquareMember(40), short("PGD", 8)):
        assert attack(model, member, codes, labels, budget).fooled.sum() > 1.3 * by_noise
