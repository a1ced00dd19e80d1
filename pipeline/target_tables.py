"""What ``spikeguard check`` shows, as plain tables. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hardware.bounds import BoundRow
    from hardware.errors import Violation
    from hardware.targets.energy import EnergyEstimate
    from hardware.targets.rules import Placement, PopulationPlacement

VIOLATION_COLUMNS = ("what", "rule", "has", "allowed", "remedy")


class TextTable(NamedTuple):
    """A title, headings, and the text of every cell."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def violation_rows(violations: Sequence[Violation]) -> list[tuple[str, ...]]:
    """One row per broken rule, in the order of ``VIOLATION_COLUMNS``."""
    return [(v.object, v.rule, v.actual, v.limit, v.remedy) for v in violations]


def connection_table(placed: Placement) -> TextTable:
    """Neurons and what connects them, the same on every target."""
    rows = [(p.population, *_counts(p.neurons, p.connections, p.fan_in, p.fan_out)) for p in placed.populations]
    title = f"{placed.neurons:,} neurons, {placed.connections:,} synapses (convolutions unfolded)"
    return TextTable(title, ("population", "neurons", "synapses", "fan-in", "fan-out"), rows)


def placement_table(placed: Placement) -> TextTable:
    """What each population takes on a target; axons and cores only where there are cores."""
    columns: tuple[str, ...] = ("population", "weight bytes", "state bytes")
    title = f"placement on {placed.target}: {placed.memory_bytes:,} bytes"
    if placed.minimum_cores is not None:
        columns += ("axons in", "axons out", "cores")
        title += f", at least {placed.minimum_cores:,} core(s), {placed.minimum_chips:,} chip(s)"

    def row(p: PopulationPlacement) -> tuple[str, ...]:
        on_core = () if p.minimum_cores is None else (p.axons_in, p.axons_out, p.minimum_cores)
        return (p.population, *_counts(p.weight_bytes, p.state_bytes, *on_core))

    return TextTable(title, columns, [row(p) for p in placed.populations])


def proof_table(proofs: Sequence[BoundRow]) -> TextTable:
    """What interval arithmetic proves of each population; sums in weight units, membranes in 64ths of them."""
    rows = [
        (
            proof.population,
            "{:,} .. {:,}".format(*proof.sum_range),
            "possible" if proof.can_wrap else "never",
            "{:,} .. {:,}".format(*proof.membrane_range),
            _saturation(proof),
            "exact" if proof.exact_in_float32 else "inexact",
        )
        for proof in proofs
    ]
    columns = ("population", "sum per step", "wraps", "membrane", "saturates", "float32")
    return TextTable("proofs, for every input", columns, rows)


def energy_table(estimates: Sequence[EnergyEstimate], images: int) -> TextTable:
    """Estimates for one image, from operations counted on ``images`` of them."""
    title = f"energy per image: estimates from operations counted on {images} golden inputs, not measurements"
    rows = [(e.name, *map(_three_digits, e.nanojoules), e.source) for e in estimates]
    return TextTable(title, ("estimate for", "least, nJ", "most, nJ", "costs per operation from"), rows)


def _saturation(proof: BoundRow) -> str:
    if not proof.can_saturate:
        return "never"
    return "harmlessly" if proof.saturation_is_harmless else "possible"


def _three_digits(value: float) -> str:
    """Estimates are not known better; large ones keep plain digits."""
    return f"{float(f'{value:.3g}'):,.15g}"


def _counts(*counts: int) -> tuple[str, ...]:
    return tuple(f"{count:,}" for count in counts)
