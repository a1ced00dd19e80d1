"""NIR files of other software: read into one flat graph, or refused with what is wrong, whatever was done to them."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardware.errors import RuleViolations, SpikeguardError
from hardware.formats.nir_graph import KINDS, NirFile, read_nir_graph

ONES = np.ones(3, np.float32)


def neurons(size: int = 3) -> Any:
    values = np.ones(size, np.float32)
    return nir.LIF(tau=values, r=values, v_leak=0 * values, v_threshold=values, v_reset=0 * values)


def chain() -> dict[str, Any]:
    return {
        "input": nir.Input({"input": np.array([1, 4, 4])}),
        "conv": nir.Conv2d((4, 4), np.ones((2, 1, 3, 3), np.float32), 1, (1, 1), 1, 1, np.zeros(2, np.float32)),
        "lif1": nir.IF(*(np.ones((2, 4, 4), np.float32) for _ in range(2))),
        "pool": nir.SumPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])),
        "flat": nir.Flatten({"input": np.array([2, 2, 2])}, 0, -1),
        "fc": nir.Affine(np.ones((3, 8), np.float32), np.zeros(3, np.float32)),
        "lif2": neurons(),
        "output": nir.Output({"output": np.array([3])}),
    }


def edges_of(names: list[str]) -> list[tuple[str, str]]:
    return list(pairwise(names))


def write(path: Path, nodes: dict[str, Any], edges: list[tuple[str, str]] | None = None, **metadata: Any) -> Path:
    graph = nir.NIRGraph(nodes, edges_of(list(nodes)) if edges is None else edges, metadata, type_check=False)
    nir.write(str(path), graph)
    return path


def refusals(path: Path) -> dict[tuple[str, str], str]:
    with pytest.raises(RuleViolations) as caught:
        read_nir_graph(path)
    return {(row.object, row.rule): row.actual for row in caught.value.violations}


def test_a_graph_comes_in_order_with_its_parameters(tmp_path: Path) -> None:
    file = read_nir_graph(write(tmp_path / "m.nir", chain(), dt=1e-4, made="by hand"))
    assert file.input_shape == (1, 4, 4)
    assert [node.kind for node in file.nodes] == [
        "Input", "Conv2d", "IF", "SumPool2d", "Flatten", "Affine", "LIF", "Output",
    ]  # fmt: skip
    assert [node.sources for node in file.nodes] == [(), *((node.name,) for node in file.nodes[:-1])]
    conv = file.nodes[1].numbers
    assert {key: np.asarray(value).tolist() for key, value in conv.items() if key not in ("weight", "bias")} == {
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": [1],
    }
    assert conv["weight"].dtype == np.float64
    assert file.metadata == {"dt": 1e-4, "made": "by hand"}


def test_subgraphs_are_inlined_and_what_leads_nowhere_is_left_out(tmp_path: Path) -> None:
    inner = nir.NIRGraph(
        {"in": nir.Input({"input": np.array([3])}), "lif": neurons(), "out": nir.Output({"output": np.array([3])})},
        [("in", "lif"), ("lif", "out")],
        type_check=False,
    )
    nodes = {
        "input": nir.Input({"input": np.array([3])}),
        "block": inner,
        "aside": nir.Linear(np.ones((2, 3), np.float32)),
        "output": nir.Output({"output": np.array([3])}),
    }
    edges = [("input", "block"), ("block", "output"), ("block", "aside")]
    file = read_nir_graph(write(tmp_path / "m.nir", nodes, edges))
    assert [(node.name, node.sources) for node in file.nodes] == [
        ("input", ()),
        ("block.in", ("input",)),
        ("block.lif", ("block.in",)),
        ("block.out", ("block.lif",)),
        ("output", ("block.out",)),
    ]


def test_recurrent_edges_are_refused_by_name(tmp_path: Path) -> None:
    nodes = {
        "input": nir.Input({"input": np.array([3])}),
        "lif": neurons(),
        "back": nir.Linear(np.eye(3, dtype=np.float32)),
        "output": nir.Output({"output": np.array([3])}),
    }
    edges = [("input", "lif"), ("lif", "back"), ("back", "lif"), ("lif", "output")]
    found = refusals(write(tmp_path / "m.nir", nodes, edges))
    ((where, rule), actual) = next(iter(found.items()))
    assert (rule, actual) == ("edges form no cycle", "recurrent")
    assert {"lif", "back"} == set(where.split(" -> "))


def test_everything_wrong_with_nodes_and_edges_is_named_at_once(tmp_path: Path) -> None:
    nodes = chain() | {"delay": nir.Delay(ONES), "threshold": nir.Threshold(ONES)}
    edges = [*edges_of(list(chain())), ("lif2", "delay"), ("threshold", "nowhere")]
    found = refusals(write(tmp_path / "m.nir", nodes, edges))
    assert found == {
        ("delay", "node is known"): "Delay",
        ("threshold", "node is known"): "Threshold",
        ("threshold->nowhere", "edge joins nodes"): "nowhere",
    }


def test_everything_wrong_with_parameters_is_named_at_once(tmp_path: Path) -> None:
    nodes = chain()
    nodes["fc"].weight[0, 0] = np.nan
    nodes["lif2"].tau = np.array([1, np.inf, 1], np.float32)
    nodes["conv"].groups = 0
    nodes["pool"].kernel_size = np.array([2.5, 2])
    found = refusals(write(tmp_path / "m.nir", nodes))
    assert set(found) == {
        ("fc", "weight is finite"),
        ("lif2", "tau is finite"),
        ("conv", "groups is whole"),
        ("pool", "kernel_size is whole"),
    }


@pytest.mark.parametrize("shape", [[], [0, 3], [2**20, 2**20], [2, 2, 2, 2], [-1]])
def test_an_input_without_a_sane_shape_is_refused(tmp_path: Path, shape: list[int]) -> None:
    nodes = chain()
    nodes["input"].input_type = {"input": np.array(shape, np.int64)}
    assert ("input", "input has 1 to 3 axes") in refusals(write(tmp_path / "m.nir", nodes))


def test_a_batch_axis_of_the_input_is_dropped(tmp_path: Path) -> None:
    nodes = chain()
    nodes["input"].input_type = {"input": np.array([1, 1, 4, 4])}
    assert read_nir_graph(write(tmp_path / "m.nir", nodes)).input_shape == (1, 4, 4)


@pytest.mark.parametrize("ends", [("input",), ("output",), ("input", "output")])
def test_a_graph_has_one_input_and_one_output(tmp_path: Path, ends: tuple[str, ...]) -> None:
    nodes = {name: node for name, node in chain().items() if name not in ends}
    found = refusals(write(tmp_path / "m.nir", nodes))
    assert {rule for _, rule in found} == {f"has one {name}" for name in ends}


def _declare(file: h5py.File) -> None:
    group = file["node/nodes/fc"]
    del group["weight"]
    group.create_dataset("weight", (2**14, 2**14), "f4")


def _declare_compressed(file: h5py.File) -> None:
    group = file["node/nodes/fc"]
    del group["weight"]
    group.create_dataset("weight", (2**14, 2**14), "f4", chunks=(2**10, 2**10), compression="gzip")


@pytest.mark.parametrize("edit", [_declare, _declare_compressed])
def test_a_gibibyte_that_is_declared_and_not_stored_is_refused(
    tmp_path: Path, edit: Callable[[h5py.File], None]
) -> None:
    path = write(tmp_path / "m.nir", chain())
    with h5py.File(path, "r+") as file:
        edit(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert ("/node/nodes/fc/weight", "what is declared is stored") in refusals(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_zeros_that_compress_well_are_read(tmp_path: Path) -> None:
    nodes = chain()
    nodes["fc"].weight = np.zeros((3000, 1000), np.float32)
    path = tmp_path / "m.nir"
    nir.write(str(path), nir.NIRGraph(nodes, edges_of(list(nodes)), type_check=False), compression="gzip")
    assert read_nir_graph(path).nodes[5].numbers["weight"].shape == (3000, 1000)


def reads_or_refuses(path: Path) -> NirFile | None:
    """The file read, or None if it was refused in words; anything else that is raised fails the test."""
    try:
        return read_nir_graph(path)
    except SpikeguardError:
        return None


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("nir") / "sound.nir", chain(), dt=1e-4)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32 - 1), flips=st.integers(1, 40))
def test_flipped_bytes_are_read_or_refused_in_words(sound: Path, tmp_path: Path, seed: int, flips: int) -> None:
    content, rng = bytearray(sound.read_bytes()), random.Random(seed)
    for _ in range(flips):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path = tmp_path / "flipped.nir"
    path.write_bytes(content)
    reads_or_refuses(path)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, 40_000))
def test_files_that_end_early_are_read_or_refused_in_words(sound: Path, tmp_path: Path, length: int) -> None:
    path = tmp_path / "short.nir"
    path.write_bytes(sound.read_bytes()[:length])
    reads_or_refuses(path)


ODD_VALUES: list[Any] = [
    np.array([]), np.array(np.nan), np.array(-1), np.array(2**62), np.zeros((0, 3)), np.ones((1, 1, 1, 1, 1)),
    np.array([True]), "text", "", np.full(3, np.inf), np.array([1e308, -1e308, 0]), np.arange(7),
    np.array([2**31, 2**31]), np.float32(0.5),
]  # fmt: skip


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32 - 1))
def test_odd_values_missing_fields_and_swapped_kinds_are_read_or_refused_in_words(
    sound: Path, tmp_path: Path, seed: int
) -> None:
    rng, path = random.Random(seed), tmp_path / "odd.nir"
    shutil.copy(sound, path)
    with h5py.File(path, "r+") as file:
        for _ in range(rng.randint(1, 3)):
            group = file["node/nodes"][rng.choice(sorted(file["node/nodes"]))]
            field = rng.choice(sorted(group))
            del group[field]
            action = rng.randrange(3)
            if field == "type":
                group[field] = rng.choice([*KINDS, "Threshold", "Delay", "NIRGraph", "CubaLI", "I"])
            elif action:
                group[field] = rng.choice(ODD_VALUES)
        if rng.random() < 0.2:
            names = sorted(file["node/nodes"])
            del file["node/edges"]
            file["node/edges"] = [[rng.choice(names).encode() for _ in range(2)] for _ in range(rng.randint(0, 9))]
    read = reads_or_refuses(path)
    if read is not None:
        assert all(np.isfinite(v).all() for n in read.nodes for v in n.numbers.values() if not isinstance(v, str))
