"""What ``spikeguard info``, ``verify``, ``conformance`` and ``fidelity`` show, as plain tables. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.fidelity.wording import number, worst_share
from pipeline.target_tables import TextTable

if TYPE_CHECKING:
    from exporters.conformance.rows import ConformanceRow
    from hardware.bounds import BoundRow
    from hardware.formats.verify import VerifyRow
    from hardware.network import IntegerNetwork


def population_table(title: str, network: IntegerNetwork, proofs: Sequence[BoundRow]) -> TextTable:
    """What each population is, reads and is proven of."""
    proven = {row.population: row for row in proofs}
    rows = [
        (
            p.name,
            "x".join(map(str, p.shape)),
            str(p.threshold) if p.spiking else "readout",
            ", ".join(f"{s.source} ({s.kind}, {s.bits} bit)" for s in network.incoming(p.name)),
            "{} .. {}".format(*proven[p.name].sum_range),
            "cannot wrap" if not proven[p.name].can_wrap else "CAN WRAP",
        )
        for p in network.populations
    ]
    return TextTable(title, ("population", "shape", "threshold", "reads", "sum per step", "24-bit state"), rows)


def mismatch_table(verified: Sequence[VerifyRow]) -> TextTable:
    """How far each file of a bundle is from the golden traces."""
    rows = [
        (
            row.file,
            row.reader,
            str(row.samples),
            *map(_count, (row.mismatched_spikes, row.mismatched_membranes, row.mismatched_readouts)),
            f"{row.seconds:.2f}",
        )
        for row in verified
    ]
    columns = ("file", "reader", "images", "spikes", "membranes", "readouts", "s")
    return TextTable("mismatches with the golden traces", columns, rows)


def conformance_table(read: Sequence[ConformanceRow]) -> TextTable:
    """How far each file in each independent reader is from the reference, or why there is nothing to count."""
    rows = [
        (
            row.file,
            row.reader,
            row.version or "",
            f"{row.samples} x {row.processes}",
            *map(_count, (row.mismatched_spikes, row.mismatched_membranes, row.mismatched_readouts)),
            f"{row.seconds:.1f}",
            f"{row.outcome}: {row.reason}" if row.reason else f"{row.outcome}{_clipping(row)}",
        )
        for row in read
    ]
    columns = ("file", "reader", "version", "samples", "spikes", "membranes", "readouts", "s", "outcome")
    return TextTable("mismatches with the integer reference, samples x fresh processes", columns, rows)


def _clipping(row: ConformanceRow) -> str:
    clipped = row.clipped_membranes
    return f", not clipping {clipped:,} membranes at 24 bits" if clipped else ""


def arm_table(title: str, arms: Sequence[Mapping[str, Any]], reference: str = "trained") -> TextTable:
    """The arms of a fidelity check; ``reference`` is the word for what the deployed model is compared with."""
    rows = [
        (
            arm["name"],
            f"{arm['reference_accuracy']:.1%}",
            f"{arm['deployed_accuracy']:.1%}",
            f"{arm['difference']:+.1%}",
            f"{arm['lower_bound']:+.1%}",
            arm["verdict"] or "",
        )
        for arm in arms
    ]
    return TextTable(title, ("arm", reference, "deployed", "difference", "lower bound", "verdict"), rows)


def attribution_table(attribution: Sequence[Mapping[str, Any]]) -> TextTable:
    """What each kind of rounding changes."""
    rows = [
        (
            row["rounded"],
            worst_share(row["disagreement"]),
            number(row["logit_error"]),
            f"{row['argmax_flips']:,} of {row['samples']:,}",
        )
        for row in attribution
    ]
    columns = ("rounded", "spikes that differ, worst layer", "relative logit error", "classes changed")
    return TextTable("what each kind of rounding changes, on training images", columns, rows)


def _count(mismatches: int | None) -> str:
    return "–" if mismatches is None else str(mismatches)
