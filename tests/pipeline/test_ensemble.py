from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.errors import SpikeguardError
from hardware.surrogates import RATE, TRIANGLE, Rate, Surrogate
from pipeline.attacks import ensemble
from pipeline.attacks.backward import Adaptive, Backward, Conversion
from pipeline.attacks.ensemble import (
    PRESETS,
    AnyMember,
    EnsembleResult,
    InTurn,
    Member,
    SquareMember,
    oracle_of,
    run_ensemble,
    run_member,
    seed_of,
)
from pipeline.attacks.targets import Codes, GradientTarget, Labels, Loss, Oracle, correct, to_images
from tests.pipeline.attack_samples import (
    MODELS,
    Counted,
    assert_same,
    assert_within,
    clean,
    indices,
    own_answers,
    target,
)
from tests.pipeline.samples import random_images

MEMBERS: tuple[AnyMember, ...] = (
    Member(TRIANGLE, "FGSM", 1),
    Member(RATE, steps=3),
    Member(Adaptive(), "SA-PGD", 4),
    Member(Conversion(clipped=False), "APGD", 4, restarts=2),
    SquareMember(8),
    Member((Adaptive(), TRIANGLE), "APGD", 4, loss="DLR"),
)
BUDGET = 5


def run(
    model: GradientTarget, members: Sequence[AnyMember], codes: Codes, labels: Labels, store: Path | None = None
) -> EnsembleResult:
    return run_ensemble(model, members, codes, labels, indices(len(codes)), budget=BUDGET, seed=4, store=store)


def labels_of(codes: Codes) -> Labels:
    """The integer model's answers, two of them spoiled."""
    labels = own_answers("integer", codes)
    labels[:2] = (labels[:2] + 1) % 4
    return labels


@settings(max_examples=6)
@given(seed=st.integers(0, 1000))
def test_outcomes_are_those_of_all_members_on_all_images(seed: int) -> None:
    codes = random_images((1, 8, 8), 20, seed)
    labels, model = labels_of(codes), target("integer")
    made = run(model, MEMBERS, codes, labels)
    alone = np.stack(
        [
            run_member(model, member, codes, labels, indices(20), budget=BUDGET, seed=seed_of(4, member)).fooled
            for member in MEMBERS
        ]
    )
    wrong = ~correct(model, codes, labels)
    assert np.array_equal(made.crafted.fooled, wrong | alone.any(0))
    first = np.where(alone.any(0) & ~wrong, alone.argmax(0), -1)
    assert np.array_equal(made.by, first)
    assert made.entered == tuple(int((~(wrong | alone[:m].any(0))).sum()) for m in range(len(MEMBERS)))
    assert np.array_equal(made.crafted.fooled, ~correct(model, made.crafted.codes, labels))
    assert_within(made.crafted.codes, codes, BUDGET)


def test_neither_the_order_of_members_nor_the_sharding_of_images_changes_who_is_fooled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = clean(24)
    labels, model = labels_of(codes), target("integer")
    whole = run(model, MEMBERS, codes, labels)
    assert 2 < whole.crafted.fooled.sum() < 24
    assert len(set(whole.by)) >= 4
    backwards = run(model, MEMBERS[::-1], codes, labels)
    assert np.array_equal(backwards.crafted.fooled, whole.crafted.fooled)
    monkeypatch.setattr(ensemble, "BATCH", 5)
    order = np.random.default_rng(0).permutation(24)
    for shard in (order[:7], order[7:]):
        part = run_ensemble(model, MEMBERS, codes[shard], labels[shard], indices(24)[shard], budget=BUDGET, seed=4)
        assert np.array_equal(part.crafted.codes, whole.crafted.codes[shard])
        assert np.array_equal(part.by, whole.by[shard])


def test_the_ensemble_costs_what_its_members_cost_on_the_images_that_enter_them() -> None:
    members = [Member(TRIANGLE, steps=4), Member(RATE, "SA-PGD", 6), Member(Adaptive(), "APGD", 9)]
    codes, model = clean(24), Counted(target("integer"))
    made = run(model, members, codes, labels_of(codes))
    assert 24 > made.entered[0] > made.entered[1] > made.entered[2] > 0
    price = sum(entered * member.steps for entered, member in zip(made.entered, members, strict=True))
    assert 0 < model.gradients <= 1.05 * price
    assert made.crafted.gradients == model.gradients


def test_what_the_first_success_returned_is_kept_and_the_strongest_failure_else() -> None:
    codes = clean(24)
    labels, model = own_answers("integer", codes), target("integer")
    made = run(model, MEMBERS, codes, labels)
    for position, member in enumerate(MEMBERS):
        alone = run_member(model, member, codes, labels, indices(24), budget=BUDGET, seed=seed_of(4, member))
        mine = made.by == position
        assert np.array_equal(made.crafted.codes[mine], alone.codes[mine])
        left = ~made.crafted.fooled
        assert np.all(made.crafted.strength[left] >= alone.strength[left])


@pytest.mark.parametrize("model", MODELS)
def test_images_that_are_wrong_already_stay_as_they_are_count_and_cost_nothing(model: str) -> None:
    labels = (own_answers(model, clean()) + 1) % 4
    made = run(target(model), MEMBERS, clean(), labels)
    assert made.crafted.fooled.all()
    assert np.array_equal(made.crafted.codes, clean())
    assert made.crafted.gradients == 0
    assert set(made.by) == {-1}
    assert made.entered == (0,) * len(MEMBERS)


class Killed(Exception):
    pass


class Mortal(Counted):
    """A target that dies at the n-th attack on it."""

    def __init__(self, inner: GradientTarget, dies_at: int) -> None:
        super().__init__(inner)
        self.dies_at = dies_at

    def oracle(self, backward: Backward, loss: Loss) -> Oracle:
        if self.oracles == self.dies_at:
            raise Killed
        return super().oracle(backward, loss)


@pytest.mark.parametrize("dies_at", [1, 2, 4, 5])
def test_a_killed_run_goes_on_after_the_last_finished_member_to_the_same_result(dies_at: int, tmp_path: Path) -> None:
    codes, store = clean(24), tmp_path / "half.npz"
    labels, whole = labels_of(codes), Counted(target("integer"))
    expected = run(whole, MEMBERS, codes, labels)
    with pytest.raises(Killed):
        run(Mortal(target("integer"), dies_at), MEMBERS, codes, labels, store)
    resumed = Counted(target("integer"))
    made = run(resumed, MEMBERS, codes, labels, store)
    assert_same(made.crafted, expected.crafted)
    assert np.array_equal(made.by, expected.by)
    assert made.entered == expected.entered
    assert 0 < resumed.gradients < whole.gradients
    finished = Counted(target("integer"))
    assert_same(run(finished, MEMBERS, codes, labels, store).crafted, expected.crafted)
    assert finished.gradients == 0


def test_a_store_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    store, codes = tmp_path / "half.npz", clean(6)
    run(target("integer"), MEMBERS[:1], codes, labels_of(codes), store)
    with pytest.raises(SpikeguardError, match="delete it"):
        run(target("integer"), MEMBERS[:1], clean(7), labels_of(clean(7)), store)
    np.savez(store, codes=codes)
    with pytest.raises(SpikeguardError, match="delete it"):
        run(target("integer"), MEMBERS[:1], codes, labels_of(codes), store)


def test_progress_adds_up_to_every_image_in_every_member() -> None:
    told: list[int] = []
    codes = clean(24)

    def advance(*_: str, units: int) -> None:
        told.append(units)

    labels = labels_of(codes)
    run_ensemble(target("integer"), MEMBERS, codes, labels, indices(24), budget=BUDGET, seed=4, advance=advance)
    assert sum(told) == 24 * len(MEMBERS)


def test_queries_do_not_dilute_the_share_of_zero_gradients() -> None:
    dead = Member(Surrogate("rectangle", 1e-12), steps=2)
    codes = clean(6)
    for members in ([dead], [dead, SquareMember(200)]):
        made = run(target("integer"), members, codes, own_answers("integer", codes))
        assert made.crafted.zero_gradients == 1.0
    only_asked = run(target("integer"), [SquareMember(3)], codes, own_answers("integer", codes))
    assert only_asked.crafted.zero_gradients is None


def test_rules_take_turns_question_by_question() -> None:
    codes = clean(4)
    labels, asked = own_answers("integer", codes), to_images(codes)
    member = Member((TRIANGLE, RATE), "APGD", 4)
    mixed = oracle_of(target("integer"), member)
    assert isinstance(mixed, InTurn)
    alone = [oracle_of(target("integer"), Member(way)) for way in (TRIANGLE, RATE)]
    for question in range(4):
        gradient = mixed(asked, torch.from_numpy(labels), True).gradient
        expected = alone[question % 2](asked, torch.from_numpy(labels), True).gradient
        other = alone[1 - question % 2](asked, torch.from_numpy(labels), True).gradient
        assert gradient is not None
        assert expected is not None
        assert other is not None
        assert torch.equal(gradient, expected)
        assert not torch.equal(gradient, other)


def test_the_paper_preset_is_the_nineteen_gradients_of_the_method_in_its_order() -> None:
    members = PRESETS["paper"]
    assert all(isinstance(member, Member) for member in members)
    assert {(m.walk, m.steps, m.loss, m.restarts) for m in members if isinstance(m, Member)} == {("PGD", 10, "CE", 1)}
    ways = [member.backward for member in members if isinstance(member, Member)]
    assert ways == [
        *(Surrogate("triangle", width) for width in (1, 2, 3, 0.5, 0.25)),
        # a exp(-b |z|) has width 1 / b
        *(Surrogate("exponential", 1 / b, a) for a in (0.3, 1.0) for b in (0.5, 1, 2)),
        *(Surrogate("rectangle", width) for width in (0.25, 0.5, 1, 2, 4)),
        Surrogate("straight_through"),
        Rate(),
        Conversion(clipped=False),
    ]
    assert len(ways) == 19


def test_the_strong_preset_holds_all_that_the_paper_has_and_more() -> None:
    strong = PRESETS["strong"]
    assert set(PRESETS["paper"]) < set(strong)
    assert Member(Conversion(clipped=True)) in strong
    assert SquareMember(5000) in strong
    assert any(m.walk == "SA-PGD" and m.steps >= 100 and m.restarts > 1 for m in strong if isinstance(m, Member))
    assert set(PRESETS["adaptive"]) == {*PRESETS["paper"], Member(Adaptive(), "SA-PGD", 100)}
    assert set(PRESETS) == {"quick", "paper", "adaptive", "strong"}


@pytest.mark.parametrize("preset", PRESETS)
def test_names_tell_members_apart_so_that_each_has_its_own_starts(preset: str) -> None:
    names = [member.name for member in PRESETS[preset]]
    assert len(set(names)) == len(names)
    assert len({seed_of(0, member) for member in PRESETS[preset]}) == len(names)
    assert len({seed_of(seed, PRESETS[preset][0]) for seed in range(9)}) == 9


@pytest.mark.parametrize("model", MODELS)
def test_every_member_of_every_preset_runs_and_is_judged_on_the_true_model(model: str) -> None:
    codes = clean(4)
    labels = own_answers(model, codes)
    for member in {member for members in PRESETS.values() for member in members}:
        brief = (
            SquareMember(3)
            if isinstance(member, SquareMember)
            else Member(member.backward, member.walk, 2, member.loss)
        )
        made = run_member(target(model), brief, codes, labels, indices(4), budget=60, seed=0)
        assert_within(made.codes, codes, 60)
        assert np.array_equal(made.fooled, ~correct(target(model), made.codes, labels))


@pytest.mark.parametrize("model", MODELS)
def test_members_are_stronger_together(model: str) -> None:
    codes = clean(64)
    labels = own_answers(model, codes)
    alone = run(target(model), MEMBERS[1:2], codes, labels).crafted.fooled
    together = run(target(model), MEMBERS, codes, labels).crafted.fooled
    assert np.all(together >= alone)
    assert together.sum() > alone.sum()
