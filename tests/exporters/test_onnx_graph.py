"""What all ONNX graphs share: unique names, and nothing in the file that leads to no output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters.onnx import write_onnx, write_step_onnx
from exporters.onnx_int8 import write_int8_onnx
from tests.networks import random_network


@pytest.mark.parametrize("write", [write_onnx, write_step_onnx, write_int8_onnx])
@pytest.mark.parametrize("steps", [1, 3])
def test_everything_in_a_graph_is_used_and_named_once(write, steps: int, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write(random_network(np.random.default_rng(4), steps=steps, constant_channels=1), tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    used = {name for node in graph.node for name in node.input} | {port.name for port in graph.output}
    made = [name for node in graph.node for name in node.output]
    assert len(made) == len(set(made))
    assert set(made) <= used
    assert {tensor.name for tensor in graph.initializer} <= used
