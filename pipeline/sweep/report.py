"""What a sweep leaves: ``sweep.json`` and ``sweep.csv``, and tables for a terminal of 100 columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hardware.files import write_bytes, write_json
from pipeline.attacks.ensemble import PRESETS
from pipeline.attacks.targets import budget_of
from pipeline.fidelity.check import versions
from pipeline.fidelity.wording import ABSENT, count
from pipeline.sweep.plots import draw
from pipeline.sweep.points import ACTIVITY_IMAGES, Point, Reference
from pipeline.sweep.sweeping import SweepResult
from pipeline.target_tables import VIOLATION_COLUMNS, TextTable

SCHEMA = "spikeguard.sweep/1"
NOTES = (
    "Worst case: right on the clean image and on every image crafted on the float SNN or on the integer network of "
    "the same row; the same union for both. The fidelity check adds noise and a black box to it.",
    "The verdict is against the float SNN at the same T, clean and in the worst case: non-inferior by the margin at "
    "the confidence, each row for itself.",
    "An attack that fails proves nothing by itself: whether gradients are masked is what the fidelity check examines, "
    "of the bundle's own bits and T.",
    "All accuracies are on test images: they report, and whoever chooses a row by them has to check it on others.",
)


def notes_of(result: SweepResult) -> tuple[str, ...]:
    """What the figures mean."""
    steps = result.subject.network.steps
    untrained = f"Fine-tuned for T = {steps} only; at every other T the same weights and thresholds run as they are."
    epochs = _integer_epochs(result)
    length = "one epoch" if epochs == 1 else f"{epochs} epochs"
    learned = [f"The integers of every row learned on for {length} of training images."] if epochs else []
    return (untrained, *learned, *NOTES)


def _integer_epochs(result: SweepResult) -> int:
    learning = result.subject.learning
    return learning.config.quantization.epochs if learning else 0


def sweep_report(result: SweepResult, reproduce: str) -> dict[str, Any]:
    """The content of ``sweep.json``; arms, placement and energy are rows as in ``report.json``."""
    subject, settings = result.subject, result.subject.settings
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {"name": subject.data, "test_samples": len(subject.images.labels)},
        "samples": len(subject.images.labels),
        "activity_samples": min(ACTIVITY_IMAGES, len(subject.images.labels)),
        "calibration_samples": len(subject.calibration),
        "seed": subject.images.seed,
        "epsilon": settings.epsilon,
        "budget_codes": budget_of(settings.epsilon),
        "margin": settings.margin,
        "confidence": settings.confidence,
        "attacks": {"preset": settings.attacks, "members": [member.name for member in PRESETS[settings.attacks]]},
        "finetuned_steps": subject.network.steps,
        "integer_epochs": _integer_epochs(result),
        "bits": list(result.grid.bits),
        "steps": list(result.grid.steps),
        "references": [asdict(reference) for reference in result.references],
        "points": [{**asdict(point), "verdict": point.verdict} for point in result.points],
        "notes": list(notes_of(result)),
        "subject": subject.digest,
        "versions": versions(),
        "reproduce": reproduce,
    }


def write_sweep(result: SweepResult, folder: Path, reproduce: str) -> list[Path]:
    """Write all files of a finished sweep.

    Args:
        result: what they tell.
        folder: where to.
        reproduce: the shell command that gives it.

    Returns:
        The files.
    """
    pictures = draw(result.references, result.points, plot_title(result))
    contents = {"sweep.csv": sweep_csv(result).encode(), **{f"sweep.{kind}": made for kind, made in pictures.items()}}
    write_json(folder / "sweep.json", sweep_report(result, reproduce))
    for name, content in contents.items():
        write_bytes(folder / name, content)
    return [folder / name for name in ("sweep.json", *contents)]


def plot_title(result: SweepResult) -> str:
    """What all panels of the plot have in common."""
    subject, settings = result.subject, result.subject.settings
    return (
        f"{subject.data}: {len(subject.images.labels):,} test images, epsilon {settings.epsilon:g} "
        f"({budget_of(settings.epsilon)} codes), {settings.attacks} attacks on both models, 95 % intervals"
    )


def sweep_csv(result: SweepResult) -> str:
    """One line per point and per float SNN, accuracies as fractions; cells that do not apply are empty."""
    rows = [
        *(_reference_cells(reference) for reference in result.references),
        *(_point_cells(point) for point in result.points),
    ]
    rows.sort(key=lambda row: row["steps"])  # stable: the float SNN stays before its points
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _reference_cells(reference: Reference) -> dict[str, Any]:
    shares = {"clean": reference.clean, "worst_case": reference.worst_case}
    return {
        "steps": reference.steps,
        "bits": "float",
        "finetuned": reference.finetuned,
        "samples": reference.clean.samples,
        **{
            name: value
            for arm, share in shares.items()
            for name, value in _interval_cells(f"{arm}_accuracy", share.accuracy, share.interval).items()
        },
        "seconds": reference.seconds,
    }


def _point_cells(point: Point) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "steps": point.steps,
        "bits": point.bits,
        "finetuned": point.finetuned,
        "verdict": point.verdict,
        "seconds": point.seconds,
    }
    if not point.arms or point.placement is None or point.energy is None:
        return {**cells, "refused_by": "; ".join(f"{row['object']}: {row['rule']}" for row in point.violations)}
    cells["samples"] = point.clean["samples"]
    cells["activity_samples"] = min(ACTIVITY_IMAGES, point.clean["samples"])
    for name, arm in (("clean", point.clean), ("worst_case", point.worst_case)):
        cells |= _interval_cells(f"{name}_accuracy", arm["deployed_accuracy"], arm["deployed_interval"])
        cells |= _interval_cells(f"float_{name}_accuracy", arm["reference_accuracy"], arm["reference_interval"])
        cells |= {f"{name}_difference": arm["difference"], f"{name}_lower_bound": arm["lower_bound"]}
    for name in ("spikes_per_image", "synaptic_operations_per_image", "input_operations_per_image"):
        cells[name] = point.energy[name]
    for name in ("weight_bytes", "memory_bytes", "minimum_cores"):
        cells[name] = point.placement[name]
    return cells


def _interval_cells(name: str, accuracy: float, interval: Sequence[float]) -> dict[str, float]:
    return {name: accuracy, f"{name}_low": interval[0], f"{name}_high": interval[1]}


def accuracy_table(result: SweepResult) -> TextTable:
    """Accuracies in percent with their intervals; the float SNN of a T before its points."""
    settings, samples = result.subject.settings, len(result.subject.images.labels)
    title = (
        f"{samples:,} test images, epsilon {settings.epsilon:g}, {settings.attacks} attacks, margin {settings.margin:g}"
        ";\naccuracies in % with 95 % intervals, lower bound of integer less float in the worst case in points"
    )
    columns = ("T", "bits", "clean", "worst case", "float SNN on it", "lower bound", "verdict")
    rows = []
    for reference in result.references:
        own = (_with_interval(share.accuracy, share.interval) for share in (reference.clean, reference.worst_case))
        rows.append((str(reference.steps), "float", *own, ABSENT, ABSENT, ABSENT))
        rows += [_accuracy_cells(point) for point in result.points if point.steps == reference.steps]
    return TextTable(title, columns, rows)


def _accuracy_cells(point: Point) -> tuple[str, ...]:
    if not point.arms:
        return (str(point.steps), str(point.bits), *(ABSENT for _ in range(4)), point.verdict)
    worst = point.worst_case
    return (
        str(point.steps),
        str(point.bits),
        _with_interval(point.clean["deployed_accuracy"], point.clean["deployed_interval"]),
        _with_interval(worst["deployed_accuracy"], worst["deployed_interval"]),
        _with_interval(worst["reference_accuracy"], worst["reference_interval"]),
        f"{100 * worst['lower_bound']:+.1f}",
        point.verdict,
    )


def _with_interval(accuracy: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * accuracy:.1f} {100 * low:.1f}–{100 * high:.1f}"


def cost_table(result: SweepResult) -> TextTable:
    """Activity per image, and what the network takes on the target."""
    counted = min(ACTIVITY_IMAGES, len(result.subject.images.labels))
    title = f"activity per image, counted on {counted} clean images; memory and cores of Loihi 2, at least"
    columns = ("T", "bits", "spikes", "synaptic operations", "weight bytes", "all bytes", "cores")
    rows = [_cost_cells(point.steps, point.bits, point.energy, point.placement) for point in result.points]
    return TextTable(title, columns, [row for row in rows if row])


def _cost_cells(
    steps: int, bits: int, energy: Mapping[str, Any] | None, placement: Mapping[str, Any] | None
) -> tuple[str, ...]:
    if energy is None or placement is None:
        return ()
    per_image = (energy["spikes_per_image"], energy["synaptic_operations_per_image"])
    taken = (placement["weight_bytes"], placement["memory_bytes"], placement["minimum_cores"])
    return (str(steps), str(bits), *map(count, (*per_image, *taken)))


def refusal_table(result: SweepResult) -> TextTable:
    """Why points have no network."""
    rows = [
        (str(point.steps), str(point.bits), *(row[name] for name in ("object", "rule", "actual", "limit", "remedy")))
        for point in result.points
        for row in point.violations
    ]
    return TextTable("refused by the target", ("T", "bits", *VIOLATION_COLUMNS), rows)
