"""What ``spikeguard selftest`` shows, as plain tables and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline.fidelity.wording import percent, percent_range
from pipeline.target_tables import TextTable


def score_table(score: Mapping[str, Any]) -> TextTable:
    """Every planted error, and what the check made of it."""
    rows = [
        (
            bug["name"],
            bug["layer"],
            bug["outcome"],
            "–" if bug["first_mismatch"] is None else bug["first_mismatch"]["layer"],
            "caught" if bug["caught"] else "MISSED",
        )
        for bug in score["bugs"]
    ]
    columns = ("planted error", "in layer", "outcome", "named", "")
    return TextTable("deployment errors planted one at a time", columns, rows)


def build_table(score: Mapping[str, Any]) -> TextTable:
    """Builds that run as exported and must not pass."""
    rows = [
        (build["name"], build["outcome"], "refused" if build["outcome"] == build["expected"] else "MISSED")
        for build in score["builds"]
    ]
    return TextTable("builds that run exactly and must not pass", ("build", "outcome", ""), rows)


def false_alarm_line(score: Mapping[str, Any]) -> str:
    """How often an unharmed bundle did not pass."""
    checks, images = len(score["unharmed"]), score["unharmed"][0]["samples"]
    interval = percent_range(score["false_alarm_interval"])
    outcomes = Counter(row["outcome"] for row in score["unharmed"] if row["outcome"] != "OK")
    what = "".join(f", {count} {outcome}" for outcome, count in sorted(outcomes.items()))
    return (
        f"The unharmed bundle passed {checks - score['false_alarms']} of {checks} checks{what}: "
        f"false alarms {percent(score['false_alarm_rate'])} (95 % interval {interval}), "
        f"each on {images} images of its own with attacks of its own, at a margin of {score['margin']:g}."
    )


def conclusion(score: Mapping[str, Any]) -> str:
    """The score in one sentence."""
    return (
        f"{score['caught']} of {len(score['bugs'])} planted errors caught in the layer that they were planted in, "
        f"{score['refused']} of {len(score['builds'])} bad builds refused for what is wrong with them."
    )
