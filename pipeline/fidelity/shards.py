"""Work in shards: an attack on some consecutive images, whose result is a file, so that a kill loses next to nothing.

A shard is named by a hash of all that determines it and is the same however many processes share the work, so neither
they nor a kill change a single pixel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware.errors import SpikeguardError
from hardware.files import read_arrays, write_arrays
from pipeline.attacks.search import Crafted, batches, join
from pipeline.attacks.targets import Codes, GradientTarget, budget_of
from pipeline.config import FidelityConfig
from pipeline.fidelity.crafting import ATTACKS, Attack, Images, Targets
from pipeline.fidelity.workers import Workers
from pipeline.progress import track
from pipeline.source import source_digest

SHARD_IMAGES = 128
"""As many as an attack takes in one batch."""


@dataclass(frozen=True)
class Shard:
    """An attack on consecutive images.

    Attributes:
        path: of the file that holds what it made.
    """

    attack: Attack
    images: Images
    settings: FidelityConfig
    path: Path

    @property
    def units(self) -> int:
        """Of progress."""
        return self.attack.work_units(len(self.images.labels), self.settings)

    def __call__(self, targets: Targets, advance: Callable[..., None]) -> None:
        """Do it, going on where a killed process was."""
        half = self.path.with_suffix(".half.npz")
        save_crafted(self.path, self.attack.run(targets, self.images, self.settings, half, advance))
        half.unlink(missing_ok=True)

    def result(self) -> Crafted:
        """What it made."""
        return load_crafted(self.path, self.images.codes, budget_of(self.settings.epsilon))


def craft_all(
    targets: Mapping[str, GradientTarget],
    images: Images,
    settings: FidelityConfig,
    folder: Path,
    identity: str,
    attacks: Sequence[Attack] = ATTACKS,
    workers: Workers | None = None,
) -> dict[str, Crafted]:
    """Run every attack, or take its images from ``folder`` where the same work was finished before.

    Args:
        targets: models by name.
        images: what is attacked.
        settings: budgets and effort.
        folder: for one file per shard, named by a hash of all that determines it.
        identity: of the models; part of that hash.
        attacks: to run.
        workers: processes that know the targets and share the work; without, this one does it.
    """
    shards = {attack: list(_shards(attack, images, settings, folder, identity)) for attack in attacks}
    if workers is None:
        for attack, parts in shards.items():
            _work_off(attack.name, parts, targets)
    else:
        _share_out([shard for parts in shards.values() for shard in parts], workers)
    return {attack.name: join([shard.result() for shard in parts], images.codes) for attack, parts in shards.items()}


def _work_off(name: str, shards: Sequence[Shard], targets: Targets) -> None:
    missing = [shard for shard in shards if not shard.path.is_file()]
    if not missing:
        return
    total = sum(shard.units for shard in shards)
    with track(name, total, done=total - sum(shard.units for shard in missing)) as advance:
        for shard in missing:
            shard(targets, advance)


def _share_out(shards: Sequence[Shard], workers: Workers) -> None:
    missing = [shard for shard in shards if not shard.path.is_file()]
    if not missing:
        return
    # Long ones first, so that no process is left alone with one at the end.
    missing.sort(key=lambda shard: -shard.units)
    total = sum(shard.units for shard in shards)
    done = total - sum(shard.units for shard in missing)
    with track(f"attacks, {workers.jobs} jobs", total, done=done) as advance:
        for shard in workers.run(missing):
            advance(shard.attack.name, units=shard.units)


def _shards(attack: Attack, images: Images, settings: FidelityConfig, folder: Path, identity: str) -> Iterator[Shard]:
    stem = attack.name.replace(", ", "-").replace(" ", "-")
    for part in batches(len(images.labels), SHARD_IMAGES):
        some = images.part(part.start, part.stop)
        key = _key(attack, some, settings, identity)
        yield Shard(attack, some, settings, folder / f"{stem}-{some.first:05}-{key}.npz")


def _key(attack: Attack, images: Images, settings: FidelityConfig, identity: str) -> str:
    facts = {
        "attack": [attack.name, attack.targets, attack.label],
        "members": [repr(member) for member in attack.members(settings)],
        "effort": [settings.epsilon, settings.square_queries, images.seed],
        "images": [images.first, hashlib.sha256(images.codes.tobytes() + images.labels.tobytes()).hexdigest()],
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
