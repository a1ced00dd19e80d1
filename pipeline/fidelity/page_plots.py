"""The report's plots: rows of ``report.json`` as pictures, each with the words that a screen reader says instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.fidelity import wording
from pipeline.fidelity.charts import CurvePoint, WaterfallStep, curve_plot, heat_map, waterfall_plot
from pipeline.fidelity.plots import Bar, BarRow, DifferenceRow, bar_plot, difference_plot


def draw_plots(report: Mapping[str, Any]) -> dict[str, Markup | None]:
    """Every plot; None where the report has nothing to draw."""
    arms, layers, baseline = report["arms"], report["layers"], report.get("baseline")
    curve, waterfall = report.get("curve"), report.get("waterfall")
    return {
        "accuracies": _accuracies(arms) if arms else None,
        "differences": _differences(arms, report["margin"]) if arms else None,
        "layers": _layers(layers) if layers else None,
        "baseline": _baseline(baseline) if baseline else None,
        "curve": _curve(curve) if curve else None,
        "waterfall": _waterfall(waterfall["steps"]) if waterfall else None,
        **_heat_maps(layers),
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


def _curve(points: Sequence[Mapping[str, Any]]) -> Markup:
    def of(model: str) -> list[CurvePoint]:
        return [
            CurvePoint(
                point["epsilon"],
                100 * point[f"{model}_accuracy"],
                (100 * point[f"{model}_interval"][0], 100 * point[f"{model}_interval"][1]),
            )
            for point in points
        ]

    spoken = "; ".join(
        f"at {point['epsilon']:g} reference {wording.percent(point['reference_accuracy'])}, "
        f"deployed {wording.percent(point['deployed_accuracy'])}"
        for point in points
    )
    deciding = next(point["epsilon"] for point in points if point["deciding"])
    return curve_plot("curve", f"Accuracy over epsilon. {spoken}.", of("reference"), of("deployed"), deciding)


def _waterfall(steps: Sequence[Mapping[str, Any]]) -> Markup:
    rows = []
    before: float | None = None
    for step in steps:
        accuracy = None if step["accuracy"] is None else 100 * step["accuracy"]
        text = wording.percent(step["accuracy"]) if step["cost"] is None else wording.step_cost(step["cost"])
        rows.append(WaterfallStep(step["name"], text, accuracy, before, step["name"] in wording.MODELS))
        before = accuracy
    spoken = "; ".join(
        f"{step['name']}: {wording.percent(step['accuracy'])}, change {wording.step_cost(step['cost'])} points"
        for step in steps
    )
    return waterfall_plot("waterfall", f"Accuracy on the worst-case images after each step. {spoken}.", rows)


def _heat_maps(layers: Sequence[Mapping[str, Any]]) -> dict[str, Markup | None]:
    """Free-running and teacher-forced, of the same scale of colours; None of reports that do not tell of steps."""
    maps: dict[str, Markup | None] = {"free": None, "forced": None}
    told = {
        "free": [layer.get("step_agreement") for layer in layers],
        "forced": [(layer.get("teacher_forced") or {}).get("step_agreement") for layer in layers],
    }
    shares = {
        name: [[1 - share for share in row] for row in rows if row] for name, rows in told.items() if rows and all(rows)
    }
    full = max((share for rows in shares.values() for row in rows for share in row), default=0.0)
    names = [layer["name"] for layer in layers]
    for name, rows in shares.items():
        spoken = "; ".join(
            f"{layer}: {', '.join(wording.percent(share) for share in row)}"
            for layer, row in zip(names, rows, strict=True)
        )
        kind = "running freely" if name == "free" else "each layer reading the reference's spikes"
        title = f"Share of spikes that differ, by layer and step, {kind}. {spoken}."
        maps[name] = heat_map(f"heat-{name}", title, names, rows, full or 1.0)
    return maps
