"""Targets, images and oracles that the tests of the attacks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hardware.surrogates import TRIANGLE
from pipeline.attacks.backward import Backward
from pipeline.attacks.ensemble import AnyMember, Member, run_member
from pipeline.attacks.search import Crafted, Search, generators_of
from pipeline.attacks.steps import WALKS
from pipeline.attacks.targets import (
    Answer,
    Codes,
    FloatTarget,
    GradientTarget,
    IntegerTarget,
    Labels,
    Logits,
    Loss,
    ModuleOracle,
    Oracle,
    batched_logits,
)
from pipeline.quantization import quantize
from tests.pipeline.samples import random_images, spiking_network

SHAPE = (1, 8, 8)
MODELS = ["float", "integer"]


@cache
def target(model: str, bits: int = 8) -> GradientTarget:
    """A random network of four classes, or what is deployed of it."""
    network = spiking_network("conv", seed=1)
    if model == "float":
        return FloatTarget(network)
    return IntegerTarget(quantize(network, random_images(SHAPE, 16, 3), bits, {}).network)


def clean(samples: int = 24) -> Codes:
    return random_images(SHAPE, samples, seed=5)


def own_answers(model: str, codes: Codes) -> Labels:
    """Labels that the target gets right."""
    answers: Labels = target(model).logits(codes).argmax(1)
    return answers


def indices(count: int) -> NDArray[np.int64]:
    return np.arange(count) + 100


def attack(model: str, member: AnyMember, codes: Codes, labels: Labels, budget: int, seed: int = 2) -> Crafted:
    return run_member(target(model), member, codes, labels, indices(len(codes)), budget=budget, seed=seed)


def short(walk: str, steps: int = 4) -> Member:
    return Member(TRIANGLE, walk, steps)


EVERY_WALK = list(WALKS)


def assert_within(made: Codes, codes: Codes, budget: int) -> None:
    assert made.dtype == np.uint8
    assert made.shape == codes.shape
    assert np.abs(made.astype(int) - codes.astype(int)).max(initial=0) <= budget


def assert_same(left: Crafted, right: Crafted) -> None:
    """Bit for bit."""
    assert np.array_equal(left.codes, right.codes)
    assert np.array_equal(left.fooled, right.fooled)
    assert np.array_equal(left.strength, right.strength)
    assert left.zero_gradients == right.zero_gradients
    assert left.gradients == right.gradients


@dataclass
class ScriptedOracle:
    """Answers from functions of the number of the question (0, 1, ...) and the codes shown; remembers what it saw.

    Attributes:
        loss, fooled, gradient: each of (question, codes as a float tensor).
    """

    loss: Callable[[int, Tensor], Tensor]
    fooled: Callable[[int, Tensor], Tensor]
    gradient: Callable[[int, Tensor], Tensor]
    shown: list[Tensor] = field(default_factory=list)
    differentiated: int = 0

    def __call__(self, images: Tensor, labels: Tensor, differentiate: bool) -> Answer:  # noqa: ARG002
        codes, question = images * 255, len(self.shown)
        self.shown.append(codes.clone())
        self.differentiated += len(codes) if differentiate else 0
        loss = self.loss(question, codes)
        return Answer(
            self.fooled(question, codes), loss, loss, self.gradient(question, codes) if differentiate else None
        )


def never(_: int, codes: Tensor) -> Tensor:
    return torch.zeros(len(codes), dtype=torch.bool)


def brightness(_: int, codes: Tensor) -> Tensor:
    return codes.flatten(1).sum(1)


def brighter(_: int, codes: Tensor) -> Tensor:
    return torch.ones_like(codes)


def walk_along(oracle: Oracle, walk: str, codes: Codes, budget: int, steps: int, seed: int = 0) -> Search:
    """A finished walk; all labels are 0."""
    generators = generators_of(indices(len(codes)), seed, 0)
    search = Search(oracle, codes, np.zeros(len(codes), np.int64), budget, generators)
    WALKS[walk](search, steps)
    return search


class _WithoutRules(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor, rules: Any) -> Tensor:  # noqa: ARG002
        logits: Tensor = self.module(images)
        return logits

    def proxy(self, images: Tensor, clipped: bool) -> Tensor:  # noqa: ARG002
        return self(images, None)


@dataclass(frozen=True)
class PlainTarget:
    """Any torch module of images as a target; there is only one way back through it."""

    module: nn.Module
    name: str = "plain"

    def logits(self, codes: Codes) -> Logits:
        return batched_logits(self.module, codes)

    def oracle(self, backward: Backward, loss: Loss) -> Oracle:
        return ModuleOracle(_WithoutRules(self.module), (), backward, loss)


class Counted:
    """A target that counts the gradients it computes, one per image."""

    def __init__(self, inner: GradientTarget) -> None:
        self.inner, self.name, self.gradients, self.oracles = inner, inner.name, 0, 0

    def logits(self, codes: Codes) -> Logits:
        return self.inner.logits(codes)

    def oracle(self, backward: Backward, loss: Loss) -> Oracle:
        oracle = self.inner.oracle(backward, loss)
        self.oracles += 1

        def counting(images: Tensor, labels: Tensor, differentiate: bool) -> Answer:
            self.gradients += len(images) if differentiate else 0
            return oracle(images, labels, differentiate)

        return counting
