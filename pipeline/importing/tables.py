"""What ``spikeguard export`` shows of an imported network, as plain text."""

from __future__ import annotations

from pipeline.importing.deployment import CONFIDENCE, READ, RUNTIME_SAMPLES, ComparisonRow, Imported
from pipeline.target_tables import TextTable


def comparison_table(result: Imported) -> TextTable:
    """Every model beside the one it is to equal."""
    columns = ("model", "samples", "spikes", "membranes", "readouts", "classes", "accuracy")
    title = f"how the integer network differs from what was read, and runtimes from it, on {result.samples.source}"
    return TextTable(title, columns, [_cells(row) for row in result.rows if not row.reason])


def conclusion(result: Imported) -> tuple[bool, str]:
    """Whether every runtime that ran computes what the integer network means, and a sentence on all that is known."""
    ran = [row for row in result.rows if row.mismatched is not None]
    wrong = [row.model for row in ran if any(row.mismatched or ())]
    if wrong:
        return False, f"{', '.join(wrong)} does not compute what the integer network means"
    names = ", ".join(row.model for row in ran)
    parts = [f"{names} equal the integer network on {RUNTIME_SAMPLES} samples" if ran else "no runtime was at hand"]
    for row in result.rows:
        if row.reference == READ:
            parts.append(f"{row.argmax_flips} of {row.samples} samples change their class by quantising")
    if result.bound is not None:
        parts.append(f"accuracy falls by at most {max(0.0, -result.bound):.1%} (one-sided, {CONFIDENCE:.0%})")
    config = result.samples.config
    if config is not None:
        parts.append(f"attack both: spikeguard fidelity {result.bundle.path} --set data.path={config.data.path}")
    return True, "; ".join(parts)


def _cells(row: ComparisonRow) -> tuple[str, ...]:
    accuracy = (
        "" if row.accuracy is None else "{:.1f} % ({:.1f} – {:.1f})".format(*(100 * part for part in row.accuracy))
    )
    flips = f"{row.argmax_flips:,}" if row.reference else ""
    return row.model, f"{row.samples:,}", *_differences(row), flips, accuracy


def _differences(row: ComparisonRow) -> tuple[str, str, str]:
    if row.mismatched is not None:
        spikes, membranes, readouts = ("" if count is None else f"{count:,}" for count in row.mismatched)
        return spikes, membranes, readouts
    return "" if row.differing_spikes is None else f"{row.differing_spikes:.2%}", "", ""
