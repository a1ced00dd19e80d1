"""The float SNN as trained, as an ONNX graph, and what it did on the golden inputs.

The graph is unrolled over the steps with the layers of the network as they are: normalisation, batch norm and all.
Unlike the integers it is not exact from one runtime to the next; :mod:`hardware.formats.float_golden` says how it is
judged. It takes the uint8 codes that the other graphs take and scales them itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporters.onnx_graph import GraphBuilder
from hardware.files import arrays_as_bytes
from hardware.formats.bundle import FLOAT_GOLDEN_FILE, ONNX_FLOAT_FILE
from hardware.formats.float_golden import ROUNDING, FloatActivity, FloatGolden, pack_float_golden
from pipeline.models.float_file import FORMAT
from pipeline.models.graph import WITH_MEMORY, Layer, Shape
from pipeline.models.spiking import SpikingNetwork
from pipeline.neurons import Leaky

Values = list[str]
"""Names of one value per step, or a single one that is the same at every step."""


def float_onnx_files(network: SpikingNetwork, codes: NDArray[np.uint8]) -> dict[str, bytes]:
    """Contents of the bundle's files of the float SNN, by file name: its graph, and its activity on ``codes``."""
    arrays = pack_float_golden(float_golden(network, codes))
    timed = codes.ndim == len(network.graph.input_shape) + 2
    return {ONNX_FLOAT_FILE: float_onnx(network, timed=timed), FLOAT_GOLDEN_FILE: arrays_as_bytes(arrays)}


def float_golden(network: SpikingNetwork, codes: NDArray[np.uint8]) -> FloatGolden:
    """What the network does on ``codes`` ``(samples, [steps,] *shape)``, and which spikes rounding may decide."""
    logits, recorded = network.record(network.images(codes))
    undecided = {}
    for name, layer in recorded.items():
        distance, largest = (layer.membranes - layer.threshold).abs(), layer.membranes.abs().max()
        undecided[name] = (distance <= ROUNDING * largest).numpy()
    spikes = {name: layer.spikes.numpy() for name, layer in recorded.items()}
    return FloatGolden(FloatActivity(logits.numpy(), spikes), undecided)


def float_onnx(network: SpikingNetwork, *, timed: bool = False) -> bytes:
    """The graph: uint8 ``image`` ``(N, *shape)`` in, or ``(N, steps, *shape)`` if it is to change over time; float32
    ``logits`` ``(N, classes)`` out and, for every layer l of neurons, bool ``spikes_l`` ``(N, steps, *shape of l)``.
    """
    graph = _FloatGraph(network, timed)
    logits = network.graph.evaluate(graph.images(), graph.apply)
    graph.prefix = "logits/"
    mean = graph.total(logits)
    if len(logits) > 1:
        mean = graph.add("Div", mean, graph.constant("logits/terms", np.float32(len(logits))), out="mean")
    graph.rename(mean, "logits")
    return graph.serialize("float", network.steps, _card(network))


def _card(network: SpikingNetwork) -> dict[str, Any]:
    """What a reader must know to run the network as it is meant, as plain JSON."""
    keeping = [layer for layer in network.graph.layers if layer.kind in WITH_MEMORY]
    return {
        "version": FORMAT,
        "steps": network.steps,
        "input": {
            "coding": "direct: codes / max_code, the same at every step unless there is an axis of steps",
            "shape": list(network.graph.input_shape),
            "max_code": network.graph.max_code,
        },
        "comparison": "spike where membrane >= threshold",
        "memory": {layer.name: {"kind": layer.kind, **layer.options} for layer in keeping},
        "thresholds": {name: float(neuron.effective_threshold.detach()) for name, neuron in network.neurons()},
        "readout": "logits: mean over the steps of what the last layer gives, or the last membrane of a leaky readout",
    }


class _FloatGraph(GraphBuilder):
    def __init__(self, network: SpikingNetwork, timed: bool) -> None:
        super().__init__()
        self.network, self._timed = network, timed
        self._shapes = network.graph.shapes()
        shape = network.graph.input_shape
        self.declare_input("image", TensorProto.UINT8, (network.steps, *shape) if timed else shape)
        self.declare_output("logits", TensorProto.FLOAT, self._shapes[network.graph.layers[-1].name])

    def images(self) -> Values:
        """What the network reads, in [0, 1]."""
        codes = self.add("Cast", "image", to=TensorProto.FLOAT, out="codes")
        largest = self.constant("input/largest", np.float32(self.network.graph.max_code))
        pixels = self.add("Div", codes, largest, out="pixels")
        if not self._timed:
            return [pixels]
        steps = [self.constant(f"input/step{step}", np.int64(step)) for step in range(self.network.steps)]
        return [self.add("Gather", pixels, step, out="pixels_now", axis=1) for step in steps]

    def apply(self, layer: Layer, read: Sequence[Values]) -> Values:
        """Add the nodes of a layer, once for each step that may differ."""
        if layer.kind == "dropout":
            return read[0]
        if layer.kind == "spike":
            return self._neurons(layer.name, read[0])
        if layer.kind in WITH_MEMORY:
            return self._accumulated(layer, read[0])
        steps = max(len(values) for values in read)
        results = []
        for step in range(steps):
            self.prefix = f"t{step}/" if steps > 1 else "static/"
            now = [values[step if len(values) > 1 else 0] for values in read]
            results.append(self.total(now, layer.name) if layer.kind == "add" else self._layer(layer, now[0]))
        return results

    def _layer(self, layer: Layer, value: str) -> str:
        name, options = layer.name, layer.options
        known = self.network.layers[name].state_dict()
        parameters = {key: tensor.numpy() for key, tensor in known.items() if tensor.is_floating_point()}

        def constant(key: str, shape: Shape | None = None) -> str:
            values = parameters[key] if shape is None else parameters[key].reshape(shape)
            return self.constant(f"layers.{name}.{key}", values)

        weights = [constant(key) for key in ("weight", "bias") if key in parameters]
        if layer.kind == "normalize":
            per_channel = (1, -1, *(1,) * (len(self._shapes[name]) - 1))
            centred = self.add("Sub", value, constant("mean", per_channel), out=f"{name}/centred")
            return self.add("Div", centred, constant("std", per_channel), out=name)
        if layer.kind == "scale":
            return self.add("Mul", value, constant("value"), out=name)
        if layer.kind == "linear":
            return self.add("Gemm", value, *weights, out=name, transB=1)
        if layer.kind == "batch_norm":
            statistics = constant("running_mean"), constant("running_var")
            return self.add("BatchNormalization", value, *weights, *statistics, out=name, epsilon=float(options["eps"]))
        if layer.kind == "flatten":
            return self.add("Flatten", value, out=name, axis=1)
        kernel = [int(options["kernel_size"])] * 2
        if layer.kind == "avg_pool":
            return self.add("AveragePool", value, out=name, kernel_shape=kernel, strides=kernel)
        assert layer.kind == "conv"
        strides, pads = [int(options["stride"])] * 2, [int(options["padding"])] * 4
        return self.add("Conv", value, *weights, out=name, kernel_shape=kernel, strides=strides, pads=pads)

    def _neurons(self, name: str, currents: Values) -> Values:
        """All steps of a layer of neurons; their spikes are an output too."""
        neuron = self.network.layers[name]
        assert isinstance(neuron, Leaky)
        threshold = self.constant(f"threshold/{name}", neuron.effective_threshold.detach().numpy())
        beta = float(self.network.graph.by_name[name].options["beta"])
        before, fired, spikes = "", [], []
        for step in range(self.network.steps):
            self.prefix = f"t{step}/"
            membrane = currents[step if len(currents) > 1 else 0]
            if before and beta:
                kept = before
                if beta != 1:
                    factor = self.constant(f"beta/{name}", np.float32(beta))
                    kept = self.add("Mul", before, factor, out=f"{name}/decayed")
                membrane = self.add("Add", kept, membrane, out=f"{name}/membrane")
            fired.append(self.add("GreaterOrEqual", membrane, threshold, out=f"{name}/fired"))
            if neuron.subtracts:
                reset = self.add("Sub", membrane, threshold, out=f"{name}/subtracted")
            else:
                reset = self.constant("state/zero", np.float32(0))
            before = self.add("Where", fired[-1], reset, membrane, out=f"{name}/reset")
            spikes.append(self.add("Cast", fired[-1], to=TensorProto.FLOAT, out=f"{name}/spikes"))
        self._show(name, fired)
        return spikes

    def _accumulated(self, layer: Layer, entering: Values) -> Values:
        """What synapses with a memory, or a leaky readout, keep of each step; of the readout the last."""
        name = layer.name
        decay = "alpha" if layer.kind == "synaptic_current" else "beta"
        share = self.constant(f"{decay}/{name}", np.float32(layer.options[decay]))
        kept: Values = []
        for step in range(self.network.steps):
            self.prefix = f"t{step}/"
            now = entering[step if len(entering) > 1 else 0]
            if kept:
                before = self.add("Mul", kept[-1], share, out=f"{name}/decayed")
                now = self.add("Add", before, now, out=name)
            kept.append(now)
        return kept if layer.kind == "synaptic_current" else kept[-1:]

    def _show(self, name: str, fired: Values) -> None:
        self.prefix = "spikes/"
        axis = self.constant("spikes/axis", np.array([1], np.int64))
        steps = [self.add("Unsqueeze", one, axis, out=f"{name}/step") for one in fired]
        self.declare_output(f"spikes_{name}", TensorProto.BOOL, (len(fired), *self._shapes[name]))
        self.rename(self.add("Concat", *steps, out=name, axis=1), f"spikes_{name}")
