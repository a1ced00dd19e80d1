"""One interface for what gives gradients and for what only answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporters.onnx import write_onnx
from hardware.runtimes.onnxruntime import OnnxRuntime
from pipeline.attacks.black_box import square
from pipeline.attacks.targets import IntegerTarget, RuntimeTarget, budget_of, correct
from tests.networks import random_codes, random_network


def test_a_runtime_is_attacked_by_queries_as_the_emulator_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    network = random_network(rng)
    write_onnx(network, tmp_path / "model.onnx")
    runtime = RuntimeTarget(OnnxRuntime(tmp_path / "model.onnx"), network)
    emulated = IntegerTarget(network)
    codes = random_codes(rng, network, 12)
    labels = emulated.logits(codes).argmax(1)
    assert runtime.name == "onnxruntime"
    assert np.array_equal(runtime.logits(codes), emulated.logits(codes))
    assert correct(runtime, codes, labels).all()
    found = [
        square(target, codes, labels, np.arange(12), budget=40, queries=25, seed=1) for target in (runtime, emulated)
    ]
    assert np.array_equal(found[0].codes, found[1].codes)
    assert np.array_equal(found[0].fooled, found[1].fooled)


def test_budgets_are_whole_codes_inside_the_radius() -> None:
    assert [budget_of(epsilon) for epsilon in (0, 0.1, 2 / 255, 8 / 255, 0.5, 1)] == [0, 25, 2, 8, 127, 255]
