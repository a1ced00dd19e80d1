from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hardware.formats.counterexamples import no_counterexamples
from pipeline.config import FidelityConfig
from pipeline.fidelity.check import EXIT_CODES, CheckResult, conclude, versions

SETTINGS = FidelityConfig()


def arm(name: str, verdict: str | None, *, samples_to_decide: int | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "deciding": verdict is not None,
        "verdict": verdict,
        "samples": 540,
        "reference_accuracy": 0.83,
        "deployed_accuracy": 0.82,
        "samples_to_decide": samples_to_decide,
    }


def runtime(name: str, spikes: int | None = 0, membranes: int | None = 0, readouts: int = 0) -> dict[str, Any]:
    return {
        "name": name,
        "mismatched_spikes": spikes,
        "mismatched_membranes": membranes,
        "mismatched_readouts": readouts,
        "first_mismatch": {"layer": "neurons2", "sample": 3, "step": 1, "neuron": 17} if spikes or membranes else None,
    }


HEALTHY: dict[str, Any] = {"alarms": []}
GOOD = [runtime("lava"), runtime("onnxruntime", None, None)]


@pytest.mark.parametrize(
    ("clean", "worst", "runtimes", "alarms", "verdict", "outcome", "code"),
    [
        ("pass", "pass", GOOD, [], "pass", "OK", 0),
        ("pass", "fail", GOOD, [], "fail", "ROBUSTNESS_INFERIOR", 3),
        ("fail", "pass", GOOD, [], "fail", "ROBUSTNESS_INFERIOR", 3),
        ("fail", "inconclusive", GOOD, [], "fail", "ROBUSTNESS_INFERIOR", 3),
        ("pass", "inconclusive", GOOD, [], "inconclusive", "INCONCLUSIVE", 4),
        ("inconclusive", "pass", GOOD, [], "inconclusive", "INCONCLUSIVE", 4),
        ("pass", "pass", GOOD, ["zero gradients"], "inconclusive", "MASKED_GRADIENTS", 4),
        ("pass", "fail", GOOD, ["zero gradients"], "inconclusive", "MASKED_GRADIENTS", 4),
        ("pass", "pass", [runtime("lava", spikes=1)], [], "fail", "TRACE_MISMATCH", 3),
        ("pass", "pass", [runtime("lava", membranes=1)], [], "fail", "TRACE_MISMATCH", 3),
        ("pass", "pass", [runtime("onnxruntime", None, None, 1)], [], "fail", "TRACE_MISMATCH", 3),
        ("pass", "pass", [*GOOD, runtime("netx", 1)], ["zero gradients"], "fail", "TRACE_MISMATCH", 3),
    ],
)
def test_outcomes(
    clean: str, worst: str, runtimes: list[dict[str, Any]], alarms: list[str], verdict: str, outcome: str, code: int
) -> None:
    arms = [arm("clean", clean), arm("worst case", worst), arm("noise", None)]
    found = conclude(arms, runtimes, {"alarms": alarms}, SETTINGS)
    assert found[:2] == (verdict, outcome)
    assert CheckResult({"outcome": outcome}, [], no_counterexamples((1,))).exit_code == EXIT_CODES[outcome] == code


def test_a_pass_names_the_runtimes_it_holds_for() -> None:
    _, _, sentence = conclude([arm("clean", "pass"), arm("worst case", "pass")], GOOD, HEALTHY, SETTINGS)
    assert "lava, onnxruntime" in sentence
    assert "82.0" in sentence
    assert "83.0" in sentence


def test_a_mismatch_names_the_runtime_that_is_wrong_and_no_other() -> None:
    runtimes = [runtime("lava"), runtime("netx", 3)]
    _, _, sentence = conclude([arm("clean", "pass"), arm("worst case", "pass")], runtimes, HEALTHY, SETTINGS)
    assert "netx" in sentence
    assert "lava" not in sentence
    assert "first in layer neurons2, image 3, step 1, neuron 17" in sentence


def test_a_runtime_that_exposes_readouts_only_fails_without_a_place() -> None:
    runtimes = [runtime("onnxruntime", None, None, 2)]
    _, _, sentence = conclude([arm("clean", "pass"), arm("worst case", "pass")], runtimes, HEALTHY, SETTINGS)
    assert sentence.startswith("onnxruntime does not compute what the integer network means. ")


def test_doubt_names_the_images_that_would_decide() -> None:
    arms = [arm("clean", "pass"), arm("worst case", "inconclusive", samples_to_decide=1234)]
    assert "1,234 images" in conclude(arms, GOOD, HEALTHY, SETTINGS)[2]
    hopeless = [arm("clean", "pass"), arm("worst case", "inconclusive")]
    assert "images would decide" not in conclude(hopeless, GOOD, HEALTHY, SETTINGS)[2]


def test_every_outcome_of_the_design_has_its_exit_code() -> None:
    by_code = {code: {name for name, value in EXIT_CODES.items() if value == code} for code in set(EXIT_CODES.values())}
    assert by_code == {
        0: {"OK"},
        1: {"QUANTIZE", "MAP", "EXPORT", "RUNTIME"},
        3: {"ROBUSTNESS_INFERIOR", "TRACE_MISMATCH"},
        4: {"INCONCLUSIVE", "MASKED_GRADIENTS"},
    }


def test_versions_are_of_what_is_installed() -> None:
    assert versions()["numpy"] == np.__version__
