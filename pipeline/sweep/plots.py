"""The plot of a sweep: accuracies, memory and synaptic operations over bits, one line per number of time steps.

T is told by lightness and by marker, so that it can be read in grey and by the colour-blind; whether an integer
network is non-inferior to its float SNN is told by how its marker is filled.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.sweep.points import Point, Reference

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "spikeguard",  # equal sweeps give equal pictures
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
}
INK = "#222222"
MARKERS = "osD^vPX*"
DODGE, ROOM = 0.18, 0.7
"""Bits between the markers of neighbouring T, so that intervals do not hide each other; and for those of all T."""
LIGHTEST = 0.8
"""Of the colour map; beyond it, lines are too pale on white."""
PIXELS_PER_INCH = 160
FINGERPRINTS: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
"""What matplotlib would write of itself and of the time."""


@dataclass(frozen=True)
class _Look:
    """How one T is drawn.

    Attributes:
        shift: in bits.
    """

    colour: tuple[float, float, float, float]
    marker: str
    shift: float


def draw(references: Sequence[Reference], points: Sequence[Point], title: str) -> dict[str, bytes]:
    """The plot as SVG and PNG, by file ending.

    Args:
        references: one per T, in order.
        points: of all bits and T; refused ones are marked as such.
        title: what all panels have in common.
    """
    looks = _looks([reference.steps for reference in references])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 8.2))
        grid = figure.add_gridspec(
            2, 2, height_ratios=(3, 2), left=0.07, right=0.985, bottom=0.07, top=0.80, hspace=0.34, wspace=0.2
        )
        robust, clean, memory, operations = (figure.add_subplot(grid[place]) for place in range(4))
        _accuracy_panel(robust, points, looks, lambda point: point.worst_case)
        _label(robust, "Worst case", "accuracy, %")
        _accuracy_panel(clean, points, looks, lambda point: point.clean)
        _label(clean, "Clean", "accuracy, %")
        _amount_panel(memory, points, looks, lambda point: _taken(point, "memory_bytes") / 1024)
        _label(memory, "Memory on Loihi 2", "weights and neuron states, KiB")
        _amount_panel(operations, points, looks, _kilo_operations)
        _label(operations, "Synaptic operations", "thousands per image")
        for axes in (robust, clean, memory, operations):
            _bit_axis(axes, points, looks)
        figure.text(0.015, 0.975, "Bits of the weights × time steps T", size=14, weight="bold", va="top")
        figure.text(0.015, 0.94, title, va="top", color=INK)
        _legends(figure, references, looks)
        return {kind: _saved(figure, kind) for kind in FINGERPRINTS}


def _label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)


def _looks(steps: Sequence[int]) -> dict[int, _Look]:
    """Dark to light for few to many steps, in the order given."""
    last = max(len(steps) - 1, 1)
    middle, dodge = (len(steps) - 1) / 2, min(DODGE, ROOM / last)
    return {
        one: _Look(
            mpl.colormaps["cividis"](LIGHTEST * place / last), MARKERS[place % len(MARKERS)], dodge * (place - middle)
        )
        for place, one in enumerate(steps)
    }


def _accuracy_panel(
    axes: Axes, points: Sequence[Point], looks: dict[int, _Look], arm_of: Callable[[Point], Any]
) -> None:
    for steps, look in looks.items():
        here = [point for point in points if point.steps == steps and point.arms]
        arms = [arm_of(point) for point in here]
        across = [point.bits + look.shift for point in here]
        deployed = [100 * arm["deployed_accuracy"] for arm in arms]
        lengths = [
            [value - 100 * arm["deployed_interval"][0] for value, arm in zip(deployed, arms, strict=True)],
            [100 * arm["deployed_interval"][1] - value for value, arm in zip(deployed, arms, strict=True)],
        ]
        axes.errorbar(across, deployed, lengths, color=look.colour, lw=1.6, elinewidth=1.3, capsize=3)
        axes.plot(across, [100 * arm["reference_accuracy"] for arm in arms], color=look.colour, lw=1.4, ls=(0, (2, 2)))
        for place, value, arm in zip(across, deployed, arms, strict=True):
            _marker(axes, place, value, look, arm["verdict"])


def _marker(axes: Axes, across: float, value: float, look: _Look, verdict: str) -> None:
    """Full: non-inferior. Open: undecided. Crossed out: inferior."""
    face = look.colour if verdict == "pass" else "white"
    axes.plot([across], [value], look.marker, color=look.colour, markerfacecolor=face, ms=7, mew=1.5, zorder=3)
    if verdict == "fail":
        axes.plot([across], [value], "x", color=INK, ms=5, mew=1.3, zorder=4)


def _amount_panel(
    axes: Axes, points: Sequence[Point], looks: dict[int, _Look], amount: Callable[[Point], float]
) -> None:
    for steps, look in looks.items():
        here = [point for point in points if point.steps == steps and point.arms]
        across = [point.bits + look.shift for point in here]
        axes.plot(across, [amount(point) for point in here], color=look.colour, marker=look.marker, ms=6, lw=1.6)
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def _taken(point: Point, name: str) -> float:
    return float(point.placement[name]) if point.placement else 0.0


def _kilo_operations(point: Point) -> float:
    return float(point.energy["synaptic_operations_per_image"]) / 1000 if point.energy else 0.0


def _bit_axis(axes: Axes, points: Sequence[Point], looks: dict[int, _Look]) -> None:
    bits = sorted({point.bits for point in points})
    axes.set_xticks(bits)
    axes.set_xlim(bits[0] - 0.5, bits[-1] + 0.5)
    axes.set_xlabel("bits per weight")
    for point in points:
        if not point.arms:
            look = looks[point.steps]
            axes.text(
                point.bits + look.shift, 0.02, "refused", rotation=90, size=8, color=look.colour, ha="center",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip


def _legends(figure: Figure, references: Sequence[Reference], looks: dict[int, _Look]) -> None:
    """One row for T, one for what lines and markers mean."""
    by_steps: dict[str, Any] = {
        f"T = {one.steps}" + (", fine-tuned for it" if one.finetuned else ""): Line2D(
            [], [], color=looks[one.steps].colour, marker=looks[one.steps].marker, ms=7, lw=1.6
        )
        for one in references
    }
    crossed = (
        Line2D([], [], color=INK, marker="o", ls="", ms=7, mfc="white", mew=1.5),
        Line2D([], [], color=INK, marker="x", ls="", ms=5, mew=1.3),
    )
    meanings: dict[str, Any] = {
        "integer network": Line2D([], [], color=INK, lw=1.6),
        "float SNN, same T and images": Line2D([], [], color=INK, lw=1.4, ls=(0, (2, 2))),
        "non-inferior to it": Line2D([], [], color=INK, marker="o", ls="", ms=7),
        "undecided": Line2D([], [], color=INK, marker="o", ls="", ms=7, mfc="white", mew=1.5),
        "inferior": crossed,
    }
    for entries, top in ((by_steps, 0.915), (meanings, 0.885)):
        figure.legend(
            list(entries.values()), list(entries), loc="upper left", bbox_to_anchor=(0.008, top), ncols=len(entries),
            frameon=False, columnspacing=1.6, handletextpad=0.5,
        )  # fmt: skip


def _saved(figure: Figure, kind: str) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=PIXELS_PER_INCH, metadata=FINGERPRINTS[kind])
    return content.getvalue()
