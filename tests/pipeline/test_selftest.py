"""The check's own score: what is planted, what counts as caught, and what the score says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware.errors import SpikeguardError
from hardware.formats.bundle import Bundle
from pipeline.attacks.search import Crafted
from pipeline.config import FidelityConfig, load_config
from pipeline.fidelity.certification import certify, is_certified
from pipeline.fidelity.check import conclude as conclude_check
from pipeline.selftest import scoring
from pipeline.selftest.bugs import BUGS, FIRST, READOUT, Bug
from pipeline.selftest.builds import BUILDS, Build
from pipeline.selftest.network import residual_digits
from pipeline.selftest.scoring import Subject, conclude
from pipeline.selftest.tables import build_table, conclusion, false_alarm_line, score_table
from tests.pipeline.builds import CALIBRATION, QUICK, own_images, untrained, write_build

SETTINGS = FidelityConfig()
IMAGES, MANY = own_images(12), own_images(80)
"""A membrane is seldom equal to its threshold: ≥ for > shows on many images of an untrained network only."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_build(tmp_path_factory.mktemp("selftest") / "bundle")


@pytest.fixture(scope="module")
def subject(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """All checks of it share their images, and so their attacks."""
    return Subject(bundle, IMAGES.codes, IMAGES.labels, QUICK, tmp_path_factory.mktemp("score"))


def test_at_least_fifteen_different_errors_are_planted_in_every_layer() -> None:
    assert len({bug.error for bug in BUGS}) == len({bug.name for bug in BUGS}) == len(BUGS) >= 15
    assert {bug.layer for bug in BUGS} == set(untrained_populations())
    assert {bug.is_exported for bug in BUGS} == {True, False}


def untrained_populations() -> list[str]:
    spiking = [layer.name for layer in untrained().graph.layers if layer.kind == "spike"]
    return [*spiking, READOUT]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.error)
def test_every_planted_error_fails_the_check_in_its_layer(bundle: Bundle, bug: Bug) -> None:
    images = MANY if "threshold" in bug.error else IMAGES
    fooled, strength = np.ones(len(images.labels), np.bool_), np.zeros(len(images.labels))
    sought = {"sought": Crafted(255 - images.codes, fooled, strength, None, 1)}
    emulator, wrong = certify(bundle, [], images, sought, len(images.labels), {bug.name: bug.open})
    assert is_certified(emulator)
    assert wrong["first_mismatch"]["layer"] == bug.layer
    arms = [{"name": name, "deciding": True, "verdict": "pass"} for name in ("clean", "worst case")]
    verdict, outcome, summary = conclude_check(arms, [emulator, wrong], {"alarms": []}, SETTINGS)
    assert (verdict, outcome) == ("fail", "TRACE_MISMATCH")
    assert f"{wrong['name']} does not compute what the integer network means, first in layer {bug.layer}," in summary


@pytest.mark.parametrize("error", ["dropped_bias", "states_kept_between_samples"])
def test_a_whole_check_catches_an_error_of_each_kind(subject: Subject, error: str) -> None:
    (bug,) = (bug for bug in BUGS if bug.error == error)
    row = scoring._check_of(subject, bug)()
    assert row["caught"] is True
    assert (row["verdict"], row["outcome"], row["exit_code"]) == ("fail", "TRACE_MISMATCH", 3)
    assert row["first_mismatch"]["layer"] == bug.layer


def test_an_error_caught_in_another_layer_than_it_was_planted_in_is_missed(subject: Subject) -> None:
    bug = next(bug for bug in BUGS if bug.error == "dropped_bias")

    class Mislabelled(Bug):
        def open(self, bundle: Bundle) -> Any:
            return bug.open(bundle)

    row = scoring._check_of(subject, Mislabelled(bug.name, bug.error, FIRST))()
    assert row["outcome"] == "TRACE_MISMATCH"
    assert row["caught"] is False


def test_an_error_that_changes_nothing_cannot_be_planted(bundle: Bundle) -> None:
    with pytest.raises(SpikeguardError, match="changes nothing in readout"):
        Bug("no convolution", "transposed_kernels", READOUT).open(bundle)


def test_an_unharmed_bundle_is_checked_on_other_images_under_each_seed(subject: Subject) -> None:
    assert subject.images(8, 1).codes.tobytes() != subject.images(8, 2).codes.tobytes()
    assert subject.images(8, 1).codes.tobytes() == subject.images(8, 1).codes.tobytes()
    assert subject.images(8, 1).seed == 1
    row = scoring._unharmed(subject, 12, 0)()
    assert row["samples"] == 12
    assert row["outcome"] in ("OK", "ROBUSTNESS_INFERIOR", "INCONCLUSIVE", "MASKED_GRADIENTS")


def test_a_network_built_to_mask_its_gradients_is_refused(subject: Subject) -> None:
    build = next(build for build in BUILDS if build.outcome == "MASKED_GRADIENTS")
    row = check_of(subject, build)
    assert (row["verdict"], row["outcome"], row["exit_code"]) == ("inconclusive", "MASKED_GRADIENTS", 4)
    for model in ("float", "integer"):
        assert f"zero gradients, {model}" in row["summary"]


def check_of(subject: Subject, build: Build) -> dict[str, Any]:
    bundle = build.write(subject.folder / build.stem, untrained(), CALIBRATION)
    result = scoring._check(replace(subject, bundle=bundle), IMAGES, QUICK)
    return {**result.report, "exit_code": result.exit_code}


def test_a_row_is_kept_until_the_bundle_or_the_settings_change(subject: Subject) -> None:
    calls = []

    def check() -> dict[str, Any]:
        calls.append(1)
        return {"row": len(calls)}

    assert scoring._rows("x", [("a", check)], subject, False) == [{"row": 1}]
    assert scoring._rows("x", [("a", check)], subject, False) == [{"row": 1}]
    assert scoring._rows("x", [("a", check)], subject, True) == [{"row": 2}]
    stricter = QUICK.model_copy(update={"margin": 0.01})
    assert scoring._rows("x", [("a", check)], replace(subject, settings=stricter), False) == [{"row": 3}]


def test_the_preset_trains_the_network_with_everything_to_go_wrong() -> None:
    config = load_config("selftest")
    assert config.network == f"{residual_digits.__module__}:{residual_digits.__name__}"
    assert config.data.test >= 3 * scoring.IMAGES


def bug_row(caught: bool = True) -> dict[str, Any]:
    outcome, place = ("TRACE_MISMATCH", {"layer": "neurons1"}) if caught else ("OK", None)
    facts = {"name": "n", "kind": "export", "layer": "neurons1", "caught": caught}
    return {**facts, "outcome": outcome, "first_mismatch": place}


def build_row(outcome: str = "MASKED_GRADIENTS") -> dict[str, Any]:
    return {"name": "b", "expected": "MASKED_GRADIENTS", "outcome": outcome}


def checks(count: int, **others: int) -> list[dict[str, Any]]:
    outcomes = [outcome for outcome, times in others.items() for _ in range(times)]
    return [{"outcome": outcome, "samples": 240} for outcome in [*outcomes, *["OK"] * (count - len(outcomes))]]


@pytest.mark.parametrize(
    ("bugs", "builds", "unharmed", "passed"),
    [
        ([bug_row()], [build_row()], checks(20), True),
        ([bug_row()], [build_row()], checks(20, INCONCLUSIVE=1), True),
        ([bug_row()], [build_row()], checks(20, INCONCLUSIVE=1, MASKED_GRADIENTS=1), False),
        ([bug_row()], [build_row()], checks(5, TRACE_MISMATCH=1), False),
        ([bug_row(), bug_row(False)], [build_row()], checks(20), False),
        ([bug_row()], [build_row("OK")], checks(20), False),
        ([bug_row()], [build_row("ROBUSTNESS_INFERIOR")], checks(20), False),
    ],
)
def test_the_score_passes_if_all_is_caught_and_at_most_one_in_twenty_is_a_false_alarm(
    bugs: list[dict[str, Any]], builds: list[dict[str, Any]], unharmed: list[Mapping[str, Any]], passed: bool
) -> None:
    assert conclude(bugs, builds, unharmed, SETTINGS)["passed"] is passed


def test_the_score_is_told_with_its_interval() -> None:
    score = conclude([bug_row(), bug_row(False)], [build_row()], checks(20, INCONCLUSIVE=1), SETTINGS)
    assert score_table(score).rows[0] == ("n", "neurons1", "TRACE_MISMATCH", "neurons1", "caught")
    assert score_table(score).rows[1][2:] == ("OK", "–", "MISSED")
    assert build_table(score).rows == [("b", "MASKED_GRADIENTS", "refused")]
    assert conclusion(score).startswith("1 of 2 planted errors caught")
    line = false_alarm_line(score).replace("\N{NO-BREAK SPACE}", " ").replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert line.startswith("The unharmed bundle passed 19 of 20 checks, 1 INCONCLUSIVE: false alarms 5.0")
    assert "0.9" in line
    assert "23.6" in line


def test_more_images_than_there_are_is_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(SpikeguardError, match="801 images are more than the 800"):
        scoring.score(tmp_path, images=801)
    assert list(tmp_path.iterdir()) == []
