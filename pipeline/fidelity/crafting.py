"""The adversarial images of a check: every attack on every target, each kept in a file so that a kill loses none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hardware.errors import SpikeguardError
from hardware.files import read_arrays, write_arrays
from pipeline.attacks.backward import Adaptive
from pipeline.attacks.black_box import random_noise, square
from pipeline.attacks.disagreement import disagree
from pipeline.attacks.ensemble import PRESETS, run_ensemble
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, GradientTarget, Labels, budget_of, correct
from pipeline.config import FidelityConfig
from pipeline.progress import track
from pipeline.source import source_digest

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
    """

    targets: Targets
    images: Images
    settings: FidelityConfig
    advance: Callable[..., None]
    store: Path

    @property
    def budget(self) -> int:
        """In codes."""
        return budget_of(self.settings.epsilon)


Craft = Callable[[Work], Crafted]


def craft_noise(work: Work) -> Crafted:
    """Random signs of the whole budget."""
    images = work.images
    noisy = random_noise(images.codes, images.indices, budget=work.budget, seed=images.seed)
    work.advance(units=len(noisy))
    return Crafted(noisy, np.zeros(len(noisy), bool), np.full(len(noisy), -np.inf), None, 0)


def craft_ensemble(target: str) -> Craft:
    """The configured ensemble on one model."""

    def craft(work: Work) -> Crafted:
        images = work.images
        result = run_ensemble(
            work.targets[target],
            PRESETS[work.settings.attacks],
            images.codes,
            images.labels,
            images.indices,
            budget=work.budget,
            seed=images.seed,
            advance=work.advance,
            store=work.store,
        )
        return result.crafted

    return craft


def craft_square(target: str) -> Craft:
    """Square, which only asks, on the images one model gets right."""

    def craft(work: Work) -> Crafted:
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

    return craft


def craft_disagreement(right: str, wrong: str) -> Craft:
    """Images that one model gets right and the other wrong."""

    def craft(work: Work) -> Crafted:
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

    return craft


@dataclass(frozen=True)
class Attack:
    """One row of the check's table of attacks.

    Attributes:
        name: of the arm.
        targets: names of the models it asks.
        label: what it is, with ``{settings}`` to fill in.
        description: one line for the report.
        craft: makes the images.
        is_ensemble: whether the configured ensemble makes them, member after member.
        in_worst_case: whether its images count in the worst case; not if it favours one model.
    """

    name: str
    targets: tuple[str, ...]
    label: str
    description: str
    craft: Craft
    is_ensemble: bool = False
    in_worst_case: bool = True

    def work_units(self, samples: int, settings: FidelityConfig) -> int:
        """Units of progress."""
        return samples * (len(PRESETS[settings.attacks]) if self.is_ensemble else 1)


DISAGREEMENT_STEPS = 40
ATTACKS: tuple[Attack, ...] = (
    Attack("noise", (), "noise", "random signs of the whole budget", craft_noise),
    Attack(
        "transfer",
        ("float",),
        "{attacks} ensemble on {reference}",
        "crafted on the reference, replayed on the deployed model",
        craft_ensemble("float"),
        is_ensemble=True,
    ),
    Attack(
        "adaptive",
        ("integer",),
        "{attacks} ensemble through the twin",
        "crafted on the deployed integer model through its differentiable twin",
        craft_ensemble("integer"),
        is_ensemble=True,
    ),
    Attack(
        "black box, float",
        ("float",),
        "Square {square_queries} on {reference}",
        "no gradients, queries to the reference",
        craft_square("float"),
    ),
    Attack(
        "black box",
        ("integer",),
        "Square {square_queries} on the integer model",
        "no gradients, queries to the certified emulator",
        craft_square("integer"),
    ),
    Attack(
        "only deployed wrong",
        ("float", "integer"),
        "disagreement",
        "sought so that the reference stays right; outside the worst case, for it favours one model",
        craft_disagreement("float", "integer"),
        in_worst_case=False,
    ),
    Attack(
        "only reference wrong",
        ("float", "integer"),
        "disagreement",
        "sought so that the deployed model stays right; outside the worst case, for it favours one model",
        craft_disagreement("integer", "float"),
        in_worst_case=False,
    ),
)


def craft_all(
    targets: Mapping[str, GradientTarget],
    images: Images,
    settings: FidelityConfig,
    folder: Path,
    identity: str,
    attacks: Sequence[Attack] = ATTACKS,
) -> dict[str, Crafted]:
    """Run every attack, or take its images from ``folder`` where the same work was finished before.

    Args:
        targets: models by name.
        images: what is attacked.
        settings: budgets and effort.
        folder: for one file per attack, named by a hash of all that determines it.
        identity: of the models; part of that hash.
    """
    crafted = {}
    for attack in attacks:
        key = _key(attack, images, settings, identity)
        stem = attack.name.replace(", ", "-").replace(" ", "-")
        path = folder / f"{stem}-{key}.npz"
        if path.is_file():
            crafted[attack.name] = load_crafted(path, images.codes, budget_of(settings.epsilon))
            continue
        half = path.with_suffix(".half.npz")
        with track(attack.name, attack.work_units(len(images.labels), settings)) as advance:
            crafted[attack.name] = attack.craft(Work(targets, images, settings, advance, half))
        save_crafted(path, crafted[attack.name])
        half.unlink(missing_ok=True)
    return crafted


def _key(attack: Attack, images: Images, settings: FidelityConfig, identity: str) -> str:
    facts = {
        "attack": [attack.name, attack.targets, attack.label],
        "members": [repr(member) for member in PRESETS[settings.attacks]],
        "effort": [settings.epsilon, settings.square_queries, images.seed, images.first],
        "images": hashlib.sha256(images.codes.tobytes() + images.labels.tobytes()).hexdigest(),
        "models": identity,
        "code": source_digest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def save_crafted(path: Path, crafted: Crafted) -> None:
    """Keep what an attack made; ``zero_gradients`` is NaN where there were none to count."""
    share = np.nan if crafted.zero_gradients is None else crafted.zero_gradients
    write_arrays(
        path,
        {
            "codes": crafted.codes,
            "fooled": crafted.fooled,
            "strength": crafted.strength,
            "zero_gradients": np.array(share),
            "gradients": np.array(crafted.gradients),
        },
    )


def load_crafted(path: Path, clean: Codes, budget: int) -> Crafted:
    """The inverse of :func:`save_crafted`, for images within ``budget`` of the clean ones.

    Raises:
        SpikeguardError: if the file holds something else.
    """
    arrays = read_arrays(path)
    try:
        share = float(arrays["zero_gradients"])
        crafted = Crafted(
            arrays["codes"],
            arrays["fooled"],
            arrays["strength"],
            None if np.isnan(share) else share,
            int(arrays["gradients"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SpikeguardError(f"{path} holds no crafted images ({error}); delete it and run again") from error
    if crafted.codes.shape != clean.shape or crafted.codes.dtype != np.uint8 or crafted.fooled.shape != clean.shape[:1]:
        raise SpikeguardError(f"{path} holds images of {crafted.codes.shape}, expected {clean.shape}; delete it")
    if np.abs(crafted.codes.astype(np.int16) - clean).max(initial=0) > budget:
        raise SpikeguardError(f"{path} holds images beyond the budget of {budget} codes; delete it and run again")
    return crafted
