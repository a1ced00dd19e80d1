"""Builds ONNX graphs node by node, with names one can read in a viewer, and what all graphs of a network share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hardware.files import write_bytes
from hardware.network import DECAY_UNITY, FRACTION_BITS, IntegerNetwork, Population, Shape, readout_unit

OPSET = 17
IR_VERSION = 8
STATE_UNIT = 1 << FRACTION_BITS
METADATA_KEY = "spikeguard.semantics"
KIND_KEY = "spikeguard.graph"
STEPS_KEY = "spikeguard.steps"
BATCH = "N"


class GraphBuilder:
    """Collects nodes and initialisers; value names carry the step and the population they belong to."""

    def __init__(self) -> None:
        self.prefix = "input/"
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._used: set[str] = set()

    def declare_input(self, name: str, kind: int, shape: Shape) -> None:
        """Add a graph input ``(N, *shape)``."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, [BATCH, *shape]))

    def declare_output(self, name: str, kind: int, shape: Shape) -> None:
        """Add a graph output ``(N, *shape)``; a node must produce a value of that name."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, [BATCH, *shape]))

    def constant(self, name: str, values: NDArray[Any] | np.number[Any]) -> str:
        """An initialiser; the same name is stored once."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def add(self, operator: str, *inputs: str, out: str, **attributes: Any) -> str:
        """Add a node with one output, named after the step and ``out``; returns that name."""
        value = f"{self.prefix}{out}"
        suffix = 1
        while value in self._used:
            suffix += 1
            value = f"{self.prefix}{out}_{suffix}"
        self._used.add(value)
        self._nodes.append(helper.make_node(operator, list(inputs), [value], name=value, **attributes))
        return value

    def rename(self, value: str, output: str) -> None:
        """Give a value the name of a graph output, wherever it is used."""
        for node in self._nodes:
            node.input[:] = [output if name == value else name for name in node.input]
            node.output[:] = [output if name == value else name for name in node.output]

    def total(self, values: Sequence[str], out: str = "sum") -> str:
        """The values added up, one Add at a time."""
        result = values[0]
        for value in values[1:]:
            result = self.add("Add", result, value, out=out)
        return result

    def serialize(self, kind: str, steps: int, card: Mapping[str, Any]) -> bytes:
        """The checked model, with what it is and means in its metadata; the same graph gives the same bytes."""
        nodes, needed = self._needed()
        initializers = [tensor for name, tensor in self._initializers.items() if name in needed]
        graph = helper.make_graph(nodes, f"spikeguard_{kind}", self._inputs, self._outputs, initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="spikeguard",
        )
        meaning = json.dumps(card, sort_keys=True)
        helper.set_model_props(model, {METADATA_KEY: meaning, KIND_KEY: kind, STEPS_KEY: str(steps)})
        onnx.checker.check_model(model, full_check=True)
        content: bytes = model.SerializeToString(deterministic=True)
        return content

    def _needed(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes from which a path leads to an output, and the values used: resets after the last step are not."""
        needed = {port.name for port in self._outputs}
        kept = []
        for node in reversed(self._nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        return kept[::-1], needed


class NetworkGraph(GraphBuilder):
    """A graph of an integer network: ``image`` in, ``readout`` and ``logits`` out.

    Args:
        network: what it computes.
        codes: ONNX's number for the type of the codes that synapses read; the image itself is uint8.
        states: that of the states.
    """

    def __init__(self, network: IntegerNetwork, codes: int, states: int) -> None:
        super().__init__()
        self.network = network
        self.states = states
        self.declare_input("image", TensorProto.UINT8, network.input.shape)
        self.declare_output("readout", TensorProto.INT32, (network.classes,))
        self.declare_output("logits", TensorProto.FLOAT, (network.classes,))
        self.presented = self._present(codes)

    def emit_readout(self, integers: str) -> None:
        """Name the integer answer ``(N, classes)`` "readout", and give it in real units too."""
        self.rename(integers, "readout")
        real = self.add("Cast", "readout", to=TensorProto.FLOAT, out="real")
        divisor = np.float32(readout_unit(self.network.readout, self.network.steps))
        logits = self.add("Div", real, self.constant("readout/unit", divisor), out="logits")
        self.rename(logits, "logits")

    def flat(self, value: str, shape: Shape, out: str = "flat") -> str:
        """``(N, *shape)`` as ``(N, neurons)``."""
        return self.add("Flatten", value, out=out, axis=1) if len(shape) > 1 else value

    def decayed(self, state: str | None, share: int, label: str) -> list[str]:
        """What is left of a state of the step before, if anything: truncated towards zero, as ONNX divides integers."""
        if state is None or share == DECAY_UNITY:
            return []
        if share == 0:
            return [state]
        wide = self.add("Cast", state, to=TensorProto.INT64, out=f"{label}/wide")
        kept = self.add("Mul", wide, self.constant(f"keep/{share}", np.int64(DECAY_UNITY - share)), out=f"{label}/kept")
        left = self.add("Div", kept, self.constant("decay/unity", np.int64(DECAY_UNITY)), out=f"{label}/left")
        return [self.add("Cast", left, to=self.states, out=f"{label}/decayed")]

    def bias_per_channel(self, population: Population) -> bool:
        """Whether the bias is one value per channel (or neuron), not one per position."""
        return not np.ptp(population.bias.reshape(population.shape[0], -1), axis=1).any()

    def save(self, path: Path, kind: str) -> None:
        """Check the model and write it atomically."""
        write_bytes(path, self.serialize(kind, self.network.steps, self.network.semantics_card()))

    def _present(self, codes: int) -> str:
        """The image with the constant channels appended."""
        spec = self.network.input
        image = "image" if codes == TensorProto.UINT8 else self.add("Cast", "image", to=codes, out="codes")
        if not spec.constant_codes:
            return image
        constant = np.array(spec.constant_codes, helper.tensor_dtype_to_np_dtype(codes))
        channels = self.constant("input/constant_codes", constant.reshape(1, -1, *(1,) * (len(spec.shape) - 1)))
        batch = self.add("Shape", "image", out="batch", start=0, end=1)
        plane = self.constant("input/constant_shape", np.array([len(constant), *spec.shape[1:]], np.int64))
        shape = self.add("Concat", batch, plane, out="shape", axis=0)
        expanded = self.add("Expand", channels, shape, out="constant")
        return self.add("Concat", image, expanded, out="presented", axis=1)
