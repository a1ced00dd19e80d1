from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.fidelity.arms import arm_row, make_arm, overall, worst_case
from pipeline.statistics import Verdict, tango_bound, wilson_interval

RIGHT = np.array([True, True, True, False])


def test_the_worst_case_is_right_only_where_every_arm_is() -> None:
    hits = [RIGHT, np.array([True, False, True, True]), np.array([True, True, True, True])]
    assert worst_case(hits).tolist() == [True, False, True, False]
    assert worst_case([RIGHT]).tolist() == RIGHT.tolist()


def row(
    both: int, only_reference: int, only_deployed: int, neither: int, *, deciding: bool = True
) -> dict[str, object]:
    counts = (both, only_reference, only_deployed, neither)
    reference = np.repeat([True, True, False, False], counts)
    deployed = np.repeat([True, False, True, False], counts)
    arm = make_arm("worst case", "union", "of all arms", 0.1, deciding, (reference, deployed))
    return arm_row(arm, 0.02, 0.95)


def test_a_row_holds_the_paired_figures() -> None:
    found = row(480, 12, 8, 40)
    outcome = make_arm("x", "", "", 0, True, (np.ones(3, bool), np.ones(3, bool))).outcome
    assert outcome.samples == 3
    assert found["samples"] == 540
    assert found["reference_accuracy"] == 492 / 540
    assert found["deployed_accuracy"] == 488 / 540
    assert found["difference"] == pytest.approx(-4 / 540)
    assert found["discordant"] == [12, 8]
    assert found["reference_interval"] == list(wilson_interval(492, 540))


def test_the_bound_is_one_sided_and_the_interval_two_sided() -> None:
    reference, deployed = np.ones(100, bool), np.arange(100) >= 3
    arm = make_arm("clean", "none", "", 0.0, True, (reference, deployed))
    found = arm_row(arm, 0.02, 0.95)
    assert found["lower_bound"] == tango_bound(arm.outcome, 0.95, "lower")
    assert found["interval"] == [
        tango_bound(arm.outcome, 0.975, "lower"),
        tango_bound(arm.outcome, 0.975, "upper"),
    ]
    assert found["interval"][0] < found["lower_bound"] < found["difference"] < found["interval"][1]


def test_only_deciding_arms_have_a_verdict_and_only_doubt_asks_for_images() -> None:
    assert row(480, 5, 5, 50)["verdict"] == "pass"
    assert row(480, 5, 5, 50)["samples_to_decide"] is None
    assert row(480, 60, 0, 0)["verdict"] == "fail"
    doubtful = row(90, 5, 5, 0)
    assert doubtful["verdict"] == "inconclusive"
    assert isinstance(doubtful["samples_to_decide"], int)
    assert doubtful["samples_to_decide"] > 100
    assert row(480, 60, 0, 0, deciding=False)["verdict"] is None


def test_rows_are_plain_json() -> None:
    assert json.loads(json.dumps(row(90, 5, 5, 0), allow_nan=False)) == row(90, 5, 5, 0)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "inconclusive"], "inconclusive"),
        (["inconclusive", "inconclusive"], "inconclusive"),
        (["fail", "pass"], "fail"),
        (["inconclusive", "fail"], "fail"),
    ],
)
def test_all_must_pass_and_one_failure_fails(verdicts: list[Verdict], expected: Verdict) -> None:
    assert overall(verdicts) == expected
