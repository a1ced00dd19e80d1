from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.attacks.search import Search, generators_of
from pipeline.attacks.steps import WALKS, StepControl, checkpoints, sa_pgd
from tests.pipeline.attack_samples import (
    EVERY_WALK,
    ScriptedOracle,
    assert_within,
    brighter,
    brightness,
    clean,
    indices,
    never,
    walk_along,
)
from tests.pipeline.samples import random_images

BUDGETS = st.sampled_from([0, 1, 2, 25, 128, 255])
EVERY_GRADIENT = ["normal", "zero", "tiny", "huge", "infinite", "nan"]


def gradients(kind: str, seed: int) -> Tensor:
    noise = torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    if kind == "infinite":
        return torch.where(noise > 1, torch.inf, noise)
    if kind == "nan":
        return torch.where(noise > 1, torch.nan, noise)
    return noise * {"normal": 1.0, "zero": 0.0, "tiny": 1e-38, "huge": 1e38}[kind]


@settings(max_examples=25)
@given(budget=BUDGETS, seed=st.integers(0, 1000), edges=st.booleans(), kind=st.sampled_from(EVERY_GRADIENT))
@pytest.mark.parametrize("walk", EVERY_WALK)
def test_all_that_is_shown_and_returned_are_codes_within_the_budget(
    walk: str, budget: int, seed: int, edges: bool, kind: str
) -> None:
    codes = random_images((1, 8, 8), 4, seed)
    if edges:
        codes = np.where(codes < 128, 0, 255).astype(np.uint8)
    oracle = ScriptedOracle(
        lambda question, _: torch.rand(4, generator=torch.Generator().manual_seed(seed + question)),
        lambda question, _: torch.arange(4) == question,
        lambda question, _: gradients(kind, seed + question),
    )
    made = walk_along(oracle, walk, codes, budget, 6, seed).result()
    assert_within(made.codes, codes, budget)
    for shown in oracle.shown:
        exact = shown.round()
        torch.testing.assert_close(shown, exact, rtol=0, atol=1e-3)
        assert_within(exact.numpy().astype(np.uint8), codes, budget)
        assert exact.min() >= 0
        assert exact.max() <= 255


@pytest.mark.parametrize("walk", EVERY_WALK)
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_a_walk_computes_as_many_gradients_as_it_has_steps(walk: str, steps: int) -> None:
    oracle = ScriptedOracle(brightness, never, brighter)
    made = walk_along(oracle, walk, clean(3), 9, steps).result()
    assert oracle.differentiated == made.gradients == 3 * (1 if "FGSM" in walk else steps)
    assert len(oracle.shown) == oracle.differentiated // 3 + 1


@pytest.mark.parametrize("walk", EVERY_WALK)
def test_every_walk_climbs_a_hill_to_the_top(walk: str) -> None:
    codes, steps = clean(3), 1 if "FGSM" in walk else 12
    made = walk_along(ScriptedOracle(brightness, never, brighter), walk, codes, 9, steps).result()
    top = np.minimum(codes.astype(int) + 9, 255)
    if walk == "RFGSM":  # its random half of the budget may have gone down
        assert np.all(np.isin(made.codes - codes.astype(int), [0, 9]) | (made.codes == 255) | (codes < 9))
        assert (made.codes == top).mean() > 0.4
    else:
        assert np.array_equal(made.codes, top)


@pytest.mark.parametrize("walk", EVERY_WALK)
@pytest.mark.parametrize("question", [0, 1])
def test_any_iterate_counts_and_the_one_that_fooled_is_returned(walk: str, question: int) -> None:
    oracle = ScriptedOracle(brightness, lambda asked, _: torch.full((3,), asked == question), brighter)
    made = walk_along(oracle, walk, clean(3), 20, 5).result()
    assert made.fooled.all()
    assert np.array_equal(made.codes, oracle.shown[question].round().numpy().astype(np.uint8))


@pytest.mark.parametrize("walk", EVERY_WALK)
def test_of_several_that_fooled_the_strongest_is_returned(walk: str) -> None:
    oracle = ScriptedOracle(lambda q, _: torch.full((3,), -float(q)), lambda q, _: torch.full((3,), q > 0), brighter)
    made = walk_along(oracle, walk, clean(3), 20, 5).result()
    assert np.array_equal(made.codes, oracle.shown[1].round().numpy().astype(np.uint8))
    assert made.strength.tolist() == [-1.0] * 3


def test_fgsm_moves_every_pixel_by_the_whole_budget() -> None:
    codes = np.full((2, 1, 3, 3), 100, np.uint8)
    slope = torch.tensor([1.0, -2.0, 0.0]).expand(2, 1, 3, 3)
    oracle = ScriptedOracle(lambda _, shown: (shown * slope).flatten(1).sum(1), never, lambda *_: slope)
    walk_along(oracle, "FGSM", codes, 7, 1)
    assert np.array_equal(oracle.shown[1].round().numpy()[0, 0, 0], [107, 93, 100])


def test_rfgsm_spends_half_the_budget_at_random_and_the_other_half_along_the_gradient() -> None:
    codes = np.full((2, 1, 8, 8), 100, np.uint8)
    oracle = ScriptedOracle(brightness, never, brighter)
    walk_along(oracle, "RFGSM", codes, 8, 1)
    start, end = (shown.round() - 100 for shown in oracle.shown)
    assert set(start.unique().tolist()) == {-4.0, 4.0}
    assert torch.equal(end, start + 4)


def test_pgd_steps_by_two_and_a_half_budgets_over_the_number_of_steps() -> None:
    codes = np.full((2, 1, 8, 8), 100, np.uint8)
    oracle = ScriptedOracle(brightness, never, lambda q, shown: torch.full_like(shown, 1.0 if q % 2 else -1.0))
    walk_along(oracle, "PGD", codes, 40, 10)
    start, down, up = (shown - 100 for shown in oracle.shown[:3])
    assert start.abs().max() <= 40
    assert start.unique().numel() > 40
    torch.testing.assert_close(down, (start - 10).clamp(min=-40), rtol=0, atol=0.51)
    torch.testing.assert_close(up, down + 10, rtol=0, atol=1.01)


def test_apgd_starts_on_the_border_of_the_budget() -> None:
    codes = np.full((5, 1, 8, 8), 100, np.uint8)
    oracle = ScriptedOracle(brightness, never, brighter)
    walk_along(oracle, "APGD", codes, 40, 3)
    assert torch.equal((oracle.shown[0].round() - 100).flatten(1).abs().amax(1), torch.full((5,), 40.0))


def sa_pgd_by_hand(start: Tensor, slopes: list[Tensor], low: Tensor, high: Tensor, eta: float) -> list[Tensor]:
    """The published update, on one image, while the step size stays."""
    iterate, first, second, path = start, torch.zeros_like(start), torch.zeros_like(start), []
    for slope in slopes:
        first = 0.5 * first + slope / slope.abs().mean()
        second = 0.8 * second + slope**2 / (slope**2).mean()
        move = (eta * first / second.sqrt()).clamp(-eta, eta)
        iterate = torch.minimum(torch.maximum(iterate + move, low), high)
        path.append(iterate)
    return path


def test_sa_pgd_is_the_published_update() -> None:
    codes = np.full((1, 1, 4, 4), 128, np.uint8)
    generator = torch.Generator().manual_seed(3)
    slopes = [torch.randn((1, 1, 4, 4), generator=generator) for _ in range(20)]
    oracle = ScriptedOracle(lambda q, _: torch.full((1,), float(q)), never, lambda q, _: slopes[q])
    search = Search(oracle, codes, np.zeros(1, np.int64), 60, generators_of(np.array([7]), 0, 0))
    start = Search(oracle, codes, np.zeros(1, np.int64), 60, generators_of(np.array([7]), 0, 0)).uniform_start()
    sa_pgd(search, 20)
    low, high = torch.full_like(start, 68), torch.full_like(start, 188)
    for shown, expected in zip(oracle.shown[1:], sa_pgd_by_hand(start, slopes, low, high, 60), strict=True):
        torch.testing.assert_close(shown, expected, rtol=0, atol=0.51)


def test_checkpoints_are_those_of_the_publication() -> None:
    # p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(20) == [4, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


@given(steps=st.integers(1, 500))
def test_checkpoints_rise_and_stay_within_the_walk(steps: int) -> None:
    found = checkpoints(steps)
    assert found == sorted(set(found))
    assert found[0] >= 1
    assert found[-1] <= steps


def control_of(losses: list[list[float]], steps: int = 100) -> tuple[StepControl, list[tuple[Tensor, Tensor]]]:
    """A control fed one row of losses per question; iterates and gradients are the number of the question."""
    at = [torch.full((len(losses[0]), 1), float(q)) for q in range(len(losses))]
    control = StepControl(at[0], torch.tensor(losses[0]), at[0], 8.0, steps)
    outcomes = [
        control.after(step, at[step + 1], torch.tensor(row), at[step + 1]) for step, row in enumerate(losses[1:])
    ]
    return control, outcomes


def test_a_walk_that_keeps_rising_keeps_its_step() -> None:
    control, outcomes = control_of([[float(q)] for q in range(60)])
    assert control.size_like(torch.zeros(1, 1)).item() == 8.0
    assert outcomes[-1][0].item() == 59


def test_a_walk_that_oscillates_goes_back_to_its_best_point_with_half_the_step_image_by_image() -> None:
    losses = [[float(q), float(q % 2) if q != 5 else 3.0] for q in range(23)]
    control, outcomes = control_of(losses)
    assert control.size_like(torch.zeros(2, 1)).flatten().tolist() == [8.0, 4.0]
    assert [point.flatten().tolist() for point in outcomes[-1]] == [[22.0, 5.0]] * 2
    assert outcomes[-2][0].flatten().tolist() == [21.0, 21.0]


def test_a_walk_that_rises_often_but_finds_nothing_better_is_halved_too() -> None:
    # Falls below its best and then creeps up: most steps rise, the best loss stays that of the first checkpoint.
    rising = [float(q) for q in range(23)]
    creeping = [-100.0 + q for q in range(19)]
    control, _ = control_of([[loss] for loss in rising + creeping])
    assert control.size_like(torch.zeros(1, 1)).item() == 4.0


@pytest.mark.parametrize("walk", [walk for walk in EVERY_WALK if walk != "FGSM"])
def test_a_start_depends_on_the_seed_and_the_index_alone(walk: str) -> None:
    codes = clean(4)

    def start(rows: list[int], seed: int) -> Tensor:
        oracle = ScriptedOracle(brightness, never, brighter)
        search = Search(oracle, codes[rows], np.zeros(len(rows), np.int64), 9, generators_of(indices(4)[rows], seed, 0))
        WALKS[walk](search, 1)
        return oracle.shown[0]

    whole = start([0, 1, 2, 3], 0)
    assert torch.equal(start([2, 0], 0), whole[[2, 0]])
    assert not torch.equal(start([0, 1, 2, 3], 1), whole)
