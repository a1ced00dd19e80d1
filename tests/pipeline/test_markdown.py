"""The summary for a pull request: short, complete, and no word of a report can break it."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.fidelity.markdown import markdown_table, summarize
from pipeline.target_tables import TextTable
from tests.pipeline.test_page import REPORTS, full_report


@pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS.keys())
def test_the_verdict_comes_first_and_every_table_is_one(make: Any) -> None:
    report = make()
    text = summarize(report)
    assert text.splitlines()[0].endswith(f"{report['verdict'].upper()}: hardware fidelity")
    for block in text.split("\n\n"):
        if block.startswith("|"):
            head, rule, *rows = block.splitlines()
            assert rows
            assert rule.replace(" ", "").strip("|").split("|") == ["---"] * (head.count("|") - 1)
            assert {row.count("|") for row in rows} == {head.count("|")}


def test_it_tells_what_a_reviewer_asks_for() -> None:
    text = summarize(full_report()).replace("\u00a0", " ")
    for fact in (
        "worst-case accuracy 83.1% deployed", "epsilon 0.1, margin 2 points, seed 0, 8 bits, T = 8",
        "| worst case | 83.5 % (81.5 to 85.0 %) |", "| lava | 0.10.0 | equal bit for bit | 64 |",
        "| 0.2 (51 codes) | 31.2 % | 29.0 % |", "| weights | 83.0 % | −0.74 |", "| 4 bits | 91.0 % | 91.3 % | 71.2 % |",
        "```sh\nspikeguard fidelity runs/demo/bundle",
    ):  # fmt: skip
        assert fact in text, fact


def test_a_runtime_that_differs_or_is_missing_is_loud() -> None:
    report = full_report()
    report["runtimes"][2]["mismatched_spikes"] = 3
    report["missing_runtimes"] = [{"name": "netx", "reason": "no Python 3.10 | was found"}]
    text = summarize(report)
    assert "| lava | 0.10.0 | DIFFERS |" in text
    assert "Not certified on netx: no Python 3.10 \\| was found" in text


def test_words_of_a_report_are_only_words() -> None:
    nasty = "a | b\n# c <script> [d](e) *f* `g`"
    table = markdown_table(TextTable(nasty, (nasty,), [(nasty,)]))
    title, _, head, rule, row = table.splitlines()
    assert title.startswith("**a \\| b \\# c \\<script\\>")
    assert head == row
    assert rule == "| --- |"
    assert head.replace("\\|", "").count("|") == 2
