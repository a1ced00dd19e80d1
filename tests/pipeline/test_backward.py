from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hardware.surrogates import ENSEMBLE, RATE, TRIANGLE, AdaptiveSurrogate, Surrogate
from pipeline.attacks.backward import Adaptive, Backward, Conversion, begin
from pipeline.attacks.losses import cross_entropy
from pipeline.attacks.targets import Answer, FloatTarget, IntegerTarget, ModuleOracle, to_images
from tests.pipeline.attack_samples import MODELS, clean, own_answers, target

EVERY_WAY: list[Backward] = [*ENSEMBLE, RATE, Adaptive(), Adaptive(0.35, True), Conversion(False), Conversion(True)]
IMAGES = 6


def ask(model: str, way: Backward, differentiate: bool = True) -> Answer:
    codes = clean(IMAGES)
    oracle = target(model).oracle(way, cross_entropy)
    return oracle(to_images(codes), torch.from_numpy(own_answers(model, codes)), differentiate)


def gradient(model: str, way: Backward) -> Tensor:
    found = ask(model, way).gradient
    assert found is not None
    return found


@pytest.mark.parametrize("model", MODELS)
def test_names_and_gradients_of_all_ways_differ_and_the_answers_do_not(model: str) -> None:
    assert len({way.name for way in EVERY_WAY}) == len(EVERY_WAY)
    found = [gradient(model, way) for way in EVERY_WAY]
    for position, one in enumerate(found):
        assert one.any()
        assert one.shape == (IMAGES, 1, 8, 8)
        assert not any(torch.equal(one, other) for other in found[:position])
    answers = [ask(model, way) for way in EVERY_WAY]
    for answer in answers:
        assert torch.equal(answer.fooled, answers[0].fooled)
        assert torch.equal(answer.strength, answers[0].strength)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", [TRIANGLE, Adaptive(), Conversion(False)])
def test_without_gradients_the_answer_is_the_same(model: str, way: Backward) -> None:
    with_gradient, without = ask(model, way), ask(model, way, differentiate=False)
    assert without.gradient is None
    # The float model computes in other groups when it keeps what a gradient needs.
    torch.testing.assert_close(without.strength, with_gradient.strength)
    assert torch.equal(without.fooled, with_gradient.fooled)


@pytest.mark.parametrize("model", MODELS)
def test_conversion_judges_the_spikes_and_differentiates_the_proxy(model: str) -> None:
    codes = clean(IMAGES)
    labels = torch.from_numpy(own_answers(model, codes))
    for clipped in (False, True):
        oracle = target(model).oracle(Conversion(clipped), cross_entropy)
        assert isinstance(oracle, ModuleOracle)
        images = to_images(codes).requires_grad_()
        (expected,) = torch.autograd.grad(cross_entropy(oracle.module.proxy(images, clipped), labels).sum(), images)
        answer = oracle(to_images(codes), labels, True)
        assert answer.gradient is not None
        torch.testing.assert_close(answer.gradient, expected)
        judged = torch.from_numpy(target(model).logits(codes))
        torch.testing.assert_close(answer.strength, cross_entropy(judged, labels), rtol=1e-5, atol=1e-6)


def test_adaptive_rules_start_afresh_for_every_layer_and_every_attack() -> None:
    rules = begin(Adaptive(0.3, True), ["a", "b"])
    assert isinstance(rules, dict)
    assert rules["a"] is not rules["b"]
    for rule in rules.values():
        assert isinstance(rule, AdaptiveSurrogate)
        assert (rule.share, rule.warm_start) == (0.3, True)
    assert begin(TRIANGLE, ["a"]) is TRIANGLE
    assert begin(RATE, ["a"]) is RATE


@pytest.mark.parametrize("model", MODELS)
def test_an_adaptive_oracle_learns_from_question_to_question_and_a_fresh_one_knows_nothing(model: str) -> None:
    codes = clean(IMAGES)
    images, labels = to_images(codes), torch.from_numpy(own_answers(model, codes))
    oracle = target(model).oracle(Adaptive(), cross_entropy)
    first, second = (oracle(images, labels, True).gradient for _ in range(2))
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
    assert torch.equal(gradient(model, Adaptive()), first)


@pytest.mark.parametrize("model", MODELS)
def test_a_question_without_gradients_teaches_an_adaptive_oracle_nothing(model: str) -> None:
    codes = clean(IMAGES)
    images, labels = to_images(codes), torch.from_numpy(own_answers(model, codes))
    oracle = target(model).oracle(Adaptive(), cross_entropy)
    oracle(1 - images, labels, False)
    found = oracle(images, labels, True).gradient
    assert found is not None
    assert torch.equal(found, gradient(model, Adaptive()))


def test_gradients_reach_every_layer_of_both_models_the_same_way() -> None:
    """Float model and twin differ by the rounding of weights alone, so their gradients point the same way."""
    for way in (TRIANGLE, Surrogate("exponential", 1.0), RATE, Conversion(False)):
        one, other = (gradient(model, way).flatten(1) for model in MODELS)
        likeness = torch.nn.functional.cosine_similarity(one, other)
        assert likeness.median() > 0.8, way  # one flipped spike can turn one image around


def test_targets_are_what_they_say() -> None:
    assert isinstance(target("float"), FloatTarget)
    assert isinstance(target("integer"), IntegerTarget)
    assert [target(model).name for model in MODELS] == MODELS
