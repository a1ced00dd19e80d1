"""What a sweep varies, and what it may be told: every problem of its options at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.quantization import MAX_BITS, MIN_BITS

MAX_STEPS = 64
DEFAULT_BITS = (8, 6, 4, 3, 2)
SETTINGS = (
    "data.path",
    "data.dir",
    "quantization.epochs",
    "quantization.learning_rate",
    "quantization.rounding",
    "fidelity.epsilon",
    "fidelity.margin",
    "fidelity.confidence",
    "fidelity.attacks",
)
"""Settings a sweep reads; the others are those of the run, and would change nothing."""


@dataclass(frozen=True)
class Grid:
    """The points of a sweep: all bits at all time steps.

    Attributes:
        bits: of every weight, from many to few.
        steps: T, from few to many.
    """

    bits: tuple[int, ...]
    steps: tuple[int, ...]


def grid_of(bits: Sequence[int] | None, steps: Sequence[int] | None, finetuned_steps: int) -> Grid:
    """The grid of given numbers, or of the usual ones: T as fine-tuned for, half and twice as many."""
    usual = {max(1, finetuned_steps // 2), finetuned_steps, min(MAX_STEPS, 2 * finetuned_steps)}
    return Grid(tuple(sorted(bits or DEFAULT_BITS, reverse=True)), tuple(sorted(steps or usual)))


def option_problems(
    bits: Sequence[int] | None, steps: Sequence[int] | None, samples: int | None, overrides: Sequence[str]
) -> list[str]:
    """What is wrong with the options of a sweep, one sentence each; they need no file to be judged."""
    unread = [one for one in overrides if one.partition("=")[0] not in SETTINGS]
    return [
        *_number_problems("--bits", bits or (), MIN_BITS, MAX_BITS),
        *_number_problems("--steps", steps or (), 1, MAX_STEPS),
        *([] if samples is None or samples > 0 else [f"--samples {samples} is not 1 or more; leave it out for all"]),
        *(f"--set {one} changes nothing in a sweep, which reads {', '.join(SETTINGS)} only" for one in unread),
    ]


def _number_problems(option: str, numbers: Sequence[int], low: int, high: int) -> list[str]:
    return [
        *(f"{option} {n} is not in {low}..{high}; leave it out" for n in numbers if not low <= n <= high),
        *(f"{option} {n} is given {count} times; once is enough" for n, count in Counter(numbers).items() if count > 1),
    ]
