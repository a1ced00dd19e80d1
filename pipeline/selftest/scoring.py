"""Scores the check: every planted error must end in a FAIL that names its layer, an unharmed bundle must pass.

Builds that run exactly as exported, but are worse or cannot be attacked, must be refused for just that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hardware.errors import SpikeguardError
from hardware.files import read_json, write_json
from hardware.formats.bundle import Bundle, open_bundle
from pipeline.attacks.targets import Codes
from pipeline.config import FidelityConfig, load_config
from pipeline.fidelity.certification import NO_OTHERS, Open, is_certified
from pipeline.fidelity.check import CheckResult, Circumstances, run_check
from pipeline.fidelity.crafting import Images
from pipeline.fidelity.references import identity_of
from pipeline.models.float_file import load_float
from pipeline.progress import track
from pipeline.run import Run
from pipeline.selftest.bugs import BUGS, Bug
from pipeline.selftest.builds import BUILDS, Build
from pipeline.source import source_digest
from pipeline.stages import quantization_images
from pipeline.statistics import wilson_interval

SCHEMA = "spikeguard.selftest/1"
PRESET = "selftest"
SEEDS, IMAGES = 20, 240
"""Unharmed checks, and images of each."""
BUG_IMAGES, BUILD_IMAGES = 48, 100
"""Of the check of a planted error, which few images show, and of a bad build."""
MAX_FALSE_ALARMS = 1 / 20
FAIL_CODE = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is checked over and over.

    Attributes:
        folder: keeps crafted images and finished rows.
    """

    bundle: Bundle
    codes: np.ndarray[Any, np.dtype[np.uint8]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    settings: FidelityConfig
    folder: Path

    def images(self, count: int, seed: int) -> Images:
        """Images of the test split, drawn by the seed that all else of a check derives from too."""
        drawn = np.random.default_rng(seed).permutation(len(self.labels))[:count]
        return Images(self.codes[drawn], self.labels[drawn], seed)


def score(folder: Path, seeds: int = SEEDS, images: int = IMAGES, *, fresh: bool = False) -> Row:
    """Train the self-test network, check it with every planted error, then unharmed under ``seeds`` seeds.

    Args:
        folder: of the run; what is finished there is not done again, unless ``fresh``.
        seeds: of unharmed checks, each on other images with other attacks.
        images: of each unharmed check.

    Returns:
        ``selftest.json``, which is written too.

    Raises:
        SpikeguardError: if there are fewer images.
    """
    config = load_config(PRESET)
    run = Run(config, folder, "")
    test = run.data.test
    if images > len(test):
        raise SpikeguardError(
            f"{images} images are more than the {len(test)} that the self-test sets aside; take fewer"
        )
    run.ensure(fresh=fresh)
    subject = Subject(open_bundle(run.result("export")), test.codes, test.labels, config.fidelity, folder)
    bugs = _rows("planted errors", [(bug.error, _check_of(subject, bug)) for bug in BUGS], subject, fresh)
    calibration = quantization_images(run.data.train, config.seed)
    builds = [(build.stem, _check_of_build(subject, build, calibration)) for build in BUILDS]
    checks = [(f"{images}-images-seed-{seed}", _unharmed(subject, images, seed)) for seed in range(seeds)]
    refused, unharmed = _rows("bad builds", builds, subject, fresh), _rows("unharmed", checks, subject, fresh)
    result = conclude(bugs, refused, unharmed, subject.settings)
    write_json(folder / "selftest.json", result)
    return result


def conclude(
    bugs: Sequence[Mapping[str, Any]],
    builds: Sequence[Mapping[str, Any]],
    unharmed: Sequence[Mapping[str, Any]],
    settings: FidelityConfig,
) -> Row:
    """The score of finished rows; anything but a pass of an unharmed bundle is a false alarm."""
    false_alarms = sum(row["outcome"] != "OK" for row in unharmed)
    caught = sum(row["caught"] for row in bugs)
    refused = sum(row["outcome"] == row["expected"] for row in builds)
    few_alarms = false_alarms <= MAX_FALSE_ALARMS * len(unharmed)
    return {
        "schema": SCHEMA,
        "margin": settings.margin,
        "epsilon": settings.epsilon,
        "attacks": settings.attacks,
        "bugs": list(bugs),
        "caught": caught,
        "builds": list(builds),
        "refused": refused,
        "unharmed": list(unharmed),
        "false_alarms": false_alarms,
        "false_alarm_rate": false_alarms / len(unharmed),
        "false_alarm_interval": list(wilson_interval(false_alarms, len(unharmed))),
        "passed": caught == len(bugs) and refused == len(builds) and few_alarms,
    }


def _rows(label: str, checks: Sequence[tuple[str, Callable[[], Row]]], subject: Subject, fresh: bool) -> list[Row]:
    """A row of each check, kept in a file of its own as long as neither code nor bundle changes."""
    rows = []
    with track(label, len(checks)) as advance:
        for name, check in checks:
            facts = [name, source_digest(), identity_of(subject.bundle), subject.settings.model_dump(mode="json")]
            key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
            path = subject.folder / "selftest" / f"{name}-{key}.json"
            if fresh or not path.is_file():
                write_json(path, check())
            rows.append(read_json(path))
            advance(name)
    return rows


def _check_of(subject: Subject, bug: Bug) -> Callable[[], Row]:
    def check() -> Row:
        settings = subject.settings.model_copy(update={"runtimes": ("emulator",)})
        result = _check(subject, subject.images(BUG_IMAGES, 0), settings, {bug.name: bug.open})
        *others, row = result.report["runtimes"]
        named = row["first_mismatch"] and row["first_mismatch"]["layer"]
        outcome, failed = result.report["outcome"], result.exit_code == FAIL_CODE
        return {
            "name": bug.name,
            "error": bug.error,
            "kind": "export" if bug.is_exported else "runtime",
            "layer": bug.layer,
            "verdict": result.report["verdict"],
            "outcome": outcome,
            "exit_code": result.exit_code,
            "first_mismatch": row["first_mismatch"],
            "summary": result.report["summary"],
            "caught": failed
            and outcome == "TRACE_MISMATCH"
            and named == bug.layer
            and f"layer {bug.layer}," in result.report["summary"]
            and all(is_certified(other) for other in others),
        }

    return check


def _check_of_build(subject: Subject, build: Build, calibration: Codes) -> Callable[[], Row]:
    def check() -> Row:
        bundle = build.write(subject.folder / "builds" / build.stem, load_float(subject.bundle.path), calibration)
        settings = subject.settings.model_copy(update={"runtimes": ("emulator",)})
        result = _check(replace(subject, bundle=bundle), subject.images(BUILD_IMAGES, 0), settings)
        facts = {key: result.report[key] for key in ("verdict", "outcome", "summary")}
        return {"name": build.name, "expected": build.outcome, "exit_code": result.exit_code, **facts}

    return check


def _unharmed(subject: Subject, count: int, seed: int) -> Callable[[], Row]:
    def check() -> Row:
        report = _check(subject, subject.images(count, seed), subject.settings).report
        worst = next(arm for arm in report["arms"] if arm["name"] == "worst case")
        facts = {key: worst[key] for key in ("reference_accuracy", "deployed_accuracy", "lower_bound")}
        return {"seed": seed, "samples": count, "outcome": report["outcome"], "summary": report["summary"], **facts}

    return check


def _check(
    subject: Subject, images: Images, settings: FidelityConfig, others: Mapping[str, Open] = NO_OTHERS
) -> CheckResult:
    circumstances = Circumstances(data="digits")
    return run_check(subject.bundle, images, settings, subject.folder / "crafted", circumstances, others)
