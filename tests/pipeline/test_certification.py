from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.bundle import write_bundle
from hardware.emulator import run_emulator
from hardware.errors import SpikeguardError
from hardware.formats.bundle import NIR_FILE, ONNX_FILE, ONNX_STEP_FILE, Bundle, open_bundle
from hardware.network import IntArray
from hardware.runtimes import opening
from hardware.runtimes.protocol import Runtime
from hardware.trace import PopulationTrace, Record, Trace
from pipeline.attacks.search import Crafted
from pipeline.fidelity.certification import (
    RuntimeFailedError,
    certify,
    is_certified,
    select_everything,
    select_subset,
)
from pipeline.fidelity.crafting import Images
from pipeline.models.float_file import float_files
from pipeline.quantization import quantize
from tests.pipeline.samples import random_images, spiking_network
from tests.served import served

SAMPLES = 10
CODES = random_images((1, 8, 8), SAMPLES, 1)
IMAGES = Images(CODES, np.arange(SAMPLES) % 4, 0)


def crafted(fooled: list[int], shade: int) -> Crafted:
    """Images that can be told apart: all pixels ``shade``, but the first, which is the image's number."""
    codes = np.full_like(CODES, shade)
    codes[:, 0, 0, 0] = np.arange(SAMPLES)
    return Crafted(codes, np.isin(np.arange(SAMPLES), fooled), np.zeros(SAMPLES), None, 1)


CRAFTED = {"a": crafted([3, 7], 100), "b": crafted([], 200)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    network = spiking_network("conv", seed=1, steps=3)
    deployed = quantize(network, CODES, 8, {}).network
    folder = tmp_path_factory.mktemp("certification") / "bundle"
    write_bundle(
        folder,
        deployed,
        golden_codes=CODES[:2],
        float_model_files=float_files(network),
        provenance={},
        models=(NIR_FILE, ONNX_FILE, ONNX_STEP_FILE),
    )
    return open_bundle(folder)


def test_adversarial_images_come_first_and_the_successful_ones_before_all() -> None:
    selection = select_subset(IMAGES, CRAFTED, 5)
    assert selection.adversarial == 5
    assert len(selection.codes) == 10
    shown = [(int(codes[0, 7, 7]), int(codes[0, 0, 0])) for codes in selection.codes[:5]]
    assert shown == [(100, 3), (100, 7), (100, 0), (200, 0), (100, 1)]
    assert np.array_equal(selection.codes[5:], CODES[:5])


def test_noise_counts_as_an_image_but_not_as_an_adversary() -> None:
    noise = replace(crafted([], 50), gradients=0)
    selection = select_subset(IMAGES, {"noise": noise, **CRAFTED}, 1000)
    assert selection.adversarial == 20
    assert not (selection.codes[:20] == 50).any()
    everything = select_everything(IMAGES, {"noise": noise, **CRAFTED})
    assert (everything.adversarial, len(everything.codes)) == (20, 40)


def test_asking_for_more_images_than_there_are_gives_all() -> None:
    selection = select_subset(IMAGES, CRAFTED, 1000)
    assert selection.adversarial == 20
    assert len(selection.codes) == 30
    everything = select_everything(IMAGES, CRAFTED)
    assert (everything.adversarial, len(everything.codes)) == (20, 30)
    assert {codes.tobytes() for codes in everything.codes} == {codes.tobytes() for codes in selection.codes}


def test_right_runtimes_are_certified_on_the_bundles_files(bundle: Bundle) -> None:
    rows = certify(bundle, ["emulator", "onnxruntime"], IMAGES, CRAFTED, 4)
    assert [row["name"] for row in rows] == ["emulator", "onnxruntime"]
    assert all(is_certified(row) for row in rows)
    assert (rows[0]["samples"], rows[0]["adversarial_samples"]) == (4, 4)
    assert (rows[1]["samples"], rows[1]["adversarial_samples"]) == (10, 20)
    assert rows[0]["mismatched_spikes"] == rows[0]["mismatched_membranes"] == rows[0]["mismatched_readouts"] == 0
    assert all(row["samples_per_second"] > 0 and row["version"] for row in rows)


@dataclass
class Faulty:
    """The emulator with one planted fault in the last sample it is shown."""

    bundle: Bundle
    fault: str
    name: str = "faulty"
    version: str = "1"

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        trace = run_emulator(self.bundle.network, inputs, record)
        if self.fault == "nothing exposed":
            return Trace(trace.readouts)
        if self.fault == "readouts":
            trace.readouts[-1, 0] += 1
            return trace
        if record == "readouts":
            return trace
        name = list(trace.populations)[1]
        population = trace.populations[name]
        assert population.spike_bits is not None
        assert population.membranes is not None
        if self.fault == "spikes":
            population.spike_bits[-1, 2, 0] ^= 0b0001_0000  # the fourth neuron
        elif self.fault == "membranes":
            population.membranes[-1, 2, 3] += 1
        elif self.fault == "no membranes":
            return Trace(trace.readouts, {**trace.populations, name: PopulationTrace(population.spikes, None)})
        return trace


def certify_faulty(bundle: Bundle, fault: str) -> dict[str, Any]:
    """As another runtime than those the project has names for."""

    def open_faulty(opened: Bundle) -> Runtime:
        return Faulty(opened, fault)

    emulator, row = certify(bundle, [], IMAGES, CRAFTED, 4, {"faulty": open_faulty})
    assert emulator["name"] == "emulator"  # the attack figures are its own, so it is always certified
    assert is_certified(emulator)
    return row


@pytest.mark.parametrize("fault", ["spikes", "membranes", "readouts"])
def test_one_wrong_value_in_one_sample_is_found_and_placed(bundle: Bundle, fault: str) -> None:
    row = certify_faulty(bundle, fault)
    assert not is_certified(row)
    counts = {kind: row[f"mismatched_{kind}"] for kind in ("spikes", "membranes", "readouts")}
    assert counts == {**dict.fromkeys(counts, 0), fault: 1}
    if fault != "readouts":
        layer = list(bundle.network.by_name)[1]
        assert row["first_mismatch"] == {"layer": layer, "sample": 7, "step": 2, "neuron": 3}


def test_what_is_not_exposed_is_null_and_the_rest_still_counts(bundle: Bundle) -> None:
    row = certify_faulty(bundle, "nothing exposed")
    assert row["mismatched_spikes"] is None
    assert row["mismatched_membranes"] is None
    assert row["mismatched_readouts"] == 0
    assert is_certified(row)


def test_onnxruntime_answers_every_image_and_a_wrong_answer_counts(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_faulty(opened: Bundle) -> Runtime:
        return Faulty(opened, "readouts", name="onnxruntime")

    monkeypatch.setattr(opening, "RUNTIMES", {**opening.RUNTIMES, "onnxruntime": open_faulty})
    _, row = certify(bundle, ["onnxruntime"], IMAGES, CRAFTED, 4)
    assert row["mismatched_readouts"] == 2  # one in the subset, one among all images
    assert not is_certified(row)


def test_a_service_answers_every_image_and_what_runs_another_network_is_found(bundle: Bundle, tmp_path: Path) -> None:
    with served(bundle.path, tmp_path, "--runtime", "onnx") as server:
        emulator, row = certify(bundle, [server.url], IMAGES, CRAFTED, 4)
        assert is_certified(emulator)
        assert is_certified(row)
        assert row["name"] == server.url
        assert (row["mismatched_spikes"], row["mismatched_membranes"], row["mismatched_readouts"]) == (None, None, 0)
        assert row["adversarial_samples"] == 2 * SAMPLES
        first, *others = bundle.network.populations
        other = replace(bundle.network, populations=(replace(first, threshold=first.threshold + 40), *others))
        write_bundle(tmp_path / "b", other, golden_codes=CODES[:2], float_model_files={}, provenance={}, models=())
        _, row = certify(open_bundle(tmp_path / "b"), [server.url], IMAGES, CRAFTED, 4)
        assert not is_certified(row)
    with pytest.raises(RuntimeFailedError, match="does not answer"):
        certify(bundle, [server.url], IMAGES, CRAFTED, 4)


def test_a_runtime_that_does_not_finish_is_an_error_with_its_name(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass
    class Broken(Faulty):
        def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:  # noqa: ARG002
            raise SpikeguardError("the deadline of 3 s passed")

    emulator = opening.RUNTIMES["emulator"]
    monkeypatch.setattr(opening, "RUNTIMES", {"emulator": emulator, "broken": lambda opened: Broken(opened, "")})
    with pytest.raises(RuntimeFailedError, match="runtime broken did not finish: the deadline"):
        certify(bundle, ["broken"], IMAGES, CRAFTED, 2)
    with pytest.raises(RuntimeFailedError, match=r"runtime netx did not finish.*no runtime"):
        certify(bundle, ["netx"], IMAGES, CRAFTED, 2)


def test_a_format_the_bundle_lacks_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(RuntimeFailedError, match=r"netx did not finish.*model\.net"):
        certify(bundle, ["netx"], IMAGES, CRAFTED, 2)


def test_a_network_changed_after_export_is_not_certified(bundle: Bundle, tmp_path: Path) -> None:
    """The runtime reads the file: a bundle whose ONNX file is of another network must be caught."""
    network = bundle.network
    first, *others = network.populations
    raised = replace(first, threshold=first.threshold + 40)
    write_bundle(
        tmp_path / "other",
        replace(network, populations=(raised, *others)),
        golden_codes=CODES[:2],
        float_model_files={},
        provenance={},
        models=(NIR_FILE, ONNX_FILE, ONNX_STEP_FILE),
    )
    other = open_bundle(tmp_path / "other")
    mixed = Bundle(other.path, other.manifest)
    mixed.__dict__["network"] = network
    _, row = certify(mixed, ["onnxruntime"], IMAGES, CRAFTED, 4)
    assert not is_certified(row)
