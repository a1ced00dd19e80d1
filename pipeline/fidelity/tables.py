"""A check's curve, waterfall and transfer table as plain tables, for the terminal and for Markdown. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.fidelity.wording import budget, percent, points, step_cost
from pipeline.target_tables import TextTable


def fidelity_tables(report: Mapping[str, Any]) -> Iterator[TextTable]:
    """Those that the report has something for."""
    if report.get("curve"):
        yield curve_table(report)
    if report.get("waterfall"):
        yield waterfall_table(report)
    if report.get("transfer_matrix"):
        yield transfer_table(report)


def reference_word(report: Mapping[str, Any]) -> str:
    """What the reference's accuracies are called."""
    word: str = (report.get("reference") or {}).get("word", "trained")
    return word


def curve_table(report: Mapping[str, Any]) -> TextTable:
    """Both models over the budget."""
    rows = [
        (
            budget(point["epsilon"]) if point["epsilon"] else "clean",
            percent(point["reference_accuracy"]),
            percent(point["deployed_accuracy"]),
            points(point["difference"]),
            point["attack"],
        )
        for point in report["curve"]
    ]
    columns = ("epsilon", reference_word(report), "deployed", "difference, points", "attack added")
    return TextTable("accuracy over the budget; elsewhere than at the deciding one the attack is light", columns, rows)


def waterfall_table(report: Mapping[str, Any]) -> TextTable:
    """What each step to the deployed network costs."""
    waterfall = report["waterfall"]
    rows = [
        (step["name"], percent(step["accuracy"]), step_cost(step["cost"]), step["note"]) for step in waterfall["steps"]
    ]
    title = f"what each step costs, on the worst-case images of {waterfall['samples']} test images"
    if waterfall["costliest"]:
        title += f"; of what became integers, the {waterfall['costliest']} change the logits of clean images most"
    return TextTable(title, ("step", "accuracy", "change, points", ""), rows)


def transfer_table(report: Mapping[str, Any]) -> TextTable:
    """Whose images fool whom."""
    matrix = report["transfer_matrix"]
    rows = [
        (row["crafted_on"], *(percent(row["accuracies"][model]) for model in matrix["models"]))
        for row in matrix["rows"]
    ]
    title = f"accuracy on images crafted on each model, {matrix['attack']}, epsilon {matrix['epsilon']:g}"
    return TextTable(title, ("crafted on", *matrix["models"]), rows)
