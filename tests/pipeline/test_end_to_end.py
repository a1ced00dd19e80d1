"""The main job, small: train, convert, fine-tune, quantise, export, check, report; then every other command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.conformance.rows import READERS, Outcome, conformance_rows
from hardware.files import read_json
from hardware.formats.bundle import (
    COUNTEREXAMPLES_FILE,
    FLOAT_GOLDEN_FILE,
    ONNX_FLOAT_FILE,
    Bundle,
    open_bundle,
)
from hardware.formats.counterexamples import load_counterexamples
from hardware.formats.verify import verify_bundle
from hardware.trace import unpack_trace
from pipeline.bundle_tables import attribution_table
from pipeline.fidelity.wording import ATTRIBUTION_NOTE
from pipeline.models.float_file import load_float
from pipeline.models.float_onnx import float_onnx
from tests.pipeline.conftest import SmallRun, spikeguard

FINISHED = {0, 3, 4}
STAGES = ("train", "convert", "finetune", "baseline", "quantize", "export")
FILES = {
    "manifest.json",
    "golden.npz",
    "model.nir",
    "model.cuba.nir",
    "model.net",
    "model.onnx",
    "model.step.onnx",
    "model.int8.onnx",
    "model.float.onnx",
    "golden.float.npz",
    "snn.json",
    "snn.safetensors",
}
FIELDS = {
    "schema",
    "verdict",
    "outcome",
    "margin",
    "confidence",
    "samples",
    "seed",
    "steps",
    "bits",
    "epsilon",
    "certified_runtimes",
    "reference",
    "arms",
    "runtimes",
    "corpus",
    "layers",
    "gradient_health",
    "placement",
    "energy",
    "timings",
    "versions",
}
ARM_FIELDS = {
    "name",
    "attack",
    "epsilon",
    "deciding",
    "samples",
    "reference_accuracy",
    "deployed_accuracy",
    "difference",
    "lower_bound",
    "interval",
    "discordant",
    "verdict",
}
RUNTIME_FIELDS = {
    "name",
    "version",
    "samples",
    "adversarial_samples",
    "mismatched_spikes",
    "mismatched_membranes",
    "mismatched_readouts",
    "first_mismatch",
    "samples_per_second",
    "startup_seconds",
    "stepping_samples_per_second",
}


def test_the_run_finishes_with_a_verdict(small_run: SmallRun) -> None:
    assert small_run.finished.returncode in FINISHED, small_run.finished.stderr
    expected = {"pass": 0, "fail": 3, "inconclusive": 4}[small_run.report["verdict"]]
    assert small_run.finished.returncode == expected
    assert small_run.report["verdict"].upper() in small_run.finished.stdout
    assert "Traceback" not in small_run.finished.stderr


def test_the_report_keeps_to_its_schema(small_run: SmallRun) -> None:
    report = small_run.report
    assert report["schema"] == "spikeguard.fidelity/1"
    assert set(report) >= FIELDS
    assert (report["samples"], report["steps"], report["bits"], report["epsilon"]) == (80, 4, 8, [0.05])
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert [name for name, arm in arms.items() if arm["deciding"]] == ["clean", "worst case"]
    assert {"noise", "transfer", "adaptive", "black box"} <= set(arms)
    for arm in report["arms"]:
        assert set(arm) >= ARM_FIELDS
        assert arm["samples"] == 80
        assert arm["interval"][0] <= arm["lower_bound"] <= arm["difference"] <= arm["interval"][1]
        only_reference, only_deployed = arm["discordant"]
        assert arm["difference"] == pytest.approx((only_deployed - only_reference) / 80)
        assert arm["difference"] == pytest.approx(arm["deployed_accuracy"] - arm["reference_accuracy"])
        assert (arm["verdict"] is not None) == arm["deciding"]
    for arm in report["arms"]:
        for kind in ("reference_accuracy", "deployed_accuracy"):
            assert arms["worst case"][kind] <= arm[kind]
    for row in report["runtimes"]:
        assert set(row) >= RUNTIME_FIELDS
    for layer in report["layers"]:
        assert {"name", "spike_agreement", "rate_error", "first_divergence"} <= set(layer)
        assert 0.5 < layer["spike_agreement"] <= 1
    assert set(STAGES) <= set(report["timings"])
    assert len(report["layers"]) == 3


def test_training_did_something(small_run: SmallRun) -> None:
    """Otherwise every other comparison would be between coins."""
    arms = {arm["name"]: arm for arm in small_run.report["arms"]}
    assert arms["clean"]["reference_accuracy"] > 0.6
    assert arms["clean"]["deployed_accuracy"] > 0.6
    assert arms["worst case"]["deployed_accuracy"] < arms["clean"]["deployed_accuracy"]


def test_no_runtime_differs_from_the_reference(small_run: SmallRun) -> None:
    report = small_run.report
    assert report["certified_runtimes"] == ["emulator", "onnxruntime"]
    for row in report["runtimes"]:
        assert row["adversarial_samples"] >= 6
        assert {row[f"mismatched_{kind}"] for kind in ("spikes", "membranes", "readouts")} <= {0, None}


def test_the_page_is_one_file_with_the_verdict(small_run: SmallRun) -> None:
    page = (small_run.folder / "report.html").read_text()
    assert re.search(r"(src|href)\s*=\s*[\"'](?!data:|#)", page) is None
    assert "emulator" in page
    assert small_run.report["verdict"] in page.lower()


def test_a_run_knows_every_step_and_its_summary_tells_them(small_run: SmallRun) -> None:
    report = small_run.report
    assert [point["epsilon"] for point in report["curve"]] == [0.0, 0.05, 0.1]
    steps = {step["name"]: step["accuracy"] for step in report["waterfall"]["steps"]}
    assert {"trained", "conversion", "fine-tuning", "thresholds", "weights", "bias", "everything"} <= set(steps)
    worst = next(arm for arm in report["arms"] if arm["name"] == "worst case")
    assert (steps["fine-tuning"], steps["everything"]) == (worst["reference_accuracy"], worst["deployed_accuracy"])
    assert report["waterfall"]["unknown"] is None
    for layer in report["layers"]:
        assert len(layer["step_agreement"]) == len(layer["teacher_forced"]["step_agreement"]) == report["steps"]
    summary = (small_run.folder / "report.md").read_text()
    assert summary.splitlines()[0].endswith(f"{report['verdict'].upper()}: hardware fidelity")
    for words in ("| worst case |", "| fine-tuning |", "| onnxruntime |", "| 0.1 (25"):
        assert words in summary


def test_terminal_page_and_report_tell_what_each_kind_of_rounding_changes(small_run: SmallRun) -> None:
    rows = small_run.report["attribution"]
    assert rows == read_json(small_run.folder / "quantize" / "attribution.json")
    assert [row["rounded"] for row in rows if row["rounded"] not in ("bias", "input")] == [
        "nothing", "weights", "thresholds", "everything",
    ]  # fmt: skip
    page = (small_run.folder / "report.html").read_text()
    said = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in small_run.finished.stdout.splitlines()]
    for cells in attribution_table(rows).rows:
        assert list(cells) in said
        assert all(f">{cell}<" in page for cell in cells)
    assert ATTRIBUTION_NOTE in page
    assert ATTRIBUTION_NOTE in " ".join(small_run.finished.stdout.split())


def test_the_bundle_is_complete_and_holds_the_networks_of_the_run(small_run: SmallRun) -> None:
    names = {path.name for path in small_run.bundle.iterdir()}
    assert names >= FILES
    bundle = open_bundle(small_run.bundle)
    assert len(bundle.golden.codes) >= 8
    before, after = load_float(small_run.folder / "finetune"), load_float(small_run.bundle)
    assert all(np.array_equal(after.state_dict()[key], value) for key, value in before.state_dict().items())


def test_nothing_half_written_is_left(small_run: SmallRun) -> None:
    assert [path for path in small_run.folder.rglob("*") if "partial" in path.name] == []


@pytest.fixture(scope="module")
def second(small_run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The same command on a copy of the finished run."""
    folder = tmp_path_factory.mktemp("second") / "run"
    shutil.copytree(small_run.folder, folder)
    return folder, spikeguard("run", small_run.config, "--out", folder)


def test_a_second_run_reuses_every_stage_and_concludes_the_same(small_run: SmallRun, second: tuple[Path, Any]) -> None:
    folder, finished = second
    assert finished.returncode == small_run.finished.returncode
    for stage in STAGES:
        assert re.search(rf"{stage}\s+kept", finished.stderr), stage
    old, new = small_run.report, json.loads((folder / "report.json").read_text())
    for field in ("verdict", "outcome", "arms", "layers", "gradient_health"):
        assert old[field] == new[field]
    for path in (small_run.folder / "crafted").rglob("*.npz"):
        assert (folder / path.relative_to(small_run.folder)).stat().st_mtime_ns == path.stat().st_mtime_ns


def test_verify_finds_every_file_right(small_run: SmallRun) -> None:
    finished = spikeguard("verify", small_run.bundle)
    assert finished.returncode == 0, finished.stderr
    for name in ("nir", "cuba.nir", "onnx", "step.onnx", "int8.onnx", "float.onnx"):
        assert f"model.{name}" in finished.stdout
    assert "flipped spike(s)" in finished.stdout


def test_info_shows_populations_and_proofs(small_run: SmallRun) -> None:
    finished = spikeguard("info", small_run.bundle)
    assert finished.returncode == 0, finished.stderr
    for word in ("neurons1", "readout", "cannot wrap", "T = 4", "model.onnx"):
        assert word in finished.stdout


@pytest.mark.parametrize("runtime", ["reference", "emulator", "onnxruntime"])
def test_emulate_answers_with_the_same_traces_everywhere(small_run: SmallRun, tmp_path: Path, runtime: str) -> None:
    bundle = open_bundle(small_run.bundle)
    labels = np.zeros(len(bundle.golden.codes), np.int64)
    np.savez(tmp_path / "images.npz", images=bundle.golden.codes, labels=labels)
    finished = spikeguard(
        "emulate",
        small_run.bundle,
        "--images",
        tmp_path / "images.npz",
        "--runtime",
        runtime,
        "--trace",
        tmp_path / "t.npz",
    )
    assert finished.returncode == 0, finished.stderr
    assert "accuracy" in finished.stdout
    with np.load(tmp_path / "t.npz") as arrays:
        trace = unpack_trace({name: arrays[name] for name in arrays.files})
    assert np.array_equal(trace.readouts, bundle.golden.trace.readouts)
    for name, population in trace.populations.items():
        expected = bundle.golden.trace.populations[name]
        if population.spikes is not None:
            assert expected.spikes is not None
            assert np.array_equal(population.spikes, expected.spikes)


@pytest.mark.parametrize(
    ("target", "absent"),
    [("nir", "model.onnx"), ("onnx", "model.nir"), ("loihi", "model.onnx"), ("all", "nothing")],
)
def test_export_writes_a_bundle_of_one_target_that_verifies(
    small_run: SmallRun, tmp_path: Path, target: str, absent: str
) -> None:
    finished = spikeguard("export", small_run.folder, "--target", target, "--out", tmp_path / "new")
    assert finished.returncode == 0, finished.stderr
    new = open_bundle(tmp_path / "new")
    assert absent not in new
    assert "snn.json" in new
    assert (ONNX_FLOAT_FILE in new) == (FLOAT_GOLDEN_FILE in new) == (target in ("onnx", "all"))
    if ONNX_FLOAT_FILE in new:
        assert new.file(ONNX_FLOAT_FILE).read_bytes() == (small_run.bundle / ONNX_FLOAT_FILE).read_bytes()
    assert np.array_equal(new.golden.trace.readouts, open_bundle(small_run.bundle).golden.trace.readouts)


def test_export_writes_a_triton_model_that_checks_itself(small_run: SmallRun, tmp_path: Path) -> None:
    finished = spikeguard("export", small_run.folder, "--target", "triton", "--out", tmp_path, "--name", "digits")
    assert finished.returncode == 0, finished.stderr
    assert "config.pbtxt" in finished.stdout
    check = [sys.executable, "-I", str(tmp_path / "digits" / "selfcheck.py")]
    checked = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_float_file_is_judged_by_what_rounding_explains(small_run: SmallRun, tmp_path: Path) -> None:
    readers = [reader for reader in READERS if reader.file == ONNX_FLOAT_FILE]
    (row,) = conformance_rows(open_bundle(small_run.bundle), 5, readers=readers)
    assert row.outcome in (Outcome.EQUAL, Outcome.DEVIATES)
    assert (row.mismatched_spikes, row.mismatched_membranes, row.mismatched_readouts) == (0, None, 0)
    assert (row.samples, row.processes) == (5, 1)
    assert "0 of 5 classes changed" in row.reason
    copy = Path(shutil.copytree(small_run.bundle, tmp_path / "bundle"))
    network = load_float(copy)
    with torch.no_grad():
        next(network.neurons())[1].threshold.mul_(1.1)
    (copy / ONNX_FLOAT_FILE).write_bytes(float_onnx(network))
    changed = Bundle(copy, open_bundle(small_run.bundle).manifest)
    (row,) = conformance_rows(changed, readers=readers)
    assert row.outcome is Outcome.DIFFERS
    assert row.mismatched_spikes
    *_, verified = verify_bundle(changed)
    assert (verified.file, verified.equal, verified.note) == (ONNX_FLOAT_FILE, False, row.reason)


def test_fidelity_alone_comes_to_the_same_arms(small_run: SmallRun, tmp_path: Path) -> None:
    finished = spikeguard(
        "fidelity", small_run.bundle, "--runtime", "emulator", "--set", small_run.data, "--jobs", 2, "--out", tmp_path
    )
    assert finished.returncode == small_run.finished.returncode, finished.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    for field in ("arms", "attribution"):
        assert report[field] == small_run.report[field]
    assert report["certified_runtimes"] == ["emulator"]
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_a_build_is_checked_against_another_and_its_corpus_grows_into_a_new_bundle(
    small_run: SmallRun, tmp_path: Path
) -> None:
    corpus = small_run.report["corpus"]
    assert (corpus["replayed"], corpus["images"]) == (0, corpus["added"])
    assert corpus["added"] > 0
    finished = spikeguard(
        "fidelity", small_run.bundle, "--against", small_run.bundle, "--grow", tmp_path / "grown", "--out", tmp_path,
        "--runtime", "emulator", "--set", small_run.data, "--set", "fidelity.square_queries=5",
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert finished.returncode == {"OK": 0, "MASKED_GRADIENTS": 4, "INCONCLUSIVE": 4}[report["outcome"]]
    assert all(arm["discordant"] == [0, 0] for arm in report["arms"]), "it is the same build"
    assert report["reference"]["kind"] == "bundle"
    grown = open_bundle(tmp_path / "grown")
    assert len(grown.counterexamples) == report["corpus"]["added"] > 0
    assert f"{report['corpus']['added']} new ones kept" in finished.stdout
    left = load_counterexamples(tmp_path / COUNTEREXAMPLES_FILE, grown.network)
    assert left.hashes == grown.counterexamples.hashes


@pytest.mark.lava
def test_lava_and_netx_are_certified_spike_for_spike(small_run: SmallRun, tmp_path: Path) -> None:
    """The same run with Lava: finished stages and attacks are reused, only the certification grows."""
    shutil.copytree(small_run.folder, tmp_path / "run")
    finished = spikeguard(
        "run",
        small_run.config,
        "--out",
        tmp_path / "run",
        "--set",
        "fidelity.runtimes=[emulator, lava, netx, onnxruntime]",
    )
    assert finished.returncode == small_run.finished.returncode, finished.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["certified_runtimes"] == ["emulator", "lava", "netx", "onnxruntime"]
    by_name = {row["name"]: row for row in report["runtimes"]}
    for name in ("lava", "netx"):
        row = by_name[name]
        assert (row["samples"], row["adversarial_samples"]) == (6, 6)
        assert row["mismatched_spikes"] == row["mismatched_membranes"] == row["mismatched_readouts"] == 0
        seconds = row["startup_seconds"] + 12 / row["stepping_samples_per_second"]
        assert 0 < row["startup_seconds"] < seconds <= 12 / row["samples_per_second"]
    assert by_name["emulator"]["startup_seconds"] is by_name["emulator"]["stepping_samples_per_second"] is None
    assert report["arms"] == small_run.report["arms"]
