"""The report's tables as data: a heading and a way to say a row's cell, column by column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.fidelity.wording import (
    ABSENT,
    NBSP,
    budget,
    count,
    divergence,
    number,
    percent,
    percent_range,
    points,
    points_range,
    seconds,
    step_cost,
    whole_range,
    worst_share,
)

Row = Mapping[str, Any]
# Word of a verdict -> colour class and sign; the sign says it to those who do not see the colour.
SIGNS = {"pass": ("pass", "✓"), "fail": ("fail", "✗"), "inconclusive": ("inconclusive", "?")}


@dataclass(frozen=True)
class Column:
    """A heading and the text of its cells; the first column of a table names its rows."""

    heading: str
    cell: Callable[[Row], str]
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table ready to print: its caption, its columns and the text of its cells, row by row."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def make_table(caption: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """Say every row in every column."""
    cells = tuple(tuple(column.cell(row) for column in columns) for row in rows)
    return Table(caption, tuple(columns), cells)


def badge(kind: str, text: str) -> Markup:
    """Words marked as good, bad or open, by colour and by sign."""
    style, sign = SIGNS[kind]
    return Markup('<span class="badge {}"><span aria-hidden="true">{}</span> {}</span>').format(style, sign, text)


def _plain(key: str) -> Callable[[Row], str]:
    return lambda row: number(row.get(key))


def _with_range(value: str, interval: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        text = Markup("<b>{}</b>").format(percent(row.get(value)))
        if row.get(interval) is None:
            return text
        return text + Markup("<br><small>{}</small>").format(percent_range(row[interval]))

    return cell


def _arm_name(row: Row) -> str:
    name = Markup("<b>{}</b>").format(row["name"])
    if row.get("attack") not in (None, "", "none", row["name"]):
        name += Markup("<br>{}").format(row["attack"])
    if row.get("description"):
        name += Markup("<br><small>{}</small>").format(row["description"])
    return name


def _curve_point(row: Row) -> str:
    if not row["epsilon"]:
        return Markup("<b>clean</b>")
    return Markup("<b>{}</b><br><small>{}</small>").format(budget(row["epsilon"]), row["attack"])


def _step(row: Row) -> str:
    name = Markup("<b>{}</b>").format(row["name"])
    return name + Markup("<br><small>{}</small>").format(row["note"]) if row.get("note") else name


def _difference(row: Row) -> str:
    text = Markup("<b>{}</b>").format(points(row.get("difference")))
    if row.get("interval") is None:
        return text
    return text + Markup("<br><small>{}</small>").format(points_range(row["interval"]))


def _arm_verdict(row: Row) -> str:
    if not row.get("deciding"):
        return Markup("<small>diagnosing</small>")
    verdict = row.get("verdict")
    if verdict not in SIGNS:
        return number(verdict)
    text: Markup = badge(verdict, verdict)
    if row.get("samples_to_decide"):
        text += Markup("<br><small>{} images would decide</small>").format(count(row["samples_to_decide"]))
    return text


def _discordant(row: Row) -> str:
    pair = row.get("discordant")
    return ABSENT if pair is None else f"{count(pair[0])} / {count(pair[1])}"


def _mismatches(key: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get(key)
        if value is None:
            return Markup("<small>not exposed</small>")
        return "0" if value == 0 else badge("fail", count(value))

    return cell


def _certified(row: Row) -> str:
    keys = ("mismatched_spikes", "mismatched_membranes", "mismatched_readouts")
    exposed = [row[key] for key in keys if row.get(key) is not None]
    if not exposed:
        return badge("inconclusive", "nothing compared")
    return badge("fail", "differs") if any(exposed) else badge("pass", "exact")


def _margin(row: Row) -> str:
    first = row.get("first_divergence")
    return ABSENT if first is None else number(first.get("margin"))


def _yes_no(key: str, good: bool) -> Callable[[Row], str]:
    """A proven fact: marked as fine where it is as it should be."""

    def cell(row: Row) -> str:
        value = row.get(key)
        if value is None:
            return ABSENT
        return badge("pass" if value is good else "fail", number(value))

    return cell


def _saturation(row: Row) -> str:
    if not row.get("can_saturate"):
        return badge("pass", "cannot happen")
    return (
        badge("pass", "harmless") if row.get("saturation_is_harmless") else badge("inconclusive", "part of the result")
    )


def _nanojoules(row: Row) -> str:
    least, most = (number(_three_digits(row.get(key))) for key in ("least_nj", "most_nj"))
    return least if least == most else f"{least} to {most}"


def _health(row: Row) -> str:
    return badge("pass", "fine") if row.get("passed") else badge("fail", "alarm")


ARMS = (
    Column("Arm", _arm_name, numeric=False),
    Column("Verdict", _arm_verdict, numeric=False),
    Column("Budget", lambda row: budget(row.get("epsilon"))),
    Column("Images", lambda row: count(row.get("samples"))),
    Column("Reference", _with_range("reference_accuracy", "reference_interval")),
    Column("Deployed", _with_range("deployed_accuracy", "deployed_interval")),
    Column("Difference, points", _difference),
    Column("Lower bound, points", lambda row: points(row.get("lower_bound"))),
    Column("Only reference / deployed right", _discordant),
)
RUNTIMES = (
    Column("Runtime", _plain("name"), numeric=False),
    Column("Version", _plain("version"), numeric=False),
    Column("Result", _certified, numeric=False),
    Column("Clean images", lambda row: count(row.get("samples"))),
    Column("Adversarial images", lambda row: count(row.get("adversarial_samples"))),
    Column("Differing spikes", _mismatches("mismatched_spikes")),
    Column("Differing membranes", _mismatches("mismatched_membranes")),
    Column("Differing readouts", _mismatches("mismatched_readouts")),
    Column("First difference", lambda row: divergence(row.get("first_mismatch")), numeric=False),
    Column("Images per second", lambda row: number(_three_digits(row.get("samples_per_second")))),
    Column("Seconds to start", lambda row: number(_three_digits(row.get("startup_seconds")))),
)
LAYERS = (
    Column("Layer", _plain("name"), numeric=False),
    Column("Equal spikes", lambda row: percent(row.get("spike_agreement"), 2)),
    Column("Equal, teacher-forced", lambda row: percent((row.get("teacher_forced") or {}).get("spike_agreement"), 2)),
    Column("Rate error", lambda row: number(row.get("rate_error"))),
    Column("First differing spike", lambda row: divergence(row.get("first_divergence")), numeric=False),
    Column("Its margin", _margin),
)
ATTRIBUTION = (
    Column("Rounded", _plain("rounded"), numeric=False),
    Column("Spikes that differ, worst layer", lambda row: worst_share(row["disagreement"])),
    Column("Relative logit error", _plain("logit_error")),
    Column("Classes changed", lambda row: f"{count(row['argmax_flips'])} of {count(row['samples'])}"),
)
CURVE = (
    Column("Budget", _curve_point, numeric=False),
    Column("Reference", _with_range("reference_accuracy", "reference_interval")),
    Column("Deployed", _with_range("deployed_accuracy", "deployed_interval")),
    Column("Difference, points", _difference),
)
WATERFALL = (
    Column("Step", _step, numeric=False),
    Column("Accuracy", _with_range("accuracy", "interval")),
    Column("Change, points", lambda row: step_cost(row.get("cost"))),
)
QUANTIZATION = (
    Column("Population", _plain("population"), numeric=False),
    Column("Scale", _plain("scale")),
    Column("Disagreement", lambda row: percent(row.get("disagreement"), 2)),
)
PROOFS = (
    Column("Population", _plain("population"), numeric=False),
    Column("Sum of one step", lambda row: whole_range(row.get("sum_range"))),
    Column("Sum limit", lambda row: "±" + NBSP + number(row.get("sum_limit"))),
    Column("Can wrap", _yes_no("can_wrap", good=False), numeric=False),
    Column("Membrane", lambda row: whole_range(row.get("membrane_range"))),
    Column("Saturation", _saturation, numeric=False),
    Column("Exact in float32", _yes_no("exact_in_float32", good=True), numeric=False),
)
HEALTH = (
    Column("Check", _plain("name"), numeric=False),
    Column("Result", _health, numeric=False),
    Column("Value", _plain("value")),
    Column("Limit", _plain("limit"), numeric=False),
    Column("What is measured", _plain("explanation"), numeric=False),
)
PLACEMENT = (
    Column("Population", _plain("name"), numeric=False),
    Column("Neurons", lambda row: count(row.get("neurons"))),
    Column("Synapses", lambda row: count(row.get("synapses"))),
    Column("Fan-in", lambda row: count(row.get("fan_in"))),
    Column("Fan-out", lambda row: count(row.get("fan_out"))),
    Column("Weights, bytes", lambda row: count(row.get("weight_bytes"))),
    Column("Cores, at least", lambda row: count(row.get("minimum_cores"))),
)
ENERGY = (
    Column("Estimate for", _plain("name"), numeric=False),
    Column("Nanojoules per image", _nanojoules),
    Column("Costs per operation from", _plain("source"), numeric=False),
)
TIMINGS = (
    Column("Stage", _plain("name"), numeric=False),
    Column("Time", lambda row: seconds(row["value"])),
)
VERSIONS = (
    Column("Software", _plain("name"), numeric=False),
    Column("Version", _plain("value"), numeric=False),
)


def transfer_parts(matrix: Row | None) -> tuple[Sequence[Column], Sequence[Row] | None]:
    """Columns and rows of who is fooled by whose images."""
    if matrix is None:
        return (), None

    def cell(model: str) -> Callable[[Row], str]:
        return lambda row: percent(row["accuracies"][model])

    columns = [Column(model, cell(model)) for model in matrix["models"]]
    return [Column("Crafted on", _plain("crafted_on"), numeric=False), *columns], matrix["rows"]


def named_rows(mapping: Mapping[str, Any]) -> list[Row]:
    """A mapping as rows of a two-column table."""
    return [{"name": name, "value": value} for name, value in mapping.items()]


def _three_digits(value: float | None) -> float | None:
    """Rates are not known better than this."""
    return None if value is None else float(f"{value:.3g}")
