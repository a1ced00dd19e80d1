"""The adversarial images of a check: what each attack of its table makes of each target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.attacks.backward import Adaptive
from pipeline.attacks.black_box import random_noise, square
from pipeline.attacks.disagreement import disagree
from pipeline.attacks.ensemble import PRESETS, AnyMember, run_ensemble
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, GradientTarget, Labels, budget_of, correct
from pipeline.config import FidelityConfig

Targets = Mapping[str, GradientTarget]


@dataclass(frozen=True)
class Images:
    """What is attacked: codes ``(samples, *shape)``, labels, and the seed that all randomness derives from.

    Attributes:
        first: position of the first image, where these are a part of all.
    """

    codes: Codes
    labels: Labels
    seed: int
    first: int = 0

    @property
    def indices(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions of the images, which seed their attacks."""
        return np.arange(self.first, self.first + len(self.labels))

    def part(self, start: int, stop: int) -> Images:
        """Some of the images, each with the seed that it has among all."""
        return Images(self.codes[start:stop], self.labels[start:stop], self.seed, self.first + start)


@dataclass(frozen=True)
class Work:
    """What an attack of the check is given.

    Attributes:
        targets: models by name.
        store: file for its half-finished state.
        own_members: of an ensemble, in place of the configured ones.
    """

    targets: Targets
    images: Images
    settings: FidelityConfig
    advance: Callable[..., None]
    store: Path
    own_members: tuple[AnyMember, ...] = ()

    @property
    def budget(self) -> int:
        """In codes."""
        return budget_of(self.settings.epsilon)

    @property
    def members(self) -> tuple[AnyMember, ...]:
        """Of the ensemble."""
        return self.own_members or tuple(PRESETS[self.settings.attacks])


Craft = Callable[[Work], Crafted]


def craft_noise(work: Work) -> Crafted:
    """Random signs of the whole budget."""
    images = work.images
    noisy = random_noise(images.codes, images.indices, budget=work.budget, seed=images.seed)
    work.advance(units=len(noisy))
    return Crafted(noisy, np.zeros(len(noisy), bool), np.full(len(noisy), -np.inf), None, 0)


def craft_ensemble(work: Work, target: str) -> Crafted:
    """An ensemble on one model."""
    images = work.images
    result = run_ensemble(
        work.targets[target],
        work.members,
        images.codes,
        images.labels,
        images.indices,
        budget=work.budget,
        seed=images.seed,
        advance=work.advance,
        store=work.store,
    )
    return result.crafted


def craft_square(work: Work, target: str) -> Crafted:
    """Square, which only asks, on the images one model gets right."""
    images, model = work.images, work.targets[target]
    result, fooled = images.codes.copy(), ~correct(model, images.codes, images.labels)
    strength = np.full(len(fooled), -np.inf)
    alive = np.flatnonzero(~fooled)
    found = square(
        model,
        images.codes[alive],
        images.labels[alive],
        images.indices[alive],
        budget=work.budget,
        queries=work.settings.square_queries,
        seed=images.seed,
        advance=work.advance,
    )
    work.advance(f"{int((~found.fooled).sum())} left", units=len(images.labels))
    result[alive], fooled[alive], strength[alive] = found.codes, found.fooled, found.strength
    return Crafted(result, fooled, strength, None, found.gradients)


def craft_disagreement(work: Work, right: str, wrong: str) -> Crafted:
    """Images that one model gets right and the other wrong."""
    images = work.images
    return disagree(
        work.targets[right],
        work.targets[wrong],
        images.codes,
        images.labels,
        images.indices,
        backward=Adaptive(),
        walk="APGD",
        steps=DISAGREEMENT_STEPS,
        budget=work.budget,
        seed=images.seed,
        advance=work.advance,
    )


@dataclass(frozen=True)
class Attack:
    """One row of the check's table of attacks.

    Attributes:
        name: of the arm.
        targets: names of the models it asks.
        label: what it is, with ``{settings}`` to fill in.
        description: one line for the report.
        craft: makes the images; of this module, so that other processes find it.
        is_ensemble: whether an ensemble makes them, member after member.
        in_worst_case: whether its images count in the worst case; not if it favours one model.
        own_members: of the ensemble, in place of the configured ones.
    """

    name: str
    targets: tuple[str, ...]
    label: str
    description: str
    craft: Craft
    is_ensemble: bool = False
    in_worst_case: bool = True
    own_members: tuple[AnyMember, ...] = ()

    def members(self, settings: FidelityConfig) -> tuple[AnyMember, ...]:
        """Of the ensemble; none if it is not one."""
        return (self.own_members or tuple(PRESETS[settings.attacks])) if self.is_ensemble else ()

    def work_units(self, samples: int, settings: FidelityConfig) -> int:
        """Units of progress."""
        return samples * max(1, len(self.members(settings)))

    def run(
        self,
        targets: Targets,
        images: Images,
        settings: FidelityConfig,
        store: Path,
        advance: Callable[..., None] = lambda *_, **__: None,
    ) -> Crafted:
        """Make the images."""
        return self.craft(Work(targets, images, settings, advance, store, self.own_members))


DISAGREEMENT_STEPS = 40
ATTACKS: tuple[Attack, ...] = (
    Attack("noise", (), "noise", "random signs of the whole budget", craft_noise),
    Attack(
        "transfer",
        ("float",),
        "{attacks} ensemble on {reference}",
        "crafted on the reference, replayed on the deployed model",
        partial(craft_ensemble, target="float"),
        is_ensemble=True,
    ),
    Attack(
        "adaptive",
        ("integer",),
        "{attacks} ensemble through the twin",
        "crafted on the deployed integer model through its differentiable twin",
        partial(craft_ensemble, target="integer"),
        is_ensemble=True,
    ),
    Attack(
        "black box, float",
        ("float",),
        "Square {square_queries} on {reference}",
        "no gradients, queries to the reference",
        partial(craft_square, target="float"),
    ),
    Attack(
        "black box",
        ("integer",),
        "Square {square_queries} on the integer model",
        "no gradients, queries to the certified emulator",
        partial(craft_square, target="integer"),
    ),
    Attack(
        "only deployed wrong",
        ("float", "integer"),
        "disagreement",
        "sought so that the reference stays right; outside the worst case, for it favours one model",
        partial(craft_disagreement, right="float", wrong="integer"),
        in_worst_case=False,
    ),
    Attack(
        "only reference wrong",
        ("float", "integer"),
        "disagreement",
        "sought so that the deployed model stays right; outside the worst case, for it favours one model",
        partial(craft_disagreement, right="integer", wrong="float"),
        in_worst_case=False,
    ),
)
