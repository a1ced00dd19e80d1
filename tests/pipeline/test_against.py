"""A check against an earlier build: the reference is its integer network, and its corpus is replayed first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.bundle import write_bundle
from hardware.emulator import run_emulator
from hardware.errors import RuleViolations
from hardware.formats.bundle import COUNTEREXAMPLES_FILE, Bundle, open_bundle
from hardware.formats.counterexamples import save_counterexamples
from hardware.reference import run_reference
from pipeline.fidelity.check import CheckResult, Circumstances, run_check
from pipeline.fidelity.divergence import build_rows
from pipeline.fidelity.page import render_report
from pipeline.fidelity.references import earlier_build, float_reference
from pipeline.quantization import quantize
from pipeline.run import collected_corpus
from tests.pipeline.builds import CALIBRATION, QUICK, SHAPE, own_images, write_build
from tests.pipeline.samples import random_images, spiking_network

IMAGES = own_images(12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("against")


@pytest.fixture(scope="module")
def old(folder: Path) -> Bundle:
    return write_build(folder / "old", bits=8)


@pytest.fixture(scope="module")
def new(folder: Path) -> Bundle:
    return write_build(folder / "new", bits=2)


@pytest.fixture(scope="module")
def checked(folder: Path, old: Bundle, new: Bundle) -> CheckResult:
    return run_check(new, IMAGES, QUICK, folder / "crafted", Circumstances(data="random"), against=old)


def arms(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in report["arms"]}


def test_the_reference_is_what_the_old_bundle_runs(checked: CheckResult, old: Bundle, new: Bundle) -> None:
    clean = arms(checked.report)["clean"]
    for accuracy, bundle in (("reference_accuracy", old), ("deployed_accuracy", new)):
        answers = run_reference(bundle.network, IMAGES.codes).readouts.argmax(1)
        assert clean[accuracy] == np.mean(answers == IMAGES.labels)
    assert checked.report["reference"]["kind"] == "bundle"
    assert checked.report["reference"]["bundle"] == str(old.path)
    assert checked.report["reference"]["bits"]["neurons3->readout"] == 8
    assert checked.report["bits"] == 2


def test_labels_sentence_and_page_say_what_it_was_compared_with(checked: CheckResult) -> None:
    assert "ensemble on the earlier build" in arms(checked.report)["transfer"]["attack"]
    assert not any("float" in check["name"] for check in checked.report["gradient_health"]["checks"])
    page = render_report(checked.report, checked.gallery)
    assert "integers of an earlier build" in page
    assert "as the earlier one?" in page
    assert checked.report["outcome"] == "MASKED_GRADIENTS" or "earlier" in checked.report["summary"]


def test_a_build_is_not_inferior_to_itself(folder: Path, old: Bundle) -> None:
    report = run_check(old, IMAGES, QUICK, folder / "crafted", Circumstances(data="random"), against=old).report
    for arm in report["arms"]:
        assert arm["discordant"] == [0, 0]
    assert all(row["spike_agreement"] == 1.0 and row["first_divergence"] is None for row in report["layers"])
    assert report["corpus"]["added"] <= 12, "both are wrong alike, so an image adds one counterexample at most"


def test_the_corpus_of_the_last_check_is_replayed_and_nothing_found_twice(
    folder: Path, checked: CheckResult, new: Bundle, old: Bundle, tmp_path: Path
) -> None:
    first = checked.report["corpus"]
    assert (first["replayed"], first["images"]) == (0, first["added"])
    assert first["added"] == len(checked.counterexamples) > 0
    save_counterexamples(tmp_path / COUNTEREXAMPLES_FILE, checked.counterexamples)
    corpus = collected_corpus([new, old], tmp_path)
    again = run_check(new, IMAGES, QUICK, folder / "crafted", Circumstances(data="random"), corpus=corpus, against=old)
    row = again.report["corpus"]
    assert (row["replayed"], row["added"]) == (first["added"], 0)
    for model in ("reference", "deployed"):
        assert row[f"{model}_wrong"] == int(getattr(checked.counterexamples, f"{model}_wrong").sum())
    assert row["newly_deployed_wrong"] == row["no_longer_deployed_wrong"] == 0
    assert again.report["arms"] == checked.report["arms"], "a replay decides nothing"
    assert f"{row['replayed']} replayed first" in render_report(again.report, again.gallery)


def test_builds_for_other_images_cannot_be_compared(old: Bundle, tmp_path: Path) -> None:
    other = quantize(spiking_network("dense"), random_images((2, 3, 3), 4), 8, {}).network
    codes = random_images((2, 3, 3), 2)
    write_bundle(tmp_path / "x", other, golden_codes=codes, float_model_files={}, provenance={}, models=())
    with pytest.raises(RuleViolations, match=r"images: are the same.*\n.*classes: are the same"):
        earlier_build(old, open_bundle(tmp_path / "x"))


def test_two_builds_are_compared_layer_by_layer_with_the_margin_where_it_is_known(old: Bundle, new: Bundle) -> None:
    network, codes = old.network, random_images(SHAPE, 8, 9)
    before, after = (run_emulator(one.network, codes, record="traces") for one in (old, new))
    rows = build_rows(network, before, after)
    assert [row["name"] for row in rows] == ["neurons1", "neurons2", "neurons3"]
    for row in rows:
        first, layer = row["first_divergence"], network.by_name[row["name"]]
        spikes, membranes = before.populations[layer.name].spikes, before.populations[layer.name].membranes
        assert spikes is not None
        assert membranes is not None
        at = first["sample"], first["step"], first["neuron"]
        if spikes[at]:
            assert first["margin"] is None
        else:
            assert first["margin"] == pytest.approx((membranes[at] / 64 - layer.threshold) / layer.scale)
            assert first["margin"] <= 0
    assert earlier_build(new, old).compare(codes, after) == rows


def test_layers_of_builds_with_other_steps_are_not_compared(old: Bundle, tmp_path: Path) -> None:
    longer = write_build(tmp_path / "longer", steps=5)
    trace = run_emulator(longer.network, CALIBRATION, record="traces")
    assert earlier_build(longer, old).compare(CALIBRATION, trace) == []
    assert len(float_reference(longer).compare(CALIBRATION, trace)) == 3
