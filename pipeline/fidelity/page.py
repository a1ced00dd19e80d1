"""The report page: one self-contained HTML file that says the verdict first and then shows why.

It loads nothing, runs no script and needs no network; every word from a report is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from hardware.errors import RuleViolations, Violation
from pipeline.fidelity import page_tables as tables
from pipeline.fidelity import wording
from pipeline.fidelity.page_tables import SIGNS, Table, make_table
from pipeline.fidelity.plots import (
    Bar,
    BarRow,
    DifferenceRow,
    bar_plot,
    difference_plot,
    perturbation,
    picture,
    png_uri,
)

SCHEMA = "spikeguard.fidelity/1"
REQUIRED = (
    "verdict", "outcome", "margin", "confidence", "samples", "seed", "steps", "bits", "epsilon",
    "certified_runtimes", "arms", "runtimes", "layers",
)  # fmt: skip
OPTIONAL = (
    "summary", "created", "data", "missing_runtimes", "attribution", "baseline", "quantization", "proofs",
    "gradient_health", "placement", "energy", "timings", "versions", "reproduce",
    "reference", "corpus", "sequential",
)  # fmt: skip
OUTCOMES = {
    "OK": "Both deciding arms are within the margin, and every named runtime computes exactly the checked network.",
    "QUANTIZE": "The network could not be quantised.",
    "MAP": "The network does not fit the target.",
    "EXPORT": "The bundle could not be written or read back.",
    "RUNTIME": "A requested runtime did not finish.",
    "TRACE_MISMATCH": "A runtime does not compute what the integer network means.",
    "MASKED_GRADIENTS": "The gradients look masked, so failed attacks are no evidence of robustness.",
    "ROBUSTNESS_INFERIOR": "The deployed network loses more accuracy than the margin allows.",
    "INCONCLUSIVE": "Too few images to tell whether the loss is within the margin.",
}


@dataclass(frozen=True)
class GalleryItem:
    """One image with its adversarial version, and what both models answer.

    Attributes:
        sample: index in the test split.
        label: the right class.
        attack: which attack made the adversarial image.
        clean: codes ``(channels, height, width)``.
        adversarial: codes of the same shape.
        reference_answers: classes the float SNN gives to the clean and to the adversarial image.
        deployed_answers: the same of the integer network.
    """

    sample: int
    label: int
    attack: str
    clean: NDArray[np.uint8]
    adversarial: NDArray[np.uint8]
    reference_answers: tuple[int, int]
    deployed_answers: tuple[int, int]

    @property
    def largest_change(self) -> int:
        """In pixel codes."""
        return int(np.abs(self.adversarial.astype(np.int64) - self.clean).max())


@dataclass(frozen=True)
class Card:
    """A gallery item as the page shows it: data URIs of its three pictures."""

    item: GalleryItem
    clean: str
    change: str
    adversarial: str


def render_report(report: Mapping[str, Any], gallery: Sequence[GalleryItem]) -> str:
    """The whole page.

    Args:
        report: content of ``report.json``; of its optional sections those that are absent or null are left out.
        gallery: images to show; may be empty.

    Raises:
        RuleViolations: if the report is of another schema, or lacks what every report has.
    """
    _require_complete(report)
    full_scale = max((item.largest_change for item in gallery), default=0)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["w"] = wording
    return environment.get_template("report.html.j2").render(
        **{name: report.get(name) for name in REQUIRED + OPTIONAL},
        sign=SIGNS[report["verdict"]][1],
        explanation=OUTCOMES.get(report["outcome"], report["outcome"]),
        deciding=[arm for arm in report["arms"] if arm["deciding"]],
        tables=_tables(report),
        plots=_plots(report),
        cards=[_card(item, full_scale) for item in gallery],
        full_scale=full_scale,
    )


def _require_complete(report: Mapping[str, Any]) -> None:
    remedy = "write report.json again with `spikeguard fidelity`"
    wrong = [
        Violation(f"field {name}", "every report has it", "nothing", "a value", remedy)
        for name in REQUIRED
        if report.get(name) is None
    ]
    for name, allowed in (("schema", (SCHEMA,)), ("verdict", tuple(SIGNS))):
        if report.get(name) is not None and report[name] not in allowed:
            wrong.append(Violation(f"field {name}", "known value", str(report[name]), " or ".join(allowed), remedy))
    if wrong:
        raise RuleViolations("the fidelity report cannot be shown", wrong)


def _tables(report: Mapping[str, Any]) -> dict[str, Table | None]:
    """Every table; None where the report has no rows for it."""
    health, placement = report.get("gradient_health") or {}, report.get("placement") or {}
    energy = report.get("energy") or {}
    sources: dict[str, tuple[str, Sequence[tables.Column], Sequence[tables.Row] | None]] = {
        "arms": ("Accuracy under attack, arm by arm, with 95 % intervals", tables.ARMS, report["arms"]),
        "runtimes": ("Runtimes against the reference arithmetic", tables.RUNTIMES, report["runtimes"]),
        "layers": ("Spikes of the float network and of the integer network", tables.LAYERS, report["layers"]),
        "attribution": ("What each kind of rounding changes", tables.ATTRIBUTION, report.get("attribution")),
        "quantization": ("Integer units per real unit, by layer", tables.QUANTIZATION, report.get("quantization")),
        "proofs": ("What interval arithmetic proves for every possible image", tables.PROOFS, report.get("proofs")),
        "health": ("Would the attacks have worked, had the network been weak?", tables.HEALTH, health.get("checks")),
        "placement": ("Size on the target", tables.PLACEMENT, placement.get("populations")),
        "energy": ("Energy of one image, estimated and not measured", tables.ENERGY, energy.get("estimates")),
        "timings": ("Time by stage", tables.TIMINGS, tables.named_rows(report.get("timings") or {})),
        "versions": ("Software", tables.VERSIONS, tables.named_rows(report.get("versions") or {})),
    }  # fmt: skip
    return {
        name: make_table(caption, columns, rows) if rows else None for name, (caption, columns, rows) in sources.items()
    }


def _plots(report: Mapping[str, Any]) -> dict[str, Markup | None]:
    """Every plot; None where the report has nothing to draw."""
    arms, layers, baseline = report["arms"], report["layers"], report.get("baseline")
    return {
        "accuracies": _accuracies(arms) if arms else None,
        "differences": _differences(arms, report["margin"]) if arms else None,
        "layers": _layers(layers) if layers else None,
        "baseline": _baseline(baseline) if baseline else None,
    }


def _percent_bar(colour: str, accuracy: float, interval: Sequence[float] | None) -> Bar:
    ends = None if interval is None else (100 * interval[0], 100 * interval[1])
    return Bar(colour, 100 * accuracy, wording.percent(accuracy), ends)


def _accuracies(arms: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [
        BarRow(
            arm["name"],
            tuple(
                _percent_bar(model, arm[f"{model}_accuracy"], arm.get(f"{model}_interval"))
                for model in ("reference", "deployed")
            ),
            arm["deciding"],
        )
        for arm in arms
    ]
    spoken = "; ".join(f"{row.label}: reference {row.bars[0].text}, deployed {row.bars[1].text}" for row in rows)
    return bar_plot("accuracies", f"Accuracy of both models. {spoken}.", rows, 100)


def _differences(arms: Sequence[Mapping[str, Any]], margin: float) -> Markup:
    rows = [
        DifferenceRow(
            arm["name"],
            arm["difference"],
            arm["lower_bound"],
            None if arm.get("interval") is None else (arm["interval"][0], arm["interval"][1]),
            arm["deciding"],
        )
        for arm in arms
    ]
    spoken = "; ".join(
        f"{row.label}: {wording.points(row.difference)}, lower bound {wording.points(row.lower_bound)}" for row in rows
    )
    limit = wording.points(-margin)
    return difference_plot(
        "differences", f"Deployed minus reference accuracy in points; the margin is {limit}. {spoken}.", rows, margin
    )


def _layers(layers: Sequence[Mapping[str, Any]]) -> Markup:
    shares = [1 - layer["spike_agreement"] for layer in layers]
    rows = [
        BarRow(layer["name"], (Bar("deployed", 100 * share, wording.percent(share, 2)),))
        for layer, share in zip(layers, shares, strict=True)
    ]
    spoken = "; ".join(f"{row.label}: {row.bars[0].text}" for row in rows)
    # Even equal networks get an axis; one percent is the least that is worth a look.
    limit = min(100.0, max(1.0, *(110 * share for share in shares)))
    return bar_plot("layers", f"Share of spikes that differ, by layer. {spoken}.", rows, limit)


def _baseline(baseline: Mapping[str, Any]) -> Markup:
    rows = [
        BarRow(
            f"{network}, {images}",
            (_percent_bar(colour, baseline[f"{prefix}{kind}_accuracy"], baseline.get(f"{prefix}{kind}_interval")),),
            strong=kind == "attacked",
        )
        for network, prefix, colour in (("robust", "robust_", "reference"), ("naturally trained", "", "muted"))
        for kind, images in (("clean", "clean images"), ("attacked", "under attack"))
    ]
    spoken = "; ".join(f"{row.label}: {row.bars[0].text}" for row in rows)
    return bar_plot("baseline", f"Accuracy of the robust and of a naturally trained network. {spoken}.", rows, 100)


def _card(item: GalleryItem, full_scale: int) -> Card:
    return Card(
        item,
        png_uri(picture(item.clean)),
        png_uri(perturbation(item.clean, item.adversarial, full_scale)),
        png_uri(picture(item.adversarial)),
    )
