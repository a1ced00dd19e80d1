"""The report page: one self-contained HTML file that says the verdict first and then shows why.

It loads nothing, runs no script and needs no network; every word from a report is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from hardware.errors import RuleViolations, Violation
from pipeline.fidelity import page_tables as tables
from pipeline.fidelity import wording
from pipeline.fidelity.gallery import GalleryItem
from pipeline.fidelity.page_plots import draw_plots
from pipeline.fidelity.page_tables import SIGNS, Table, make_table
from pipeline.fidelity.plots import perturbation, picture, png_uri
from pipeline.fidelity.rasters import NEURONS, raster_pair

SCHEMA = "spikeguard.fidelity/1"
REQUIRED = (
    "verdict", "outcome", "margin", "confidence", "samples", "seed", "steps", "bits", "epsilon",
    "certified_runtimes", "arms", "runtimes", "layers",
)  # fmt: skip
OPTIONAL = (
    "summary", "created", "data", "missing_runtimes", "attribution", "baseline", "quantization", "proofs",
    "gradient_health", "placement", "energy", "timings", "versions", "reproduce", "curve", "transfer_matrix",
    "waterfall",
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
class Card:
    """A gallery item as the page shows it: data URIs of its pictures.

    Attributes:
        rasters: of the reference and of the deployed network; None without spikes.
        differing: spikes by layer, in words.
    """

    item: GalleryItem
    clean: str
    change: str
    adversarial: str
    rasters: tuple[str, str] | None
    differing: str


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
        plots=draw_plots(report),
        raster_neurons=NEURONS,
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
        "curve": ("Accuracy over the budget", tables.CURVE, report.get("curve")),
        "waterfall": ("Step by step", tables.WATERFALL, (report.get("waterfall") or {}).get("steps")),
        "transfer": ("Accuracy on images crafted on each model", *tables.transfer_parts(report.get("transfer_matrix"))),
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


def _card(item: GalleryItem, full_scale: int) -> Card:
    pair = raster_pair(item.spikes) if item.spikes else None
    return Card(
        item,
        png_uri(picture(item.clean)),
        png_uri(perturbation(item.clean, item.adversarial, full_scale)),
        png_uri(picture(item.adversarial)),
        None if pair is None else (png_uri(pair.reference), png_uri(pair.deployed)),
        "" if pair is None else pair.text,
    )
