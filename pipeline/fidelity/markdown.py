"""The report's facts in short, as Markdown for a pull request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.fidelity.certification import is_certified
from pipeline.fidelity.page_tables import SIGNS
from pipeline.fidelity.tables import fidelity_tables, reference_word
from pipeline.fidelity.wording import count, number, percent, percent_range, points
from pipeline.target_tables import TextTable

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!])")


def summarize(report: Mapping[str, Any]) -> str:
    """Verdict, arms, certification, curve, waterfall.

    Args:
        report: content of ``report.json``.
    """
    sign = SIGNS[report["verdict"]][1]
    budgets = ", ".join(f"{epsilon:g}" for epsilon in report["epsilon"])
    blocks = [
        f"## {sign} {report['verdict'].upper()}: hardware fidelity",
        escape(report.get("summary") or report["outcome"]),
        f"{count(report['samples'])} test images, epsilon {budgets}, margin {100 * report['margin']:g} points, "
        f"seed {report['seed']}, {number(report['bits']) if isinstance(report['bits'], int) else 'mixed'} bits, "
        f"T = {report['steps']}",
        *(markdown_table(table) for table in (_arms(report), _runtimes(report))),
        *(escape(f"Not certified on {row['name']}: {row['reason']}") for row in report.get("missing_runtimes") or []),
        *(markdown_table(table) for table in fidelity_tables(report)),
    ]
    if report.get("reproduce"):
        blocks.append(f"```sh\n{report['reproduce'].replace('```', '')}\n```")
    return "\n\n".join(blocks) + "\n"


def markdown_table(table: TextTable) -> str:
    """A table with its title, every word escaped."""
    rows = [[escape(str(cell)) for cell in row] for row in table.rows]
    head = [escape(column) for column in table.columns]
    lines = [_line(head), _line(["---"] * len(head)), *map(_line, rows)]
    return f"**{escape(table.title)}**\n\n" + "\n".join(lines)


def escape(text: str) -> str:
    """Words as they are, on one line, whatever they hold."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _arms(report: Mapping[str, Any]) -> TextTable:
    rows = [
        (
            arm["name"],
            *(
                f"{percent(arm[f'{model}_accuracy'])} ({percent_range(arm.get(f'{model}_interval'))})"
                for model in ("reference", "deployed")
            ),
            points(arm["difference"]),
            points(arm["lower_bound"]),
            arm["verdict"] or "",
        )
        for arm in report["arms"]
    ]
    columns = ("arm", reference_word(report), "deployed", "difference, points", "lower bound", "verdict")
    return TextTable("accuracy, arm by arm", columns, rows)


def _runtimes(report: Mapping[str, Any]) -> TextTable:
    rows = [
        (
            row["name"],
            row["version"],
            "equal bit for bit" if is_certified(row) else "DIFFERS",
            count(row["samples"] + row["adversarial_samples"]),
        )
        for row in report["runtimes"]
    ]
    return TextTable("runtimes against the reference arithmetic", ("runtime", "version", "result", "images"), rows)
