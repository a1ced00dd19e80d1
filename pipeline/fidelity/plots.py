"""The report's pictures: SVG that follows the page's colours, and PNG data URIs of pixel codes.

matplotlib draws with placeholder colours; they are exchanged for the page's CSS variables, so one picture serves
the light page, the dark page and the print.
"""

from __future__ import annotations

import base64
import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from pipeline.fidelity.wording import MINUS, points

SVG = "http://www.w3.org/2000/svg"
XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
# Placeholder colour -> CSS variable of the page. Unused as real colours, so the exchange is unambiguous.
COLOURS = {
    "ink": "#010203",
    "muted": "#010204",
    "line": "#010205",
    "reference": "#010206",
    "deployed": "#010207",
    "forbidden": "#010208",
    "track": "#010209",
    "card": "#01020a",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "spikeguard",  # equal reports give equal pages
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,
    "font.size": 13,
    "text.color": COLOURS["ink"],
    "hatch.color": COLOURS["forbidden"],
    "hatch.linewidth": 0.8,
}
WIDTH = 440.0
LEFT, VALUE_WIDTH = 6.0, 62.0
AXES_WIDTH = WIDTH - LEFT - VALUE_WIDTH
VALUE_RIGHT = 1 + (VALUE_WIDTH - 2) / AXES_WIDTH  # in fractions of the axes
LABEL_HEIGHT, BAR_HEIGHT, ROW_GAP, AXIS_HEIGHT = 24.0, 19.0, 14.0, 26.0
IMAGE_PIXELS = 160
METADATA = ("Creator", "Date", "Format", "Type")


@dataclass(frozen=True)
class Bar:
    """One bar of a row: a CSS colour name of ``COLOURS``, its length and interval in percent, its text."""

    colour: str
    value: float
    text: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class BarRow:
    """A labelled group of bars."""

    label: str
    bars: tuple[Bar, ...]
    strong: bool = False


@dataclass(frozen=True)
class DifferenceRow:
    """Deployed minus reference accuracy, as fractions, with the one-sided bound that is judged."""

    label: str
    difference: float
    lower_bound: float
    interval: tuple[float, float] | None
    strong: bool = False


def bar_plot(name: str, title: str, rows: Sequence[BarRow], limit: float) -> Markup:
    """Horizontal bars from zero to ``limit`` with intervals, values in a column at the right.

    Args:
        name: unique on the page; prefixes the identifiers inside the picture.
        title: the text a screen reader says in place of the picture.
        rows: one group per row, from top to bottom, all with equally many bars.
        limit: right end of the axis, in percent like the bars.
    """
    bars_per_row = max(len(row.bars) for row in rows)
    row_height = LABEL_HEIGHT + bars_per_row * BAR_HEIGHT + ROW_GAP
    with mpl.rc_context(STYLE):
        figure, axes = open_canvas(row_height * len(rows), (0.0, limit))
        for index, row in enumerate(rows):
            top = index * row_height
            label_row(axes, top, row.label, row.strong, index > 0)
            for place, bar in enumerate(row.bars):
                middle = top + LABEL_HEIGHT + (place + 0.5) * BAR_HEIGHT
                _bar(axes, middle, bar, limit)
        add_ticks(axes, nice_ticks(0.0, limit), "%")
        return write_svg(figure, name, title)


def difference_plot(name: str, title: str, rows: Sequence[DifferenceRow], margin: float) -> Markup:
    """Forest plot of deployed minus reference accuracy in percentage points against the margin.

    A diamond is the difference, the thin line its two-sided interval, the upright stroke the one-sided lower bound.
    Rows are as high as those of a ``bar_plot`` of two bars, so both line up side by side.
    """
    row_height = LABEL_HEIGHT + 2 * BAR_HEIGHT + ROW_GAP
    ends = [-2 * margin, margin]
    for row in rows:
        ends += [row.difference, row.lower_bound, *(row.interval or ())]
    span = max(ends) - min(ends)
    low, high = 100 * (min(ends) - 0.05 * span), 100 * (max(ends) + 0.05 * span)
    height = row_height * len(rows)
    with mpl.rc_context(STYLE):
        figure, axes = open_canvas(height, (low, high))
        for index, row in enumerate(rows):
            _difference(axes, index * row_height, row, -100 * margin, index > 0)
        add_ticks(axes, nice_ticks(low, high), "points")
        return write_svg(figure, name, title)


def perturbation(clean: NDArray[np.uint8], adversarial: NDArray[np.uint8], full_scale: int) -> NDArray[np.uint8]:
    """The signed change as a picture: orange brighter, violet darker, near white unchanged.

    Args:
        clean: codes ``(channels, height, width)``.
        adversarial: codes of the same shape.
        full_scale: the change, in codes, that is drawn in full colour.

    Returns:
        uint8 ``(height, width, 3)``.
    """
    change = (adversarial.astype(np.float64) - clean) / max(full_scale, 1)
    if len(change) == 3:
        return np.clip(np.rint(127.5 + 127.5 * change), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    # The map's ends are too dark to tell apart: its middle 70 percent run from violet over white to orange.
    rgba = mpl.colormaps["PuOr_r"](0.5 + 0.35 * np.clip(change.mean(axis=0), -1, 1), bytes=True)
    return np.asarray(rgba, np.uint8)[..., :3]


def picture(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixel codes ``(channels, height, width)`` as ``(height, width, 3)``; unless three, channels give their mean."""
    if len(image) == 3:
        return image.transpose(1, 2, 0)
    grey = np.rint(image.mean(axis=0)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """``(height, width, 3)`` as a PNG data URI, each pixel repeated to a sharp square."""
    factor = max(1, IMAGE_PIXELS // max(pixels.shape[:2]))
    enlarged = np.repeat(np.repeat(pixels, factor, axis=0), factor, axis=1)
    content = io.BytesIO()
    imsave(content, np.ascontiguousarray(enlarged), format="png")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def open_canvas(height: float, limits: tuple[float, float], whole_width: bool = False) -> tuple[Figure, Axes]:
    """An empty picture whose vertical unit is one pixel, growing downwards; at the right values have room, or not."""
    total = height + AXIS_HEIGHT
    width = WIDTH - 2 * LEFT if whole_width else AXES_WIDTH
    figure = Figure(figsize=(WIDTH / 72, total / 72), dpi=72)
    axes = figure.add_axes((LEFT / WIDTH, AXIS_HEIGHT / total, width / WIDTH, height / total))
    axes.set_xlim(*limits)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(COLOURS["line"])
    return figure, axes


def label_row(axes: Axes, top: float, text: str, strong: bool, ruled: bool) -> None:
    """The row's name at its upper left, a hairline above all rows but the first."""
    if ruled:
        axes.plot([0, VALUE_RIGHT], [top, top], transform=axes.get_yaxis_transform(),
                  color=COLOURS["track"], lw=1, clip_on=False)  # fmt: skip
    weight = "bold" if strong else "normal"
    # Lines that pass behind a name are not to cross its letters.
    behind = {"facecolor": COLOURS["card"], "edgecolor": "none", "pad": 1}
    axes.text(axes.get_xlim()[0], top + LABEL_HEIGHT / 2 + 2, text, va="center", ha="left", weight=weight, bbox=behind)


def _bar(axes: Axes, middle: float, bar: Bar, limit: float) -> None:
    thickness = BAR_HEIGHT - 7
    axes.barh(middle, limit, thickness, color=COLOURS["track"])
    axes.barh(middle, bar.value, thickness, color=COLOURS[bar.colour])
    if bar.interval is not None:
        # A rim in the page's own colour keeps the interval readable on a bar of any colour.
        for colour, rim in ((COLOURS["card"], 0.75), (COLOURS["ink"], 0.0)):
            _whiskers(axes, middle, bar.interval, colour, rim)
    add_value(axes, middle, bar.text, COLOURS["ink"])


def _whiskers(axes: Axes, middle: float, interval: tuple[float, float], colour: str, rim: float) -> None:
    low, high = interval
    path = [(low, -4.0), (low, 4.0), (low, 0.0), (high, 0.0), (high, -4.0), (high, 4.0)]
    across, offsets = zip(*path, strict=True)
    axes.plot(
        across, [middle + offset for offset in offsets],
        color=colour, lw=1.5 + 2 * rim, solid_capstyle="projecting", clip_on=False,
    )  # fmt: skip


def add_value(axes: Axes, middle: float, text: str, colour: str) -> None:
    """A number in the column at the right, aligned at its end."""
    axes.text(VALUE_RIGHT, middle, text, transform=axes.get_yaxis_transform(), va="center", ha="right", color=colour)


def _difference(axes: Axes, top: float, row: DifferenceRow, limit: float, ruled: bool) -> None:
    label_row(axes, top, row.label, row.strong, ruled)
    upper, middle, lower = (top + LABEL_HEIGHT + k * BAR_HEIGHT for k in range(3))
    low = axes.get_xlim()[0]
    forbidden = COLOURS["forbidden"]
    axes.fill_betweenx([upper, lower], low, limit, facecolor="none", edgecolor=forbidden, hatch="//", lw=0, alpha=0.45)
    axes.plot([limit, limit], [upper, lower], color=forbidden, lw=2, dashes=(3, 2))
    axes.plot([0, 0], [upper, lower], color=COLOURS["line"], lw=1)
    colour = COLOURS["ink" if row.strong else "muted"]
    if row.interval is not None:
        axes.plot([100 * end for end in row.interval], [middle, middle], color=colour, lw=1.5)
    axes.plot([100 * row.lower_bound] * 2, [middle - 9, middle + 9], color=colour, lw=3, solid_capstyle="butt")
    axes.plot([100 * row.difference], [middle], "D", color=COLOURS["deployed"] if row.strong else colour, ms=8)
    add_value(axes, middle - BAR_HEIGHT / 2, points(row.difference), colour)
    add_value(axes, middle + BAR_HEIGHT / 2, f"≥ {points(row.lower_bound)}", colour)


def nice_ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers inside the limits, zero among them where it lies inside."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def add_ticks(axes: Axes, ticks: list[float], unit: str) -> None:
    """Tick labels; the unit stands under the column of values."""
    axes.set_xticks(ticks, [f"{tick:g}".replace("-", MINUS) for tick in ticks])
    axes.tick_params(axis="x", color=COLOURS["line"], labelcolor=COLOURS["muted"], labelsize=12, length=4)
    axes.annotate(
        unit, (VALUE_RIGHT, 0), xytext=(0, -7), xycoords="axes fraction", textcoords="offset points",
        color=COLOURS["muted"], size=12, va="top", ha="right",
    )  # fmt: skip


def write_svg(figure: Figure, name: str, title: str) -> Markup:
    """The picture as an inline ``<svg>``: the page's colours, identifiers of its own, said as ``title``."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata=dict.fromkeys(METADATA))
    root = ET.fromstring(drawn.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # The file's metadata and its page-wide style have no place inside another page.
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, name)
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "img")
    root.set("aria-label", title)
    return Markup(ET.tostring(root, encoding="unicode"))


def _adapt(element: ET.Element, name: str) -> None:
    element.tag = element.tag.removeprefix(f"{{{SVG}}}")
    reference = element.attrib.pop(XLINK_HREF, None)
    if reference is not None:
        element.set("href", reference.replace("#", f"#{name}-"))
    for attribute, value in list(element.attrib.items()):
        if attribute == "id":
            element.set(attribute, f"{name}-{value}")
        elif attribute == "clip-path":
            element.set(attribute, value.replace("#", f"#{name}-"))
        elif attribute in ("style", "fill"):
            for variable, colour in COLOURS.items():
                value = value.replace(colour, f"var(--{variable})")
            element.set(attribute, value.replace("url(#", f"url(#{name}-"))
