"""The report's pictures of how things go on: accuracy over the budget, step by step to the chip, spikes over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.fidelity.plots import (
    BAR_HEIGHT,
    COLOURS,
    LABEL_HEIGHT,
    ROW_GAP,
    STYLE,
    WIDTH,
    add_ticks,
    add_value,
    label_row,
    nice_ticks,
    open_canvas,
    write_svg,
)

CURVE_HEIGHT, CURVE_LEFT, CURVE_RIGHT, CURVE_TOP, CURVE_BOTTOM = 300.0, 46.0, 14.0, 22.0, 48.0
CELL_HEIGHT, MAX_LABELLED_STEPS = 30.0, 8
LEAST_SPAN = 4.0
"""Percentage points that a waterfall's axis covers at least, lest a single image look like a landslide."""


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy of one model at one budget, in percent, with its interval."""

    epsilon: float
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class WaterfallStep:
    """Accuracy after a step and before it, in percent; None where it is not known."""

    label: str
    text: str
    accuracy: float | None
    before: float | None
    strong: bool = False


def curve_plot(
    name: str, title: str, reference: Sequence[CurvePoint], deployed: Sequence[CurvePoint], deciding: float
) -> Markup:
    """Accuracy of both models over epsilon with intervals.

    Args:
        name: unique on the page; prefixes the identifiers inside the picture.
        title: the text a screen reader says in place of the picture.
        reference, deployed: points at the same budgets, ascending.
        deciding: the budget that the verdict hangs on.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, CURVE_HEIGHT / 72), dpi=72)
        across, upright = WIDTH - CURVE_LEFT - CURVE_RIGHT, CURVE_HEIGHT - CURVE_TOP - CURVE_BOTTOM
        axes = figure.add_axes(
            (CURVE_LEFT / WIDTH, CURVE_BOTTOM / CURVE_HEIGHT, across / WIDTH, upright / CURVE_HEIGHT)
        )
        largest = max(point.epsilon for point in reference)
        axes.set_xlim(-0.03 * largest, 1.04 * largest)
        axes.set_ylim(0, 103)
        _frame(figure, axes)
        axes.set_yticks(range(0, 101, 20), [f"{tick}%" for tick in range(0, 101, 20)])
        axes.grid(axis="y", color=COLOURS["track"], lw=1)
        ticks = [point.epsilon for point in reference]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.tick_params(color=COLOURS["line"], labelcolor=COLOURS["muted"], labelsize=12, length=4)
        axes.set_xlabel("epsilon, in pixel units from 0 to 1", color=COLOURS["muted"], size=12)
        axes.plot([deciding, deciding], [0, 103], color=COLOURS["line"], lw=1.5, dashes=(3, 2), zorder=1)
        axes.text(deciding, 105, "deciding", ha="center", va="bottom", size=12, color=COLOURS["muted"])
        # Side by side where they would hide each other.
        for points, colour, style, shift in ((reference, "reference", "o-", -1), (deployed, "deployed", "s--", 1)):
            moved = [point.epsilon + shift * 0.006 * largest for point in points]
            for place, point in zip(moved, points, strict=True):
                axes.plot([place, place], point.interval, color=COLOURS[colour], lw=1.5, zorder=2)
            heights = [point.accuracy for point in points]
            axes.plot(moved, heights, style, color=COLOURS[colour], lw=2, ms=6, zorder=3)
        return write_svg(figure, name, title)


def waterfall_plot(name: str, title: str, steps: Sequence[WaterfallStep]) -> Markup:
    """Accuracy after each step, and the way to it from the step before: down in one colour, up in another."""
    row_height = LABEL_HEIGHT + BAR_HEIGHT + ROW_GAP / 2
    known = [step.accuracy for step in steps if step.accuracy is not None]
    middle, span = (min(known) + max(known)) / 2, max(LEAST_SPAN, 1.15 * (max(known) - min(known)))
    low, high = max(0.0, middle - span / 2), min(100.0, middle + span / 2)
    with mpl.rc_context(STYLE):
        figure, axes = open_canvas(row_height * len(steps), (low, high))
        for index, step in enumerate(steps):
            top = index * row_height
            label_row(axes, top, step.label, step.strong, index > 0)
            place = top + LABEL_HEIGHT + BAR_HEIGHT / 2
            add_value(axes, place, step.text, COLOURS["ink"])
            if step.accuracy is None:
                continue
            if step.before is not None:
                colour = COLOURS["forbidden" if step.accuracy < step.before else "reference"]
                left, right = sorted((step.before, step.accuracy))
                axes.barh(place, right - left, BAR_HEIGHT - 7, left=left, color=colour)
                axes.plot([step.before] * 2, [top - ROW_GAP / 2, place + 6], color=COLOURS["line"], lw=1, zorder=0)
            axes.plot([step.accuracy] * 2, [place - 8, place + 8], color=COLOURS["ink"], lw=3, solid_capstyle="butt")
        add_ticks(axes, nice_ticks(low, high), "%")
        return write_svg(figure, name, title)


def heat_map(name: str, title: str, layers: Sequence[str], shares: Sequence[Sequence[float]], full: float) -> Markup:
    """A cell per layer and step, the darker the more spikes differ; its number is in percent.

    Args:
        name, title: as for the others.
        layers: from top to bottom.
        shares: of differing spikes, by layer and step.
        full: the share that is drawn in full colour.
    """
    steps = len(shares[0])
    row_height = LABEL_HEIGHT + CELL_HEIGHT + ROW_GAP / 2
    with mpl.rc_context(STYLE):
        figure, axes = open_canvas(row_height * len(layers), (0.0, float(steps)), whole_width=True)
        for index, (layer, row) in enumerate(zip(layers, shares, strict=True)):
            top = index * row_height
            label_row(axes, top, layer, False, False)
            for step, share in enumerate(row):
                corner = (step + 0.03, top + LABEL_HEIGHT)
                size = (0.94, CELL_HEIGHT)
                axes.add_patch(Rectangle(corner, *size, fc=COLOURS["track"], lw=0))
                if share:
                    strength = 0.06 + 0.42 * min(1.0, share / full)  # the number on it stays readable, dark or light
                    axes.add_patch(Rectangle(corner, *size, fc=COLOURS["deployed"], alpha=strength, lw=0))
                if steps <= MAX_LABELLED_STEPS:
                    text = f"{100 * share:.1f}" if share else "0"
                    axes.text(step + 0.5, top + LABEL_HEIGHT + CELL_HEIGHT / 2, text, ha="center", va="center", size=12)
        every = math.ceil(steps / 16)
        shown = range(0, steps, every)
        axes.set_xticks([step + 0.5 for step in shown], [str(step) for step in shown])
        axes.tick_params(axis="x", color=COLOURS["line"], labelcolor=COLOURS["muted"], labelsize=12, length=4)
        return write_svg(figure, name, title)


def _frame(figure: Figure, axes: Axes) -> None:
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("bottom", "left"))
        spine.set_color(COLOURS["line"])
