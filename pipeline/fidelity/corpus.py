"""The corpus of counterexamples of a check: replayed before anything is attacked, and grown by what the attacks found.

Found images are minimised: as much of the change as can be is taken back while both models still answer alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.formats.counterexamples import Counterexamples, merge, no_counterexamples
from pipeline.attacks.search import Crafted
from pipeline.attacks.targets import Codes, Labels, Target, correct
from pipeline.fidelity.crafting import Images
from pipeline.progress import track

MAX_ADDED = 64
"""Images that one check adds to a corpus."""
SHARES = 16
"""Parts that a whole change is cut down by at first."""
GROUPS = (4, 16, 64)
"""Numbers of groups of neighbouring pixels that are given back their clean values in turn."""
REPLAYED = "corpus"

Behaviour = NDArray[np.int64]
"""``(images,)``: 1 where only the deployed model is wrong, 2 where only the reference is, 3 where both are, else 0."""


def behaviour_of(targets: Mapping[str, Target], codes: Codes, labels: Labels) -> Behaviour:
    """What the two models of a check, "float" and "integer", make of images."""
    wrong = {name: ~correct(targets[name], codes, labels) for name in ("float", "integer")}
    return 2 * wrong["float"].astype(np.int64) + wrong["integer"]


def as_crafted(corpus: Counterexamples) -> dict[str, Crafted]:
    """A corpus as images that fooled, for runtimes to be certified on; nothing if there are none."""
    if not len(corpus):
        return {}
    fooled = np.ones(len(corpus), np.bool_)
    return {REPLAYED: Crafted(corpus.codes, fooled, np.full(len(corpus), -np.inf), None, len(corpus))}


def replay_row(corpus: Counterexamples, now: Behaviour, added: int) -> dict[str, Any]:
    """``corpus`` of ``report.json``.

    Args:
        corpus: that was replayed.
        now: what both models made of it.
        added: images that this check found.
    """
    deployed = (now & 1).astype(np.bool_)
    return {
        "images": len(corpus) + added,
        "replayed": len(corpus),
        "reference_wrong": int((now >= 2).sum()),
        "deployed_wrong": int(deployed.sum()),
        "only_reference_wrong": int((now == 2).sum()),
        "only_deployed_wrong": int((now == 1).sum()),
        "newly_deployed_wrong": int((deployed & ~corpus.deployed_wrong).sum()),
        "no_longer_deployed_wrong": int((~deployed & corpus.deployed_wrong).sum()),
        "added": added,
    }


def gather(
    targets: Mapping[str, Target],
    images: Images,
    crafted: Mapping[str, Crafted],
    known: Counterexamples,
    known_behaviour: Behaviour,
) -> Counterexamples:
    """New counterexamples: images on which the models differ, or that an attack made wrong, minimised.

    Of each clean image at most one of each behaviour that the known ones do not show on these models; ``MAX_ADDED`` of
    them, the behaviours in turn.
    """
    labels = images.labels
    shown = {_origin(known.clean[i], known.labels[i], int(kind)) for i, kind in enumerate(known_behaviour)}
    clean = behaviour_of(targets, images.codes, labels)
    found: dict[tuple[int, int], Codes] = {
        (i, int(clean[i])): images.codes[i] for i in np.isin(clean, (1, 2)).nonzero()[0].tolist()
    }
    for made in crafted.values():
        kinds = behaviour_of(targets, made.codes, labels)
        for i in np.flatnonzero((kinds > 0) & (kinds != clean)):
            found.setdefault((int(i), int(kinds[i])), made.codes[i])
    new = [key for key in found if _origin(images.codes[key[0]], labels[key[0]], key[1]) not in shown]
    chosen = list(_in_turn(new))[:MAX_ADDED]
    if not chosen:
        return no_counterexamples(images.codes.shape[1:])
    rows, kind = np.array([i for i, _ in chosen]), np.array([kind for _, kind in chosen])
    codes = minimize(targets, images.codes[rows], np.stack([found[key] for key in chosen]), labels[rows], kind)
    return merge([Counterexamples(codes, images.codes[rows], labels[rows], kind >= 2, kind % 2 == 1)])


def _origin(clean: Codes, label: np.int64, kind: int) -> tuple[bytes, int, int]:
    return clean.tobytes(), int(label), kind


def _in_turn(keys: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Keys ``(image, behaviour)``, the behaviours taking turns."""
    queues = [[key for key in sorted(keys) if key[1] == kind] for kind in (1, 2, 3)]
    while any(queues):
        for queue in queues:
            if queue:
                yield queue.pop(0)


def minimize(targets: Mapping[str, Target], clean: Codes, codes: Codes, labels: Labels, kind: Behaviour) -> Codes:
    """Shrink the change of each image while it keeps its behaviour: first all of it, then pixels group by group.

    Args:
        targets: the two models.
        clean, codes: uint8 ``(images, *shape)``.
        labels: of the images.
        kind: what the images do, and must go on to do.
    """
    change = codes.astype(np.int16) - clean

    def still(tried: NDArray[np.int16], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        shown = (clean[rows] + tried).astype(np.uint8)
        kept: NDArray[np.bool_] = behaviour_of(targets, shown, labels[rows]) == kind[rows]
        return kept

    rounds = SHARES.bit_length() - 1 + sum(min(count, clean[0].size) for count in GROUPS)
    with track("minimise", rounds) as advance:
        share, step, whole = np.full(len(codes), SHARES), SHARES // 2, change
        everything = np.arange(len(codes))
        while step:
            tried_share = share - step
            size = np.abs(whole) * _column(tried_share, change.ndim) // SHARES
            tried = (np.sign(whole) * size).astype(np.int16)
            fine = still(tried, everything)
            share, change = np.where(fine, tried_share, share), np.where(_column(fine, change.ndim), tried, change)
            step //= 2
            advance()
        for count in GROUPS:
            for group in np.array_split(np.arange(clean[0].size), min(count, clean[0].size)):
                flat = change.reshape(len(change), -1)
                rows = np.flatnonzero(flat[:, group].any(1))
                if len(rows):
                    tried = flat[rows].copy()
                    tried[:, group] = 0
                    fine = still(tried.reshape(-1, *change.shape[1:]), rows)
                    flat[rows[fine]] = tried[fine]
                    change = flat.reshape(change.shape)
                advance()
    return (clean + change).astype(np.uint8)


def _column(values: NDArray[Any], dimensions: int) -> NDArray[Any]:
    """One value per image, to be combined with images."""
    return values.reshape(-1, *([1] * (dimensions - 1)))
