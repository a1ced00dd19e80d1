"""From a NIR file to a bundle: the integers mean what was read, every runtime means what they mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch

from exporters.nir import write_nir
from hardware.emulator import run_emulator
from hardware.errors import RuleViolations, SpikeguardError
from hardware.formats.bundle import (
    NETX_FILE,
    NIR_CUBA_FILE,
    NIR_FILE,
    ONNX_FILE,
    ONNX_FLOAT_FILE,
    ONNX_INT8_FILE,
    ONNX_STEP_FILE,
)
from hardware.formats.nir_graph import read_nir_graph
from hardware.formats.verify import verify_bundle
from hardware.reference import run_reference
from hardware.twin import Twin
from pipeline.cli import main
from pipeline.config import override_config
from pipeline.importing.conventions import Conventions
from pipeline.importing.deployment import INTEGERS, READ, import_nir
from pipeline.importing.networks import network_of
from pipeline.importing.tables import comparison_table, conclusion
from pipeline.mapping import STATE_LIMIT, map_wide
from pipeline.models.spiking import SpikingNetwork
from pipeline.run import Run, require_same_test_split
from tests.networks import random_network, same_network

STEPS = 6
SAID = ("steps=6", "dt=1", "reset=zero", "comparison=above", "decay=euler", "synapse_gain=decay", "if_gain=per-step")


def filled(shape: Any, value: float) -> np.ndarray:
    return np.full(shape, value, np.float32)


def cuba(shape: Any, threshold: float) -> Any:
    """Keeps half of its current and three quarters of its membrane."""
    values = {"tau_syn": 2, "tau_mem": 4, "r": 4, "w_in": 2, "v_leak": 0, "v_reset": 0, "v_threshold": threshold}
    return nir.CubaLIF(**{key: filled(shape, value) for key, value in values.items()})


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Short binary fractions, which the widest integers hold as they are."""
    return (rng.integers(-32, 33, shape) / 32).astype(np.float32)


def leaky_graph(path: Path, last: str = "spikes", seed: int = 0, pixels: bool = True) -> Path:
    """Convolution and dense layers of neurons whose currents decay, all with biases, and a readout."""
    rng = np.random.default_rng(seed)
    shape = (2, 6, 6) if pixels else (4,)
    first: dict[str, Any] = {"fc0": nir.Affine(weights(rng, 8, 4), weights(rng, 8)), "lif0": cuba(8, 1.5)}
    if pixels:
        first = {
            "conv": nir.Conv2d((6, 6), weights(rng, 3, 2, 3, 3) / 4, 1, (1, 1), 1, 1, weights(rng, 3) / 4),
            "lif0": cuba((3, 6, 6), 1.5),
            "pool": nir.SumPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])),
            "conv1": nir.Conv2d((3, 3), weights(rng, 4, 3, 3, 3) / 4, 1, (1, 1), 1, 1, weights(rng, 4) / 4),
            "lif1": cuba((4, 3, 3), 1.25),
            "flat": nir.Flatten({"input": np.array([4, 3, 3])}, 0, -1),
        }
    size = 36 if pixels else 8
    ends: dict[str, dict[str, Any]] = {
        "spikes": {"lif2": cuba(5, 1.0)},
        "membrane": {"li": nir.LI(filled(5, 4), filled(5, 4), filled(5, 0))},
        "current and membrane": {"li": nir.CubaLI(*(filled(5, value) for value in (2, 4, 4, 0, 2)))},
        "current": {},
    }
    nodes = {
        "input": nir.Input({"input": np.array(shape)}), **first,
        "fc": nir.Affine(weights(rng, 5, size) / 2, weights(rng, 5) / 2), **ends[last],
        "output": nir.Output({"output": np.array([5])}),
    }  # fmt: skip
    edges = list(zip(nodes, list(nodes)[1:], strict=False))
    nir.write(str(path), nir.NIRGraph(nodes, edges, type_check=False))
    return path


def network(path: Path, inputs: str) -> SpikingNetwork:
    conventions = Conventions(STEPS, 1.0, "zero", "above", "euler", "per-step", "decay", inputs)  # type: ignore[arg-type]
    return network_of(read_nir_graph(path), conventions)


@pytest.mark.parametrize("inputs", ["pixels", "spikes", "pixels over time"])
@pytest.mark.parametrize("last", ["spikes", "membrane", "current and membrane", "current"])
def test_integers_wide_enough_spike_as_what_was_read(last: str, inputs: str, tmp_path: Path) -> None:
    kind, _, timed = inputs.partition(" ")
    read = network(leaky_graph(tmp_path / "m.nir", last), kind)
    wide = map_wide(read)
    rng = np.random.default_rng(1)
    is_timed = bool(timed) or kind == "spikes"
    shape = (5, *([STEPS] if is_timed else []), 2, 6, 6)
    codes = rng.integers(0, read.graph.max_code + 1, shape).astype(np.uint8)
    trace = run_reference(wide, codes, state_limit=STATE_LIMIT)
    logits, recorded = read.double().record(read.images(codes).double())
    for name, layer in recorded.items():
        spikes = trace_spikes(trace, name)
        assert 0.02 < spikes.mean() < 0.98
        # Codes that are no short fractions of 255 are rounded; what they flip is next to nothing.
        assert (spikes != layer.spikes.numpy()).mean() < (0.002 if kind == "pixels" else 1e-12)
    if kind == "spikes":
        np.testing.assert_allclose(wide.logits(trace.readouts), logits.numpy(), atol=1e-4)


def trace_spikes(trace: Any, name: str) -> np.ndarray:
    spikes = trace.populations[name].spikes
    assert spikes is not None
    return spikes


@pytest.mark.parametrize("last", ["spikes", "membrane", "current and membrane"])
def test_a_bundle_of_a_leaky_graph_is_the_same_in_every_file(last: str, tmp_path: Path) -> None:
    path = leaky_graph(tmp_path / "m.nir", last)
    result = import_nir(path, "nir", tmp_path / "bundle", assumed=(*SAID, "input=pixels"))
    bundle = result.bundle
    assert {NIR_FILE, NIR_CUBA_FILE} <= set(bundle.manifest.files)
    assert all(row.equal for row in verify_bundle(bundle))
    (row,) = [row for row in result.rows if row.reference == READ]
    assert row.differing_spikes is not None
    assert row.differing_spikes < 0.02
    assert row.argmax_flips <= 5
    codes = result.samples.test[:4]
    twin = Twin(bundle.network)
    expected = bundle.network.logits(run_emulator(bundle.network, codes).readouts)
    np.testing.assert_array_equal(twin(torch.from_numpy(codes).float() / 255).numpy(), expected.astype(np.float32))
    leaks = {p.name: (p.current_decay, p.voltage_decay) for p in bundle.network.populations}
    assert leaks["lif0"] == (2048, 1024)
    always_on = trace_spikes(bundle.golden.trace, "lif0")[..., -36:]  # the channel that brings the next one's bias
    assert always_on.all()


def test_inputs_over_time_and_labels_from_a_file(tmp_path: Path) -> None:
    path, rng = leaky_graph(tmp_path / "m.nir", pixels=False), np.random.default_rng(3)
    images = rng.random((60, STEPS, 2, 2)) < 0.5  # any arrangement of a sample's axes
    labels = network(path, "spikes").record(torch.from_numpy(images.reshape(60, STEPS, 4)).float())[0].argmax(1).numpy()
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    said = (*SAID, "input=spikes")
    result = import_nir(path, "nir", tmp_path / "b", assumed=said, data=tmp_path / "data.npz")
    assert result.samples.test.shape == (30, STEPS, 4)
    read, deployed = result.rows[:2]
    assert (read.model, deployed.model) == (READ, INTEGERS)
    assert read.accuracy is not None
    assert read.accuracy[0] == 1.0
    assert deployed.accuracy is not None
    assert deployed.accuracy[0] == 1 - deployed.argmax_flips / 30
    assert result.bound is not None
    assert -0.5 < result.bound < 0
    assert "accuracy falls by at most" in conclusion(result)[1]
    assert comparison_table(result).rows[0][0] == READ


def test_labelled_pixels_leave_a_bundle_whose_test_images_a_fidelity_check_finds(tmp_path: Path) -> None:
    path, rng = leaky_graph(tmp_path / "m.nir"), np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (60, 2, 6, 6)).astype(np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    result = import_nir(path, "nir", tmp_path / "b", assumed=(*SAID, "input=pixels"), data=tmp_path / "data.npz")
    provenance = result.bundle.manifest.provenance
    config = override_config(provenance["config"], (f"data.path={tmp_path / 'data.npz'}",), "bundle")
    require_same_test_split(result.bundle, Run(config, tmp_path, "").data.test)
    assert (result.samples.test == Run(config, tmp_path, "").data.test.codes).all()
    assert "spikeguard fidelity" in conclusion(result)[1]


def test_files_that_cannot_hold_the_network_are_left_out_or_all_refused(tmp_path: Path) -> None:
    path = leaky_graph(tmp_path / "m.nir", pixels=False)
    subtracting = (*SAID, "reset=subtract", "input=spikes")
    with pytest.raises(RuleViolations, match="files for loihi"):
        import_nir(path, "loihi", tmp_path / "b", assumed=subtracting)
    assert not (tmp_path / "b").exists()
    result = import_nir(path, "onnx", tmp_path / "b", assumed=subtracting)
    assert set(result.left_out) == {ONNX_FILE, ONNX_INT8_FILE}  # which take one image per sample
    rows = verify_bundle(result.bundle)
    assert {row.file for row in rows} == {"network.json", ONNX_STEP_FILE, ONNX_FLOAT_FILE}
    assert all(row.equal for row in rows)


def test_a_file_of_our_own_says_all_and_stays_as_it_is(tmp_path: Path) -> None:
    mine = random_network(np.random.default_rng(3), kind="dense", hidden=2)
    write_nir(mine, tmp_path / "m.nir", "cuba", allow_deviations=True)
    result = import_nir(tmp_path / "m.nir", "all", tmp_path / "b")
    assert same_network(replace(result.bundle.network, provenance=mine.provenance), mine)
    assert {NIR_FILE, ONNX_FILE} <= set(result.bundle.manifest.files)
    for said in ({"written_by": "norse"}, {"assumed": ("steps=3",)}, {"bits": 4}):
        with pytest.raises(SpikeguardError, match="written by this project"):
            import_nir(tmp_path / "m.nir", "all", tmp_path / "other", **said)  # type: ignore[arg-type]


def test_the_command_asks_for_all_that_nir_leaves_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = leaky_graph(tmp_path / "m.nir")
    for arguments in (["--written-by", "snntorch"], ["--assume", "steps=6"]):
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(path), "--out", str(tmp_path / "b"), *arguments])
        assert stopped.value.code == 1
        told = capsys.readouterr().err
        assert "what NIR leaves open" in told
        assert ("steps" in told) == (arguments[0] == "--written-by")
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(path), "--written-by", "nobody"])
    assert stopped.value.code == 2
    assert "norse" in capsys.readouterr().err
    for refused in (["--written-by", "norse"], ["--bits", "4"], ["--name", "mine"]):
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(tmp_path), *refused])
        assert stopped.value.code == 2
        assert refused[0] in capsys.readouterr().err


def test_the_command_shows_what_became_of_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = leaky_graph(tmp_path / "m.nir")
    said = [part for entry in (*SAID, "input=pixels") for part in ("--assume", entry)]
    main_or_exit(["export", str(path), "--target", "nir", "--out", str(tmp_path / "b"), *said])
    told = capsys.readouterr().out
    assert "float graph" in told
    assert "integer network" in told
    assert "OK" in told


def main_or_exit(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0


@pytest.mark.parametrize(
    ("arrays", "rule"),
    [
        ({"images": np.zeros((4, 3), np.uint8)}, "samples fit the network"),
        ({"images": np.zeros((1, 72), np.uint8)}, "samples fit the network"),
        ({"images": np.full((4, 72), -1)}, "values are codes"),
        ({"images": np.full((4, 72), 256)}, "values are codes"),
        ({"images": np.full((4, 72), 1.5)}, "values are codes"),
        ({"images": np.full((4, 72), np.nan)}, "values are codes"),
        ({"images": np.full((4, 72), "a")}, "values are codes"),
        ({"images": np.zeros((4, 72), np.uint8), "labels": np.zeros(3, int)}, "one integer per sample"),
        ({"images": np.zeros((4, 72), np.uint8), "labels": np.zeros(4)}, "one integer per sample"),
    ],
)
def test_data_of_another_kind_are_refused(arrays: dict[str, Any], rule: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    path = leaky_graph(tmp_path / "m.nir")
    with pytest.raises(RuleViolations, match=rule):
        import_nir(path, "nir", tmp_path / "b", assumed=(*SAID, "input=pixels"), data=tmp_path / "data.npz")
    np.savez(tmp_path / "data.npz", labels=np.zeros(4, int))
    with pytest.raises(SpikeguardError, match="holds no array 'images'"):
        import_nir(path, "nir", tmp_path / "b", assumed=(*SAID, "input=pixels"), data=tmp_path / "data.npz")


@pytest.mark.lava
@pytest.mark.parametrize(("last", "pixels"), [("spikes", True), ("current and membrane", False)])
def test_lava_and_netx_run_a_leaky_graph_exactly(last: str, pixels: bool, tmp_path: Path) -> None:
    path = leaky_graph(tmp_path / "m.nir", last, pixels=pixels)
    said = (*SAID, f"input={'pixels' if pixels else 'spikes'}")
    result = import_nir(path, "loihi", tmp_path / "b", assumed=said)
    assert {NIR_FILE, NETX_FILE} <= set(result.bundle.manifest.files)
    assert {row.model: row.mismatched for row in result.rows if row.mismatched} == {
        "lava": (0, 0, 0),
        "netx": (0, 0, 0),
    }
    assert conclusion(result)[0]
