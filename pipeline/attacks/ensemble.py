"""Ensembles as tables: each member is judged on the true model, and only images it did not fool go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import SpikeguardError
from hardware.files import read_arrays, write_arrays
from hardware.surrogates import ENSEMBLE, RATE, TRIANGLE
from pipeline.attacks.backward import Adaptive, Backward, Conversion
from pipeline.attacks.black_box import square
from pipeline.attacks.losses import cross_entropy, difference_of_logits_ratio, targeted_difference_of_logits_ratio
from pipeline.attacks.search import Crafted, Search, batches, generators_of, join
from pipeline.attacks.steps import WALKS
from pipeline.attacks.targets import BATCH, Answer, Codes, GradientTarget, Labels, Loss, Oracle, correct

Advance = Callable[..., None]
LOSSES: Mapping[str, Callable[[], Loss]] = {
    "CE": lambda: cross_entropy,
    "DLR": lambda: difference_of_logits_ratio,
    **{
        f"DLR target {rank}": (lambda rank=rank: targeted_difference_of_logits_ratio(rank))  # type: ignore[misc]
        for rank in range(2, 11)
    },
}


@dataclass(frozen=True)
class Member:
    """One attack through gradients.

    Attributes:
        backward: the way back through the spikes; several take turns, one per gradient.
        walk: key of ``WALKS``.
        steps: gradients per image and restart.
        loss: key of ``LOSSES``.
        restarts: runs from different starts, each on the images not fooled before.
    """

    backward: Backward | tuple[Backward, ...]
    walk: str = "PGD"
    steps: int = 10
    loss: str = "CE"
    restarts: int = 1

    @property
    def name(self) -> str:
        """How tables call it."""
        ways = self.backward if isinstance(self.backward, tuple) else (self.backward,)
        through = ways[0].name if len(ways) == 1 else f"{len(ways)} rules in turn"
        loss = "" if self.loss == "CE" else f" {self.loss}"
        return f"{self.walk}{loss} {self.steps}, {through}"


@dataclass(frozen=True)
class SquareMember:
    """Random search without gradients.

    Attributes:
        queries: per image.
    """

    queries: int

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"Square {self.queries}"


AnyMember = Member | SquareMember


@dataclass
class InTurn:
    """An oracle that asks several, one per question: momentum then averages their gradients."""

    oracles: Sequence[Oracle]
    asked: int = 0

    def __call__(self, images: Any, labels: Any, differentiate: bool) -> Answer:
        """See :class:`~pipeline.attacks.targets.Oracle`."""
        answer = self.oracles[self.asked % len(self.oracles)](images, labels, differentiate)
        self.asked += 1
        return answer


def run_member(
    target: GradientTarget,
    member: AnyMember,
    codes: Codes,
    labels: Labels,
    indices: NDArray[np.int64],
    *,
    budget: int,
    seed: int,
    advance: Advance = lambda *_, **__: None,
) -> Crafted:
    """One member on the given images.

    Args:
        target: what is attacked.
        member: how.
        codes: uint8 ``(samples, *shape)``, the clean images.
        labels: ``(samples,)``.
        indices: of the images in their data set; they seed the starts, so order and batching change nothing.
        budget: l-infinity radius in codes.
        seed: of the starts.
        advance: told about every finished image.
    """
    if isinstance(member, SquareMember):
        crafted = square(target, codes, labels, indices, budget=budget, queries=member.queries, seed=seed)
        advance(units=len(codes))
        return crafted
    state = _State.fresh(codes)
    for restart in range(member.restarts):
        alive = np.flatnonzero(~state.fooled)
        parts = []
        for part in batches(len(alive), BATCH):
            rows = alive[part]
            search = Search(
                oracle_of(target, member),
                codes[rows],
                labels[rows],
                budget,
                generators_of(indices[rows], seed, restart),
            )
            WALKS[member.walk](search, member.steps)
            parts.append(search.result())
            if restart == member.restarts - 1:
                advance(units=len(rows))
        state = state.with_results(alive, join(parts, codes[:0]))
        if restart < member.restarts - 1:
            advance(units=int(state.fooled[alive].sum()))
    return state.crafted()


def oracle_of(target: GradientTarget, member: Member) -> Oracle:
    """A fresh oracle for one batch and one restart of a member."""
    loss = LOSSES[member.loss]()
    if isinstance(member.backward, tuple):
        return InTurn([target.oracle(backward, loss) for backward in member.backward])
    return target.oracle(member.backward, loss)


@dataclass(frozen=True)
class _State:
    """The strongest image so far of every sample, and what it took.

    Attributes:
        codes, fooled, strength, gradients: as in :class:`Crafted`; queries count among the gradients.
        by: position of the first member that fooled, or -1.
        zero, differentiated: how many of the true gradients were zero, and how many there were.
        entered: images of each round.
    """

    codes: Codes
    fooled: NDArray[np.bool_]
    strength: NDArray[np.float64]
    by: NDArray[np.int16]
    zero: float
    gradients: int
    differentiated: int
    entered: tuple[int, ...]

    @staticmethod
    def fresh(codes: Codes) -> _State:
        samples = len(codes)
        return _State(
            codes.copy(),
            np.zeros(samples, bool),
            np.full(samples, -np.inf),
            np.full(samples, -1, np.int16),
            0.0,
            0,
            0,
            (),
        )

    def with_results(self, rows: NDArray[np.intp], found: Crafted) -> _State:
        better = (found.fooled & ~self.fooled[rows]) | (
            (found.fooled == self.fooled[rows]) & (found.strength > self.strength[rows])
        )
        codes, fooled, strength, by = self.codes.copy(), self.fooled.copy(), self.strength.copy(), self.by.copy()
        codes[rows[better]] = found.codes[better]
        strength[rows[better]] = found.strength[better]
        by[rows[found.fooled & ~fooled[rows]]] = len(self.entered)
        fooled[rows] |= found.fooled
        differentiated = 0 if found.zero_gradients is None else found.gradients
        return _State(
            codes,
            fooled,
            strength,
            by,
            self.zero + (found.zero_gradients or 0.0) * differentiated,
            self.gradients + found.gradients,
            self.differentiated + differentiated,
            (*self.entered, len(rows)),
        )

    def crafted(self) -> Crafted:
        share = self.zero / self.differentiated if self.differentiated else None
        return Crafted(self.codes, self.fooled, self.strength, share, self.gradients)


@dataclass(frozen=True)
class EnsembleResult:
    """What an ensemble made of each image.

    Attributes:
        crafted: the strongest image of each.
        by: int16 ``(samples,)``, position of the member that fooled the target first; -1 for none, and for images the
            target gets wrong without help.
        entered: images each member was given.
    """

    crafted: Crafted
    by: NDArray[np.int16]
    entered: tuple[int, ...]


def run_ensemble(
    target: GradientTarget,
    members: Sequence[AnyMember],
    codes: Codes,
    labels: Labels,
    indices: NDArray[np.int64],
    *,
    budget: int,
    seed: int,
    advance: Advance = lambda *_, **__: None,
    store: Path | None = None,
) -> EnsembleResult:
    """Run the members in order, each on the images that the target still gets right.

    Arguments as for :func:`run_member`. A member's starts depend on the seed, its name and the image alone, so the
    order of members and the sharding of images change no outcome.

    Args:
        store: a file that keeps the state after each member, so that a kill loses at most one member's work. It must
            belong to exactly this call.
    """
    state = _restore(store, codes) if store is not None and store.is_file() else None
    if state is None:
        state = _State.fresh(codes)
        state.fooled[~correct(target, codes, labels)] = True
    for position, member in enumerate(members):
        if position < len(state.entered):
            advance(units=len(codes))
            continue
        alive = np.flatnonzero(~state.fooled)
        advance(f"{len(alive)} left, {member.name}", units=len(codes) - len(alive))
        found = run_member(
            target,
            member,
            codes[alive],
            labels[alive],
            indices[alive],
            budget=budget,
            seed=seed_of(seed, member),
            advance=advance,
        )
        state = state.with_results(alive, found)
        if store is not None:
            _keep(store, state)
    advance(f"{int((~state.fooled).sum())} left", units=0)
    return EnsembleResult(state.crafted(), state.by, state.entered)


def seed_of(seed: int, member: AnyMember) -> int:
    """A member's own seed: of the run's seed and its name."""
    return int(np.random.SeedSequence([seed, *member.name.encode()]).generate_state(1)[0])


def _keep(store: Path, state: _State) -> None:
    counts = np.array([state.zero, state.gradients, state.differentiated], np.float64)
    arrays = {"codes": state.codes, "fooled": state.fooled, "strength": state.strength, "by": state.by}
    write_arrays(store, {**arrays, "counts": counts, "entered": np.array(state.entered, np.int64)})


def _restore(store: Path, codes: Codes) -> _State:
    arrays = read_arrays(store)
    try:
        zero, gradients, differentiated = arrays["counts"].tolist()
        state = _State(
            arrays["codes"],
            arrays["fooled"],
            arrays["strength"],
            arrays["by"],
            zero,
            int(gradients),
            int(differentiated),
            tuple(int(count) for count in arrays["entered"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SpikeguardError(f"{store} holds no half-finished attack ({error}); delete it and run again") from error
    if state.codes.shape != codes.shape or len(state.fooled) != len(codes):
        raise SpikeguardError(f"{store} holds images of {state.codes.shape}, expected {codes.shape}; delete it")
    return state


WARM = Adaptive(0.35, warm_start=True)
"""ASSG with a warm start and the share that was strongest on training and validation digits."""
MIXED: tuple[Backward, ...] = (WARM, TRIANGLE)
"""Rules that take turns within one trajectory."""

NINETEEN = (*(Member(way) for way in ENSEMBLE), Member(RATE), Member(Conversion(clipped=False)))
"""The gradients of the method, each with PGD of 10 steps (Özdenizci & Legenstein, TMLR 2024)."""

PRESETS: Mapping[str, tuple[AnyMember, ...]] = {
    "quick": (Member(WARM, "APGD", 100), Member(TRIANGLE, "PGD", 20)),
    "paper": NINETEEN,
    # The attack whose gradients adapt to the network comes first because it finds most.
    "adaptive": (Member(Adaptive(), "SA-PGD", 100), *NINETEEN),
    # Ordered by the yield measured on the digits, so that few images reach the many weak members.
    "strong": (
        Member(WARM, "APGD", 100, restarts=3),
        Member(Adaptive(), "SA-PGD", 100, restarts=3),
        Member(MIXED, "APGD", 100),
        Member(WARM, "APGD", 100, loss="DLR"),
        *NINETEEN,
        Member(Conversion(clipped=True)),
        SquareMember(5000),
    ),
}
