"""Other frameworks read the exported files on their own, and find every spike and membrane value where we do."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from exporters.bundle import MODEL_FILES, write_bundle
from exporters.conformance.nir_reader import NirReader, read_result
from exporters.conformance.norse_reader import require_order
from exporters.conformance.rows import READERS, ConformanceRow, Outcome, Reader, conformance_rows, framework
from exporters.conformance.snntorch_reader import SNNTORCH
from exporters.nir import write_nir
from hardware.errors import RuleViolations, SpikeguardError
from hardware.formats.bundle import (
    NETX_FILE,
    NIR_CUBA_FILE,
    NIR_FILE,
    ONNX_FILE,
    ONNX_FLOAT_FILE,
    ONNX_INT8_FILE,
    ONNX_STEP_FILE,
    Bundle,
    Golden,
    open_bundle,
)
from hardware.network import STATE_LIMIT, InputSpec, IntegerNetwork, Population, Synapse
from hardware.planted.networks import with_population
from hardware.reference import run_reference
from hardware.targets.lava import LAVA, NETX
from hardware.targets.rules import Target, check
from hardware.trace import Trace, compare_traces
from tests.networks import SUM_LIMIT, random_codes, random_network

FRAMEWORKS = ("norse", "spikingjelly", "snntorch")


def bundle_of(folder: Path, network: IntegerNetwork, models: Collection[str]) -> Bundle:
    codes = random_codes(np.random.default_rng(1), network, 3)
    write_bundle(folder, network, golden_codes=codes, float_model_files={}, provenance={}, models=models)
    return open_bundle(folder)


def chain(**options: int) -> IntegerNetwork:
    network = random_network(np.random.default_rng(0), constant_channels=1, hidden=3, steps=4, **options)
    assert network.is_chain()
    assert {synapse.kind for synapse in network.synapses} == {"conv", "dense"}
    return network


def residual() -> IntegerNetwork:
    network = random_network(np.random.default_rng(0), dag=True, constant_channels=1, hidden=3, steps=4)
    assert not network.is_chain()
    assert len(network.incoming(network.readout.name)) > 1
    return network


def rows_of(bundle: Bundle, *names: str, file: str | None = None, **options: int) -> list[ConformanceRow]:
    """Rows of the readers of these names, of one file or all."""
    chosen = [reader for reader in READERS if reader.name in names and file in (None, reader.file)]
    return list(conformance_rows(bundle, readers=chosen, **{"processes": 1, **options}))


def counts(row: ConformanceRow) -> tuple[int | None, int | None, int | None]:
    return row.mismatched_spikes, row.mismatched_membranes, row.mismatched_readouts


def test_every_reader_runs_a_chain_exactly_and_finds_exactly_what_a_planted_error_changes(tmp_path: Path) -> None:
    network = chain()
    bundle = bundle_of(tmp_path / "bundle", network, (NIR_FILE, NIR_CUBA_FILE))
    spikes = [p.spikes for p in bundle.golden.trace.populations.values() if p.spikes is not None]
    assert all(part.any() and not part.all() for part in spikes)
    first = network.populations[0]
    wrong = with_population(network, first.name, threshold=first.threshold // 2)
    write_nir(wrong, bundle.path / NIR_CUBA_FILE, "cuba")
    planted = compare_traces(bundle.golden.trace, run_reference(wrong, bundle.golden.codes))
    assert planted.spikes

    rows = rows_of(bundle, "own interpreter", *FRAMEWORKS)
    assert [(row.file, row.reader) for row in rows] == [
        (NIR_FILE, "own interpreter"),
        (NIR_FILE, "norse"),
        (NIR_FILE, "spikingjelly"),
        (NIR_CUBA_FILE, "own interpreter"),
        (NIR_CUBA_FILE, "norse"),
        (NIR_CUBA_FILE, "spikingjelly"),
        (NIR_CUBA_FILE, "snntorch"),
    ]
    for row in rows:
        assert row.version
        assert not row.reason
        exact = row.file == NIR_FILE
        assert row.outcome is (Outcome.EQUAL if exact else Outcome.DIFFERS)
        assert counts(row) == ((0, 0, 0) if exact else (planted.spikes, planted.membranes, planted.readouts))


def test_branches_that_meet_again_are_exact_or_refused_with_the_reason(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", residual(), set(MODEL_FILES) - {NETX_FILE})
    rows = {row.reader: row for row in rows_of(bundle, *FRAMEWORKS, file=NIR_CUBA_FILE)}
    for name in ("spikingjelly", "snntorch"):
        assert (rows[name].outcome, counts(rows[name])) == (Outcome.EQUAL, (0, 0, 0))
    others = [rows["norse"], *rows_of(bundle, "netx")]
    assert [row.outcome for row in others] == [Outcome.REFUSED] * 2
    assert all(counts(row) == (None, None, None) and row.version is None for row in others)
    norse, netx = (row.reason for row in others)
    assert "what feeds a node runs before it" in norse
    assert "form a chain" in netx  # in no bundle, because its writer refuses the network


def test_onnx_runtime_and_our_own_interpreter_need_no_other_process(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", residual(), set(MODEL_FILES) - {NETX_FILE})
    rows = rows_of(bundle, "own interpreter", "onnxruntime", samples=2, processes=5)
    *rows, trained = rows
    assert [row.file for row in rows] == [NIR_FILE, NIR_CUBA_FILE, ONNX_FILE, ONNX_STEP_FILE, ONNX_INT8_FILE]
    assert all((row.outcome, row.samples, row.processes) == (Outcome.EQUAL, 2, 1) for row in rows)
    assert [counts(row) for row in rows] == [(0, 0, 0), (0, 0, 0), (None, None, 0), (0, 0, 0), (None, None, 0)]
    assert (trained.file, trained.outcome) == (ONNX_FLOAT_FILE, Outcome.MISSING)
    assert "one that holds the float SNN" in trained.reason


def test_membranes_that_saturate_are_told_and_held_against_those_without_a_limit(tmp_path: Path) -> None:
    bias = {"first": -SUM_LIMIT * 2, "readout": 0}
    populations = tuple(
        Population(name, (1,), 10, np.array([b], np.int64), 1.0, spiking=b != 0) for name, b in bias.items()
    )
    one = np.ones((1, 1), np.int32)
    synapses = (Synapse("input", "first", "dense", one, 8), Synapse("first", "readout", "dense", one, 8))
    network = IntegerNetwork(InputSpec((1,)), populations, synapses, 6)
    bundle = bundle_of(tmp_path / "bundle", network, (NIR_FILE,))
    membranes = bundle.golden.trace.populations["first"].membranes
    assert membranes is not None
    clipped = int((membranes == -STATE_LIMIT).sum())
    assert clipped
    (interpreter,) = rows_of(bundle, "own interpreter", file=NIR_FILE)
    assert (interpreter.outcome, interpreter.clipped_membranes) == (Outcome.EQUAL, 0)

    def unlimited(bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
        return run_reference(bundle.network, golden.codes, state_limit=2**31 - 1), "1"

    pair = [Reader(NIR_FILE, "wide", unlimited, is_framework=is_framework) for is_framework in (True, False)]
    wide, chip = conformance_rows(bundle, processes=1, readers=pair)
    assert (wide.outcome, wide.clipped_membranes, counts(wide)) == (Outcome.EQUAL, clipped, (0, 0, 0))
    assert (chip.outcome, chip.clipped_membranes, chip.mismatched_spikes) == (Outcome.DIFFERS, 0, 0)
    assert chip.mismatched_membranes


def test_readers_that_decay_in_floating_point_are_shown_how_far_they_deviate(tmp_path: Path) -> None:
    # After six steps the membrane, truncated at each, is 637 / 64; without truncation it is above the threshold.
    one, two = np.ones((1, 1), np.int32), np.full((1, 1), 2, np.int32)
    populations = (
        Population("first", (1,), 10, np.zeros(1, np.int64), 1.0, voltage_decay=300),
        Population("readout", (1,), 0, np.zeros(1, np.int64), 1.0, spiking=False),
    )
    synapses = (Synapse("input", "first", "dense", two, 8), Synapse("first", "readout", "dense", one, 8))
    network = IntegerNetwork(InputSpec((1,), max_code=1), populations, synapses, 6)
    codes = np.array([[0], [1]], np.uint8)
    folder = tmp_path / "bundle"
    write_bundle(
        folder, network, golden_codes=codes, float_model_files={}, provenance={}, models=(NIR_FILE, NIR_CUBA_FILE)
    )
    for row in rows_of(open_bundle(folder), "own interpreter", *FRAMEWORKS):
        own = row.reader == "own interpreter"
        assert (row.outcome, row.reason) == (Outcome.EQUAL if own else Outcome.DEVIATES, "")
        assert counts(row) == ((0, 0, 0) if own else (1, None, 1))


def on_lava(target: Target, *, leaky: bool, dag: bool = False) -> IntegerNetwork:
    """A random network that breaks no rule of a target; if it leaks, without biases, which NIR cannot hold then."""
    rng = np.random.default_rng(3)
    while check(network := random_network(rng, kind="dense", hidden=3, steps=3, leaky=leaky, dag=dag), target):
        pass
    if not leaky:
        return network
    return replace(network, populations=tuple(replace(p, bias=np.zeros_like(p.bias)) for p in network.populations))


@pytest.mark.lava
@pytest.mark.parametrize("leaky", [False, True])
def test_lava_and_netx_are_rows_as_well(leaky: bool, tmp_path: Path) -> None:
    network = on_lava(NETX, leaky=leaky)
    rows = rows_of(bundle_of(tmp_path / "bundle", network, (NIR_FILE, NETX_FILE)), "lava", "netx")
    assert [(row.file, row.outcome, counts(row)) for row in rows] == [
        (NIR_FILE, Outcome.EQUAL, (0, 0, 0)),
        (NETX_FILE, Outcome.EQUAL, (0, 0, 0)),
    ]
    assert all(row.version and "lava-nc" in row.version for row in rows)


@pytest.mark.lava
def test_branches_that_meet_again_are_exact_on_lava(tmp_path: Path) -> None:
    network = on_lava(LAVA, dag=True, leaky=True)
    assert not network.is_chain()
    (row,) = rows_of(bundle_of(tmp_path / "bundle", network, (NIR_FILE,)), "lava")
    assert (row.outcome, counts(row)) == (Outcome.EQUAL, (0, 0, 0))


def test_differences_are_added_up_over_all_processes(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "bundle", chain(), (NIR_FILE,))
    started = []

    def second_is_wrong(_bundle: Bundle, golden: Golden) -> tuple[Trace, str]:
        started.append(golden)
        off = len(started) - 1
        return Trace(golden.trace.readouts + off, golden.trace.populations), "1"

    (row,) = conformance_rows(
        bundle, processes=3, readers=[Reader(NIR_FILE, "odd", second_is_wrong, is_framework=True)]
    )
    assert len(started) == row.processes == 3
    assert (row.outcome, counts(row)) == (Outcome.DIFFERS, (0, 0, 2 * bundle.golden.trace.readouts.size))


def test_a_reader_that_is_missing_or_fails_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(tmp_path / "bundle", chain(), (NIR_CUBA_FILE,))
    monkeypatch.setenv("SPIKEGUARD_LAVA_PYTHON", "/nowhere/python")
    with h5py.File(bundle.path / NIR_CUBA_FILE, "w") as file:
        file["version"] = "no graph"
    (interpreter,) = rows_of(bundle, "own interpreter", file=NIR_CUBA_FILE)
    assert interpreter.outcome is Outcome.FAILED
    assert "not a well-formed NIR graph" in interpreter.reason
    failing, absent = (
        framework(NirReader(name, "exporters.conformance.none"), NIR_CUBA_FILE) for name in ("nir", "no_such_framework")
    )
    failed, lacking = conformance_rows(bundle, readers=[failing, absent])
    assert (failed.outcome, failed.version) == (Outcome.FAILED, None)
    assert "nir failed with exit status 1" in failed.reason
    assert (lacking.outcome, lacking.version) == (Outcome.MISSING, None)
    assert "no_such_framework is not installed" in lacking.reason
    assert [(row.outcome, row.reason) for row in rows_of(bundle, "norse", "lava", file=NIR_FILE)] == [
        (Outcome.MISSING, f"the bundle has no {NIR_FILE}; export it again with --target all")
    ] * 2
    (lava,) = rows_of(bundle_of(tmp_path / "other", chain(), (NIR_FILE,)), "lava")
    assert lava.outcome is Outcome.MISSING
    assert "no Lava environment at /nowhere/python" in lava.reason


def test_a_file_that_links_elsewhere_reaches_no_framework(tmp_path: Path) -> None:
    network = chain()
    path = tmp_path / NIR_CUBA_FILE
    with h5py.File(path, "w") as file:
        file["node"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises(SpikeguardError, match="link"):
        SNNTORCH.run(path, network, random_codes(np.random.default_rng(0), network))


class TestResults:
    """What a framework may hand back."""

    @staticmethod
    def arrays(network: IntegerNetwork) -> dict[str, np.ndarray]:
        spiking = [p for p in network.populations if p.spiking]
        arrays = {f"{kind}.{p.name}": np.zeros((2, 4, *p.shape)) for p in spiking for kind in ("spikes", "membranes")}
        return arrays | {"readouts": np.ones((2, 4, network.classes))}

    def test_values_of_the_right_shape_are_a_trace(self) -> None:
        network = chain()
        trace = read_result("it", network, self.arrays(network))
        assert trace.readouts.tolist() == [[4] * network.classes] * 2
        assert set(trace.populations) == {p.name for p in network.populations if p.spiking}

    @pytest.mark.parametrize("kind", ["spikes", "membranes"])
    def test_another_shape_is_refused_even_of_the_same_size(self, kind: str) -> None:
        network = chain()
        arrays, name = self.arrays(network), f"{kind}.{network.populations[0].name}"
        arrays[name] = arrays[name].reshape(2, 4, -1)
        with pytest.raises(SpikeguardError, match=rf"it gave {name} of shape"):
            read_result("it", network, arrays)

    @pytest.mark.parametrize(
        ("kind", "value", "message"),
        [
            ("membranes", 0.5, "no integers"),
            ("membranes", np.nan, "no integers"),
            ("spikes", 2.0, "neither 0 nor 1"),
            ("spikes", 0.5, "no integers"),
        ],
    )
    def test_values_that_are_no_integers_or_spikes_are_refused(self, kind: str, value: float, message: str) -> None:
        network = chain()
        arrays = self.arrays(network)
        arrays[f"{kind}.{network.populations[0].name}"].flat[-1] = value
        with pytest.raises(SpikeguardError, match=message):
            read_result("it", network, arrays)


def test_an_order_in_which_a_node_runs_before_what_feeds_it_is_refused() -> None:
    edges = [("input", "a"), ("input", "b"), ("a", "sum"), ("b", "sum")]
    require_order(["input", "a", "b", "sum"], edges)
    with pytest.raises(RuleViolations) as caught:
        require_order(["input", "a", "sum", "b"], edges)
    assert [(row.object, row.actual) for row in caught.value.violations] == [("sum", "b after it")]
