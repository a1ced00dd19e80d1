from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.surrogates import TRIANGLE
from pipeline.attacks import disagreement
from pipeline.attacks.backward import Adaptive
from pipeline.attacks.disagreement import DisagreementOracle, disagree
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, GradientTarget, Labels, correct
from tests.pipeline.attack_samples import (
    EVERY_WALK,
    ScriptedOracle,
    assert_within,
    clean,
    indices,
    own_answers,
    target,
)
from tests.pipeline.samples import random_images


def run(right: GradientTarget, wrong: GradientTarget, codes: Codes, labels: Labels, walk: str = "APGD") -> Crafted:
    return disagree(
        right,
        wrong,
        codes,
        labels,
        indices(len(codes)),
        backward=Adaptive() if walk == "SA-PGD" else TRIANGLE,
        walk=walk,
        steps=5,
        budget=20,
        seed=3,
    )


def disagrees(right: GradientTarget, wrong: GradientTarget, codes: Codes, labels: Labels) -> Labels:
    return correct(right, codes, labels) & ~correct(wrong, codes, labels)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), walk=st.sampled_from(EVERY_WALK), there=st.booleans())
def test_success_is_that_one_model_is_right_and_the_other_wrong(seed: int, walk: str, there: bool) -> None:
    pair = (target("integer", 8), target("integer", 3))
    right, wrong = pair if there else pair[::-1]
    codes = random_images((1, 8, 8), 12, seed)
    labels = own_answers("integer", codes)
    made = run(right, wrong, codes, labels, walk)
    assert_within(made.codes, codes, 20)
    assert np.array_equal(made.fooled, disagrees(right, wrong, made.codes, labels))


@pytest.mark.parametrize("there", [True, False])
def test_it_finds_more_than_noise_does_in_both_directions(there: bool) -> None:
    pair = (target("integer", 8), target("integer", 3))
    right, wrong = pair if there else pair[::-1]
    codes = clean(64)
    labels = right.logits(codes).argmax(1)
    noisy = np.clip(codes + np.random.default_rng(0).choice((-20, 20), codes.shape), 0, 255).astype(np.uint8)
    assert run(right, wrong, codes, labels).fooled.sum() > 1.5 * disagrees(right, wrong, noisy, labels).sum()


def test_a_model_never_disagrees_with_itself() -> None:
    codes = clean(8)
    made = run(target("integer"), target("integer"), codes, own_answers("integer", codes))
    assert not made.fooled.any()


def test_neither_order_nor_batching_changes_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, codes = (target("integer", 8), target("integer", 3)), clean(10)
    labels, order = own_answers("integer", codes), np.random.default_rng(0).permutation(10)
    whole = run(*pair, codes, labels, "SA-PGD")
    monkeypatch.setattr(disagreement, "BATCH", 3)
    part = disagree(
        *pair,
        codes[order],
        labels[order],
        indices(10)[order],
        backward=Adaptive(),
        walk="SA-PGD",
        steps=5,
        budget=20,
        seed=3,
    )
    assert np.array_equal(part.codes, whole.codes[order])
    assert np.array_equal(part.fooled, whole.fooled[order])


def test_both_models_weigh_the_same_whatever_their_scale() -> None:
    slope = torch.randn((2, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    other = torch.randn((2, 1, 2, 2), generator=torch.Generator().manual_seed(1))

    def oracle(gradient: torch.Tensor, loss: float, fooled: bool) -> ScriptedOracle:
        return ScriptedOracle(
            lambda *_: torch.full((2,), loss), lambda *_: torch.full((2,), fooled), lambda *_: gradient
        )

    images, labels = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)
    plain = DisagreementOracle(oracle(other, 1.0, False), oracle(slope, 5.0, True))(images, labels, True)
    scaled = DisagreementOracle(oracle(1e6 * other, 1.0, False), oracle(slope, 5.0, True))(images, labels, True)
    assert plain.gradient is not None
    assert scaled.gradient is not None
    torch.testing.assert_close(plain.gradient, scaled.gradient)
    peak, other_peak = (g.flatten(1).abs().amax(1).view(2, 1, 1, 1) for g in (slope, other))
    torch.testing.assert_close(plain.gradient, slope / peak - other / other_peak)
    assert plain.fooled.all()
    assert plain.loss.tolist() == [4.0, 4.0]
    for stays, goes in ((True, True), (False, False), (True, False)):
        answer = DisagreementOracle(oracle(other, 1.0, stays), oracle(slope, 5.0, goes))(images, labels, False)
        assert not answer.fooled.any()
        assert answer.gradient is None
