"""Runs a network's ONNX graphs on ONNX Runtime: readouts from the unrolled graph, traces from the step.

The graph of the float SNN gives logits and spikes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import Missing, RuleViolations, SpikeguardError, Violation
from hardware.files import MIB, read_bytes
from hardware.formats.float_golden import FloatActivity
from hardware.network import IntArray
from hardware.trace import PopulationTrace, Record, Trace, concatenate

MAX_MODEL_BYTES = 1024 * MIB
BATCH_SAMPLES = 32
"""Run at a time: many more leave the processor's cache between two operators, and are half as fast."""
STEPS_KEY = "spikeguard.steps"
KIND_KEY = "spikeguard.graph"
NEXT_STATE = "next_membrane_"
STATES = ("membrane_", "current_")
SPIKES = "spikes_"
REMEDY = "export the bundle again"
EXTERNAL_DATA = re.compile(rb"(?:\x08|\x88\x80{0,8}\x00)location")
"""The key every external tensor must have, behind its length: eight, in any encoding of that number."""


class OnnxRuntime:
    """ONNX Runtime on the CPU.

    Args:
        path: of the unrolled graph (``model.onnx``).
        step_path: of the single step (``model.step.onnx``); needed for traces and for inputs that change
            over time.
        threads: of one operator; 1 is fastest for small nets on shared cores.
        kind: of the unrolled graph; "int8" for ``model.int8.onnx``.

    Raises:
        SpikeguardError: if onnxruntime is not installed, or a model is missing, too large, damaged, refers to
            other files, or is not one this project writes.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, step_path: Path | None = None, threads: int = 1, kind: str = "unrolled") -> None:
        self._unrolled = load_model(path, kind, threads)
        self._step = None if step_path is None else load_model(step_path, "step", threads)
        self.version = str(_onnxruntime().__version__)

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        """Run codes ``(samples, *shape)``, or ``(samples, steps, *shape)`` if the step graph is there.

        Readouts come from the unrolled graph (from the step for inputs that change over time). With
        ``record="traces"`` spikes and membranes come from the step graph, and are absent without it.

        Raises:
            SpikeguardError: if the inputs do not fit the model, or ONNX Runtime fails.
        """
        changes_over_time = inputs.ndim == len(self._unrolled.image_shape) + 2
        if changes_over_time and self._step is None:
            raise SpikeguardError("inputs that change over time need the single-step graph; give its path too")
        parts = []
        for start in range(0, max(len(inputs), 1), BATCH_SAMPLES):
            batch = inputs[start : start + BATCH_SAMPLES]
            trace = Trace(run_unrolled(self._unrolled, batch)) if not changes_over_time else None
            if self._step is not None and (trace is None or record == "traces"):
                stepped = run_steps(self._step, batch, record)
                trace = Trace(stepped.readouts if trace is None else trace.readouts, stepped.populations)
            parts.append(trace)
        return concatenate([part for part in parts if part is not None])


@dataclass(frozen=True)
class OnnxModel:
    """A loaded graph whose inputs and outputs were checked.

    Attributes:
        shapes: by input and output name, without the batch axis.
    """

    session: Any
    path: Path
    steps: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.shapes["image"]

    def __call__(self, outputs: list[str], feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the graph once; its errors become ours."""
        try:
            results: list[NDArray[Any]] = self.session.run(outputs, feeds)
        except Exception as error:  # its exception types share no base class
            raise SpikeguardError(f"ONNX Runtime could not run {self.path} ({_first_line(error)})") from error
        return results


def load_model(path: Path, kind: str, threads: int = 1) -> OnnxModel:
    """Load a graph that is complete in itself and has the inputs and outputs of its kind.

    Raises:
        SpikeguardError: as :class:`OnnxRuntime` says.
    """
    content = read_bytes(path, MAX_MODEL_BYTES)
    if EXTERNAL_DATA.search(content):
        raise SpikeguardError(f"{path} keeps data in other files, which is not allowed; export it as one file")
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], enable_fallback=False
        )
        properties = session.get_modelmeta().custom_metadata_map
        ports = [*session.get_inputs(), *session.get_outputs()]
    except Exception as error:  # its exception types share no base class
        raise SpikeguardError(f"{path} is not a usable ONNX model ({_first_line(error)}); {REMEDY}") from error
    steps = properties.get(STEPS_KEY, "")
    if properties.get(KIND_KEY) != kind or not (steps.isascii() and steps.isdigit() and 0 < int(steps) < 2**16):
        raise SpikeguardError(f"{path} is not the {kind} graph of a spiking network; {REMEDY}")
    problems = _port_violations(session, kind)
    if problems:
        raise RuleViolations(str(path), problems)
    return OnnxModel(session, path, int(steps), {port.name: tuple(port.shape[1:]) for port in ports})


def run_unrolled(model: OnnxModel, images: IntArray) -> NDArray[np.int64]:
    """Readouts ``(samples, classes)`` of images ``(samples, *shape)``."""
    (readouts,) = model(["readout"], {"image": _codes(model, images, leading=1)})
    return readouts.astype(np.int64)


def run_float(model: OnnxModel, images: IntArray) -> FloatActivity:
    """What the float SNN does on images ``(samples, *shape)``."""
    names = [port.name for port in model.session.get_outputs() if port.name.startswith(SPIKES)]
    codes = _codes(model, images, leading=1)
    starts = range(0, max(len(codes), 1), BATCH_SAMPLES)
    batches = [model(["logits", *names], {"image": codes[start : start + BATCH_SAMPLES]}) for start in starts]
    logits, *spikes = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    flat = (bits.reshape(*bits.shape[:2], -1) for bits in spikes)
    return FloatActivity(logits, dict(zip((name.removeprefix(SPIKES) for name in names), flat, strict=True)))


def run_steps(model: OnnxModel, inputs: IntArray, record: Record) -> Trace:
    """Run all steps of ``(samples, [steps,] *shape)`` codes, feeding the states back."""
    changes_over_time = inputs.ndim == len(model.image_shape) + 2
    codes = _codes(model, inputs, leading=2 if changes_over_time else 1)
    names = _populations(port.name for port in model.session.get_outputs())
    spiking = [name for name in names if f"spikes_{name}" in model.shapes]
    recorded = [*(f"next_membrane_{n}" for n in names), *(f"spikes_{n}" for n in spiking)]
    kept = [name for name in model.shapes if name.startswith(STATES)]
    states: dict[str, NDArray[Any]] = {n: np.zeros((len(codes), *model.shapes[n]), np.float32) for n in kept}
    states["readout_before"] = np.zeros((len(codes), *model.shapes["readout"]), np.int32)
    wanted = list(dict.fromkeys(["readout", *(f"next_{n}" for n in kept), *recorded]))
    history: dict[str, list[NDArray[Any]]] = {key: [] for key in recorded}
    for step in range(model.steps):
        image = np.ascontiguousarray(codes[:, step]) if changes_over_time else codes
        results = dict(zip(wanted, model(wanted, {"image": image, **states}), strict=True))
        states = {n: results[f"next_{n}"] for n in kept}
        states["readout_before"] = results["readout"]
        if record == "traces":
            for key in recorded:
                history[key].append(results[key].reshape(len(codes), -1))
    readouts = states["readout_before"].astype(np.int64)
    if record == "readouts":
        return Trace(readouts)
    return Trace(
        readouts,
        {
            name: PopulationTrace(
                np.stack(history[f"spikes_{name}"], axis=1) if name in spiking else None,
                np.stack(history[f"next_membrane_{name}"], axis=1).astype(np.int32),
            )
            for name in names
        },
    )


def _onnxruntime() -> Any:
    """The module, telemetry off; a clear error where it is not installed."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise Missing("onnxruntime is not installed; install spikeguard[verify]") from error
    return onnxruntime


def _codes(model: OnnxModel, inputs: IntArray, leading: int) -> NDArray[np.uint8]:
    """The inputs as uint8, if they fit the model."""
    fits = inputs.ndim == leading + len(model.image_shape) and inputs.shape[leading:] == model.image_shape
    if fits and leading == 2:
        fits = inputs.shape[1] == model.steps
    if not fits:
        shape = f"(samples, [{model.steps},] {', '.join(map(str, model.image_shape))})"
        rule = "shape is the model's"
        row = Violation("input", rule, str(inputs.shape), shape, "reshape or resize the images")
        raise RuleViolations(str(model.path), [row])
    if not np.issubdtype(inputs.dtype, np.integer) or (inputs.size and not 0 <= inputs.min() <= inputs.max() <= 255):
        actual = f"{inputs.dtype}" + (f" {inputs.min()}..{inputs.max()}" if inputs.size else "")
        row = Violation("input", "codes are 8-bit integers", actual, "integers 0..255", "round and clip the images")
        raise RuleViolations(str(model.path), [row])
    return np.ascontiguousarray(inputs, np.uint8)


def _port_violations(session: Any, kind: str) -> list[Violation]:
    """Inputs and outputs that a graph of this kind must have, must not have, or has of another type."""
    inputs = {port.name: port for port in session.get_inputs()}
    outputs = {port.name: port for port in session.get_outputs()}
    wanted_inputs = {"image": "tensor(uint8)"}
    wanted_outputs = {"readout": "tensor(int32)", "logits": "tensor(float)"}
    if kind == "float":
        wanted_outputs = {"logits": "tensor(float)"}
        wanted_outputs |= {name: "tensor(bool)" for name in outputs if name.startswith(SPIKES)}
    if kind == "step":
        populations = _populations(outputs)
        currents = [f"current_{name}" for name in populations if f"current_{name}" in inputs]
        kept = [*(f"membrane_{name}" for name in populations), *currents]
        wanted_inputs |= dict.fromkeys(kept, "tensor(float)")
        wanted_inputs["readout_before"] = "tensor(int32)"
        wanted_outputs |= {f"next_{name}": "tensor(float)" for name in kept}
        wanted_outputs |= {f"spikes_{n}": "tensor(bool)" for n in populations if f"spikes_{n}" in outputs}
    problems = []
    for found, wanted in ((inputs, wanted_inputs), (outputs, wanted_outputs)):
        for name in sorted(found.keys() | wanted.keys()):
            actual = found[name].type if name in found else "absent"
            if actual != wanted.get(name, "absent"):
                limit = wanted.get(name, "absent")
                problems.append(Violation(name, "port of the graph", actual, limit, REMEDY))
            elif not all(isinstance(size, int) and size > 0 for size in found[name].shape[1:]):
                shape = json.dumps(found[name].shape)
                problems.append(Violation(name, "only the batch is free", shape, "fixed sizes", REMEDY))
    return problems


def _populations(outputs: Iterable[str]) -> list[str]:
    """Populations of a step graph, in order, from the names of its outputs."""
    return [name.removeprefix(NEXT_STATE) for name in outputs if name.startswith(NEXT_STATE)]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
