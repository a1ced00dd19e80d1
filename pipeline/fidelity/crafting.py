"""The adversarial images of a check: every attack on every target, each kept in a file so that a kill loses none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hardware.errors import SpikeguardError
from hardware.files import read_arrays, write_arrays
from pipeline.attacks.black_box import random_noise, square
from pipeline.attacks.ensemble import QUICK, pgd_ensemble
from pipeline.attacks.gradient import Crafted
from pipeline.attacks.targets import Codes, GradientTarget, Labels, budget_of, correct
from pipeline.config import FidelityConfig
from pipeline.progress import track


@dataclass(frozen=True)
class Images:
    """What is attacked: codes ``(samples, *shape)``, labels, and the seed that all randomness derives from."""

    codes: Codes
    labels: Labels
    seed: int

    @property
    def indices(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions of the images, which seed their attacks."""
        return np.arange(len(self.labels))


def craft_noise(_: GradientTarget, images: Images, settings: FidelityConfig, advance: Callable[..., None]) -> Crafted:
    """Random signs of the whole budget."""
    noisy = random_noise(images.codes, images.indices, budget=budget_of(settings.epsilon), seed=images.seed)
    advance(units=len(noisy))
    return Crafted(noisy, np.zeros(len(noisy), bool), None, 0)


def craft_pgd(
    target: GradientTarget, images: Images, settings: FidelityConfig, advance: Callable[..., None]
) -> Crafted:
    """PGD through the ensemble of surrogates."""
    return pgd_ensemble(
        target,
        images.codes,
        images.labels,
        images.indices,
        budget=budget_of(settings.epsilon),
        steps=settings.pgd_steps,
        seed=images.seed,
        advance=advance,
    )


def craft_square(
    target: GradientTarget, images: Images, settings: FidelityConfig, advance: Callable[..., None]
) -> Crafted:
    """Square, which only asks, on the images the target gets right."""
    result, fooled = images.codes.copy(), ~correct(target, images.codes, images.labels)
    alive = np.flatnonzero(~fooled)
    crafted = square(
        target,
        images.codes[alive],
        images.labels[alive],
        images.indices[alive],
        budget=budget_of(settings.epsilon),
        queries=settings.square_queries,
        seed=images.seed,
        advance=advance,
    )
    result[alive], fooled[alive] = crafted.codes, crafted.fooled
    return Crafted(result, fooled, None, crafted.queries)


@dataclass(frozen=True)
class Attack:
    """One row of the check's table of attacks.

    Attributes:
        name: of the arm.
        target: name of the model it is crafted on.
        label: for people.
        description: one line for the report.
        craft: makes the images.
        work: units of progress for n images.
    """

    name: str
    target: str
    label: str
    description: str
    craft: Callable[[GradientTarget, Images, FidelityConfig, Callable[..., None]], Crafted]
    work: Callable[[int, FidelityConfig], int]


def _per_image(samples: int, _: FidelityConfig) -> int:
    return samples


def _per_member(samples: int, _: FidelityConfig) -> int:
    return samples * len(QUICK)


def _per_query(_: int, settings: FidelityConfig) -> int:
    return settings.square_queries - 1


ATTACKS: tuple[Attack, ...] = (
    Attack("noise", "float", "noise", "random signs of the whole budget", craft_noise, _per_image),
    Attack(
        "transfer",
        "float",
        f"PGD ensemble of {len(QUICK)} on the float SNN",
        "crafted on the reference, replayed on the deployed model",
        craft_pgd,
        _per_member,
    ),
    Attack(
        "adaptive",
        "integer",
        f"PGD ensemble of {len(QUICK)} through the twin",
        "crafted on the deployed integer model through its differentiable twin",
        craft_pgd,
        _per_member,
    ),
    Attack(
        "black box, float",
        "float",
        "Square on the float SNN",
        "no gradients, queries to the reference",
        craft_square,
        _per_query,
    ),
    Attack(
        "black box",
        "integer",
        "Square on the integer model",
        "no gradients, queries to the certified emulator",
        craft_square,
        _per_query,
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
        stem = attack.name.replace(", ", "-").replace(" ", "-")
        path = folder / f"{stem}-{_key(attack, images, settings, identity)}.npz"
        if path.is_file():
            crafted[attack.name] = load_crafted(path, images.codes.shape)
            continue
        with track(attack.name, attack.work(len(images.labels), settings)) as advance:
            crafted[attack.name] = attack.craft(targets[attack.target], images, settings, advance)
        save_crafted(path, crafted[attack.name])
    return crafted


def _key(attack: Attack, images: Images, settings: FidelityConfig, identity: str) -> str:
    facts = {
        "attack": [attack.name, attack.target, attack.label],
        "members": [asdict(member) for member in QUICK],
        "effort": [settings.epsilon, settings.pgd_steps, settings.square_queries, images.seed],
        "images": hashlib.sha256(images.codes.tobytes() + images.labels.tobytes()).hexdigest(),
        "models": identity,
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
            "zero_gradients": np.array(share),
            "queries": np.array(crafted.queries),
        },
    )


def load_crafted(path: Path, shape: tuple[int, ...]) -> Crafted:
    """The inverse of :func:`save_crafted`.

    Raises:
        SpikeguardError: if the file holds something else.
    """
    arrays = read_arrays(path)
    try:
        share = float(arrays["zero_gradients"])
        crafted = Crafted(arrays["codes"], arrays["fooled"], None if np.isnan(share) else share, int(arrays["queries"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SpikeguardError(f"{path} holds no crafted images ({error}); delete it and run again") from error
    if crafted.codes.shape != shape or crafted.codes.dtype != np.uint8 or crafted.fooled.shape != shape[:1]:
        raise SpikeguardError(f"{path} holds images of {crafted.codes.shape}, expected {shape}; delete it")
    return crafted
