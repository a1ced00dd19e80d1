from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hardware.errors import RuleViolations, SpikeguardError
from hardware.files import write_bytes
from pipeline.models.float_file import float_files, load_float, load_rate
from tests.pipeline.samples import NETWORKS, rate_network, spiking_network


def saved(folder: Path, name: str = "conv") -> Path:
    for network in (spiking_network(name), rate_network(name)):
        for file, content in float_files(network).items():
            write_bytes(folder / file, content)
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    saved(tmp_path, name)
    for before, after in ((spiking_network(name), load_float(tmp_path)), (rate_network(name), load_rate(tmp_path))):
        assert after.graph == before.graph
        assert not after.training
        state = after.state_dict()
        assert list(state) == list(before.state_dict())
        assert all(torch.equal(state[key], value) for key, value in before.state_dict().items())
        images = torch.rand(3, *before.graph.input_shape)
        assert torch.equal(after(images), before(images))
    assert load_float(tmp_path).steps == 5


def test_the_same_network_gives_the_same_bytes() -> None:
    assert float_files(spiking_network()) == float_files(spiking_network())
    assert sorted(float_files(spiking_network())) == ["snn.json", "snn.safetensors"]
    assert sorted(float_files(rate_network())) == ["ann.json", "ann.safetensors"]


Parameters = dict[str, torch.Tensor]


def without_bias(parameters: Parameters) -> None:
    del parameters["layers.conv1.bias"]


def with_more(parameters: Parameters) -> None:
    parameters["layers.conv9.weight"] = torch.zeros(3)


def reshaped(parameters: Parameters) -> None:
    parameters["layers.conv1.weight"] = parameters["layers.conv1.weight"][:2].contiguous()


def not_a_number(parameters: Parameters) -> None:
    parameters["layers.linear1.weight"][0, 0] = torch.nan


def infinite_threshold(parameters: Parameters) -> None:
    parameters["layers.neurons2.threshold"].fill_(torch.inf)


def complex_weight(parameters: Parameters) -> None:
    parameters["layers.conv1.weight"] = parameters["layers.conv1.weight"].to(torch.complex64)


def negative_variance(parameters: Parameters) -> None:
    parameters["layers.batch_norm1.running_var"][0] = -1.0


def zero_std(parameters: Parameters) -> None:
    parameters["layers.normalize1.std"].zero_()


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (without_bias, "layers.conv1.bias"),
        (with_more, "layers.conv9.weight"),
        (reshaped, "layers.conv1.weight"),
        (not_a_number, "layers.linear1.weight"),
        (infinite_threshold, "layers.neurons2.threshold"),
        (complex_weight, "layers.conv1.weight"),
        (negative_variance, "layers.batch_norm1.running_var"),
        (zero_std, "layers.normalize1.std"),
    ],
)
def test_spoiled_parameters_are_refused_by_name(
    tmp_path: Path, spoil: Callable[[Parameters], None], culprit: str
) -> None:
    path = saved(tmp_path) / "snn.safetensors"
    parameters = safetensors.torch.load_file(path)
    spoil(parameters)
    safetensors.torch.save_file(parameters, path)
    with pytest.raises(RuleViolations) as caught:
        load_float(tmp_path)
    assert [row.object for row in caught.value.violations] == [culprit]


def test_all_spoiled_parameters_are_told_at_once(tmp_path: Path) -> None:
    path = saved(tmp_path) / "snn.safetensors"
    parameters = safetensors.torch.load_file(path)
    for spoil in (without_bias, with_more, reshaped, not_a_number, infinite_threshold):
        spoil(parameters)
    safetensors.torch.save_file(parameters, path)
    with pytest.raises(RuleViolations) as caught:
        load_float(tmp_path)
    assert len(caught.value.violations) == 5


def edit(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(graph: dict[str, Any]) -> None:
        *path, last = key.split(".")
        place: Any = graph
        for part in path:
            place = place[int(part) if part.isdigit() else part]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return apply


@pytest.mark.parametrize(
    "change",
    [
        edit("format", "spikeguard.float/1"),
        edit("format", None),
        edit("steps", 0),
        edit("steps", -3),
        edit("steps", "8"),
        edit("steps", 10**9),
        edit("extra", 1),
        edit("input_shape", [1, 8]),
        edit("input_shape", [1, -8, 8]),
        edit("input_shape", [3, 8, 8]),
        edit("layers", []),
        edit("layers.1.kind", "max_pool"),
        edit("layers.1.kind", "linear"),
        edit("layers.1.options.stride", 0),
        edit("layers.1.options.stride", None),
        edit("layers.1.options.kernel_size", 2**31),
        edit("layers.1.options.kernel_size", 2.5),
        edit("layers.1.options.out_channels", 2**40),
        edit("layers.1.options.colour", 3),
        edit("layers.2.options.eps", -1.0),
        edit("layers.2.options.eps", None),
        edit("layers.1.name", "forward"),
        edit("layers.1.name", "a.b"),
        edit("layers.1.options", {}),
    ],
)
def test_a_spoiled_graph_is_one_error(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = saved(tmp_path) / "snn.json"
    graph = json.loads(path.read_text())
    change(graph)
    path.write_text(json.dumps(graph))
    with pytest.raises(SpikeguardError):
        load_float(tmp_path)


def test_files_that_are_missing_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(SpikeguardError, match=r"snn\.json does not exist"):
        load_float(tmp_path)
    saved(tmp_path)
    (tmp_path / "snn.safetensors").write_bytes((tmp_path / "snn.safetensors").read_bytes()[:-8])
    with pytest.raises(SpikeguardError, match=r"snn\.safetensors is not a safetensors file"):
        load_float(tmp_path)
    (tmp_path / "snn.json").write_text("{")
    with pytest.raises(SpikeguardError, match=r"snn\.json is not"):
        load_float(tmp_path)


def test_an_ann_is_no_snn(tmp_path: Path) -> None:
    saved(tmp_path)
    for suffix in ("json", "safetensors"):
        (tmp_path / f"snn.{suffix}").write_bytes((tmp_path / f"ann.{suffix}").read_bytes())
    with pytest.raises(SpikeguardError, match="no time steps"):
        load_float(tmp_path)
