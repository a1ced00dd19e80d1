"""Numbers as a reader of the report meets them: percents, points, counts, durations, pixel codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

ABSENT = "–"
NBSP = "\u00a0"
MINUS = "\u2212"
PIXEL_LEVELS = 255
MODELS = ("float SNN", "fine-tuning", "everything")
"""Steps of the waterfall at which one of the two judged models stands."""
ATTRIBUTION_NOTE = (
    "In each row only that kind of number is rounded and all else is float64, so the largest figures show which "
    "rounding costs most; “nothing” is what float32 leaves by itself, the last row is the deployed network."
)


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.978 as "97.8 %". What is not all is never rounded up to 100, nor what is not nothing down to 0."""
    if fraction is None:
        return ABSENT
    smallest = 10.0 ** -(digits + 2)
    shown = fraction
    if 0 < fraction < 1:
        shown = min(max(fraction, smallest), 1 - smallest)
    return f"{100 * shown:.{digits}f}{NBSP}%"


def percent_range(interval: Sequence[float] | None) -> str:
    """[0.962, 0.987] as "96.2 to 98.7 %"."""
    if interval is None:
        return ABSENT
    return f"{100 * interval[0]:.1f} to {percent(interval[1])}"


def worst_share(shares: Mapping[str, float]) -> str:
    """The largest of several shares and whose it is: "1.24 % (conv2)"."""
    if not any(shares.values()):
        return percent(0.0, 2) if shares else ABSENT
    name = max(shares, key=shares.__getitem__)
    return f"{percent(shares[name], 2)} ({name})"


def points(fraction: float | None, digits: int = 2) -> str:
    """A difference of fractions in signed percentage points: -0.0037 as "−0.37"."""
    if fraction is None:
        return ABSENT
    rounded = round(100 * fraction, digits)
    sign = MINUS if rounded < 0 else "+" if rounded > 0 else ""
    return f"{sign}{abs(rounded):.{digits}f}"


def points_range(interval: Sequence[float] | None) -> str:
    """An interval of differences in percentage points."""
    return ABSENT if interval is None else f"{points(interval[0])} to {points(interval[1])}"


def count(number: float | None) -> str:
    """1797 as "1,797"."""
    return ABSENT if number is None else f"{number:,.0f}"


def number(value: object) -> str:
    """Any value of a report: whole numbers with separators, others to four digits, words as they are."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value).replace("-", MINUS)
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e12:
            return count(value).replace("-", MINUS)
        return f"{value:.4g}".replace("-", MINUS)
    return str(value)


def whole_range(interval: Sequence[float] | None) -> str:
    """Bounds of an integer quantity, such as a sum or a membrane."""
    return ABSENT if interval is None else f"{number(interval[0])} to {number(interval[1])}"


def seconds(duration: float | None) -> str:
    """A duration: "0.42 s", "12 s", "3 min 20 s"."""
    if duration is None:
        return ABSENT
    if duration < 10:
        return f"{duration:.2g}{NBSP}s"
    minutes, rest = divmod(round(duration), 60)
    return f"{minutes}{NBSP}min {rest}{NBSP}s" if minutes else f"{rest}{NBSP}s"


def codes(epsilon: float) -> int:
    """The whole pixel codes inside a budget given in pixel units [0, 1]; rounded down, so never outside it."""
    return math.floor(epsilon * PIXEL_LEVELS + 1e-9)


def budget(epsilon: float | None) -> str:
    """A budget in both units: "0.1 (25 codes)"; no budget where the arm changes no pixel."""
    if not epsilon:
        return ABSENT
    return f"{epsilon:.4g} ({codes(epsilon)}{NBSP}codes)"


def bits(value: object) -> str:
    """Weight bits: one number, or one per population."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {width}" for name, width in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(width) for width in value)
    return str(value)


def corpus_line(corpus: Mapping[str, Any]) -> str:
    """What became of the corpus of counterexamples."""
    added = f"{count(corpus['added'])} new {'one' if corpus['added'] == 1 else 'ones'} kept"
    if not corpus["replayed"]:
        return f"Counterexamples: none to replay, {added}."
    return (
        f"Counterexamples: {count(corpus['replayed'])} replayed first, of which the reference gets "
        f"{count(corpus['reference_wrong'])} wrong and the deployed model {count(corpus['deployed_wrong'])} "
        f"({count(corpus['newly_deployed_wrong'])} that were right when found); {added}."
    )


def looks_line(sequential: Mapping[str, Any]) -> str:
    """How often was looked, and what that costs."""
    looks, planned = sequential["looks"], sequential["planned"]
    return (
        f"Looked {looks} of {len(planned)} planned times, after {count(planned[looks - 1])} of {count(planned[-1])} "
        f"images: bounds are of {percent(sequential['confidence'], 2)} confidence here, so that all looks together "
        "spend no more error than one (Lan-DeMets spending after O'Brien and Fleming)."
    )


PLACES = {"sample": "image"}


def divergence(first: Mapping[str, Any] | None) -> str:
    """The first differing spike of a layer, or value of a runtime, which then names its layer too."""
    if first is None:
        return "none"
    places = ("layer", "sample", "step", "neuron") if "layer" in first else ("sample", "step", "neuron")
    return ", ".join(f"{PLACES.get(place, place)} {number(first.get(place))}" for place in places)


def step_cost(cost: float | None) -> str:
    """The change in accuracy of a step that costs as much, in signed points."""
    return ABSENT if cost is None else points(-cost)
