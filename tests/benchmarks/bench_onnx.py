"""The ONNX files against torch and against a graph written by hand: latency, throughput, load time and size.

Run it as ``python -m tests.benchmarks.bench_onnx``.

The network is the zoo's for 28x28 images with fresh weights, converted and quantised to 8 bits, T = 8; all contenders
have one thread and take turns within each repetition, so that other load on the machine meets all alike. Throughput is
that of 256 images at once and in batches as this project's runtime makes them, the faster of which counts. Ratios are
medians of the ratios to ``model.onnx`` within a turn: above 1 is slower than it.

- torch: the float SNN as this project runs it in torch, its neurons compiled, each layer running all steps at once;
- torch, stepping: the same modules in plain eager torch, all layers of a step before the next step, as snnTorch's
  tutorials do;
- by hand: the integer network as a plain ONNX graph, as one writes it who neither proves nor describes anything: no
  state units, no Clip, no metadata. Like ``model.onnx`` it computes the input's layer once and the readout from counts.

Contenders that hold the integers must give the reference's readouts, or nothing is measured.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from exporters.bundle import MODEL_WRITERS
from exporters.onnx_graph import IR_VERSION, OPSET
from hardware.formats.bundle import ONNX_FILE, ONNX_FLOAT_FILE, ONNX_INT8_FILE, ONNX_STEP_FILE
from hardware.network import IntegerNetwork
from hardware.reference import run_reference
from hardware.runtimes.onnxruntime import BATCH_SAMPLES, OnnxModel, load_model, run_steps
from pipeline.compute import use_cpu
from pipeline.conversion import calibrate, convert
from pipeline.models.float_file import float_files, load_float
from pipeline.models.float_onnx import float_onnx
from pipeline.models.graph import Layer
from pipeline.models.spiking import RateNetwork, SpikingNetwork, rebuild
from pipeline.models.tracing import trace_network
from pipeline.models.zoo import build
from pipeline.neurons import Leaky
from pipeline.quantization import quantize
from pipeline.training import pixels
from tests.benchmarks.bench_attack_step import take_turns
from tests.benchmarks.emulator_networks import IMAGE, random_images

NETWORK, STEPS, BITS, CLASSES = "cnn-28", 8, 8, 10
BATCH, SINGLE_IMAGES, CHECKED = 256, 16, 32
HAND_FILE = "hand.onnx"
Codes = NDArray[np.uint8]
Run = Callable[[Codes], NDArray[np.generic]]


@dataclass(frozen=True)
class Contender:
    """One way to run the network.

    Attributes:
        load: reads it from its files, ready to run.
        files: that it needs.
        is_exact: whether it gives integer readouts.
    """

    load: Callable[[], Run]
    files: Sequence[Path]
    is_exact: bool


def networks(images: Codes) -> tuple[SpikingNetwork, IntegerNetwork]:
    """The float SNN with thresholds that keep it as busy as a trained one, and its integers."""
    torch.manual_seed(0)
    rate = rebuild(trace_network(build(NETWORK, "mnist", CLASSES, 1, IMAGE), IMAGE), 1)
    assert isinstance(rate, RateNetwork)
    spiking = convert(rate.eval(), STEPS)
    calibrate(spiking, [pixels(torch.from_numpy(images))], percentile=99.7, calibration_steps=50, scale=0.6)
    return spiking.eval(), quantize(spiking, images, BITS, {}).network


@torch.no_grad()
def stepping(network: SpikingNetwork, images: Tensor) -> Tensor:
    """Logits in plain eager torch, all layers of a step before the next step."""
    membranes: dict[str, Tensor] = {}

    def apply(layer: Layer, read: Sequence[Tensor]) -> Tensor:
        module = network.layers[layer.name]
        if not isinstance(module, Leaky):
            result: Tensor = module(*read)
            return result
        before = membranes.get(layer.name, torch.zeros_like(read[0]))
        spikes, membranes[layer.name] = module(read[0], before)
        return spikes

    logits = [network.graph.evaluate(images, apply) for _ in range(network.steps)]
    return torch.stack(logits).mean(0)


def write_by_hand(network: IntegerNetwork, path: Path) -> None:
    """A chain of convolutions and dense layers, without anything that ``model.onnx`` has for proof or description."""
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(name: str, values: NDArray[np.generic]) -> str:
        weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(operator: str, *inputs: str, **attributes: object) -> str:
        name = f"v{len(nodes)}"
        nodes.append(helper.make_node(operator, [*inputs], [name], **attributes))
        return name

    spec, synapses = network.input, {s.target: s for s in network.synapses}
    image = node("Cast", "image", to=TensorProto.FLOAT)
    if spec.constant_codes:
        codes = np.array(spec.constant_codes, np.float32).reshape(1, -1, 1, 1)
        planes = constant("planes", codes)
        batch = node("Shape", "image", start=0, end=1)
        plane = constant("plane", np.array([codes.size, *spec.shape[1:]], np.int64))
        shape = node("Concat", batch, plane, axis=0)
        image = node("Concat", image, node("Expand", planes, shape), axis=1)
    zero = constant("zero", np.zeros((), np.float32))
    names: dict[str, tuple[str, str]] = {}
    for population in network.populations:
        name = population.name
        times = 1 if population.spiking else network.steps
        weight = constant(f"w_{name}", synapses[name].weight.astype(np.float32))
        per_channel = population.bias.reshape(population.shape[0], -1)
        assert not np.ptp(per_channel, axis=1).any()
        names[name] = weight, constant(f"b_{name}", (times * per_channel[:, 0]).astype(np.float32))

    def current(name: str, source: str) -> str:
        synapse = synapses[name]
        if synapse.kind == "dense":
            return node("Gemm", node("Flatten", source, axis=1), *names[name], transB=1)
        return node("Conv", source, *names[name], strides=[synapse.stride] * 2, pads=[synapse.padding] * 4)

    *hidden, readout = network.populations
    static = current(hidden[0].name, image)
    thresholds = {p.name: constant(f"t_{p.name}", np.array(p.threshold, np.float32)) for p in hidden}
    membranes: dict[str, str] = {}
    count = ""
    for _ in range(network.steps):
        spikes = ""
        for population in hidden:
            name = population.name
            drive = current(name, spikes) if spikes else static
            membrane = node("Add", membranes[name], drive) if name in membranes else drive
            fired = node("Greater", membrane, thresholds[name])
            membranes[name] = node("Where", fired, zero, membrane)
            spikes = node("Cast", fired, to=TensorProto.FLOAT)
        count = node("Add", count, spikes) if count else spikes
    total = current(readout.name, count)
    nodes.append(helper.make_node("Cast", [total], ["readout"], to=TensorProto.INT32))
    ports = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", *spec.shape])]
    answers = [helper.make_tensor_value_info("readout", TensorProto.INT32, ["N", network.classes])]
    graph = helper.make_graph(nodes, "by_hand", ports, answers, weights)
    opsets = [helper.make_opsetid("", OPSET)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), str(path))


def open_hand_made(path: Path) -> Run:
    """With the settings of our runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda codes: np.asarray(session.run(["readout"], {"image": codes})[0])


def contenders(folder: Path, spiking: SpikingNetwork, network: IntegerNetwork) -> Mapping[str, Contender]:
    """All of them, their files written."""
    for name in (ONNX_FILE, ONNX_STEP_FILE, ONNX_INT8_FILE):
        MODEL_WRITERS[name](network, folder / name)
    (folder / ONNX_FLOAT_FILE).write_bytes(float_onnx(spiking))
    write_by_hand(network, folder / HAND_FILE)
    parts = float_files(spiking)
    for name, content in parts.items():
        (folder / name).write_bytes(content)

    def onnx_run(file: str, kind: str, output: str) -> Contender:
        def load() -> Run:
            model: OnnxModel = load_model(folder / file, kind)
            return lambda codes: model([output], {"image": codes})[0]

        return Contender(load, [folder / file], output == "readout")

    def load_step() -> Run:
        model = load_model(folder / ONNX_STEP_FILE, "step")
        return lambda codes: run_steps(model, codes, "readouts").readouts

    def load_torch(infer: Callable[[SpikingNetwork, Tensor], Tensor]) -> Callable[[], Run]:
        def load() -> Run:
            model = load_float(folder)
            return lambda codes: infer(model, pixels(torch.from_numpy(codes))).detach().numpy()

        return load

    as_torch = [folder / name for name in parts]
    return {
        ONNX_FILE: onnx_run(ONNX_FILE, "unrolled", "readout"),
        ONNX_STEP_FILE: Contender(load_step, [folder / ONNX_STEP_FILE], True),
        ONNX_INT8_FILE: onnx_run(ONNX_INT8_FILE, "int8", "readout"),
        ONNX_FLOAT_FILE: onnx_run(ONNX_FLOAT_FILE, "float", "logits"),
        "by hand": Contender(lambda: open_hand_made(folder / HAND_FILE), [folder / HAND_FILE], True),
        "torch": Contender(load_torch(torch.no_grad()(lambda model, images: model(images))), as_torch, False),
        "torch, stepping": Contender(load_torch(stepping), as_torch, False),
    }


def require_right_answers(runs: Mapping[str, Run], exact: Sequence[str], network: IntegerNetwork, codes: Codes) -> None:
    """Stop if an exact contender differs from the reference, or the float ones from each other by a class."""
    expected = run_reference(network, codes, "readouts").readouts
    classes = runs["torch"](codes).argmax(1)
    for name, run in runs.items():
        answer = run(codes)
        wrong = int((answer != expected).sum()) if name in exact else int((answer.argmax(1) != classes).sum())
        if wrong and name in exact:
            raise SystemExit(f"{name} gives {wrong} wrong readouts: there is nothing to compare")
        if name not in exact:
            print(f"{name}: {wrong} of {len(codes)} classes differ from torch's")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    use_cpu(1)
    images = random_images(BATCH)
    spiking, network = networks(images[:CHECKED])
    with tempfile.TemporaryDirectory() as name:
        everyone = contenders(Path(name), spiking, network)
        loading = take_turns({name: one.load for name, one in everyone.items()}, options.repetitions)
        runs = {name: one.load() for name, one in everyone.items()}
        require_right_answers(runs, [n for n, one in everyone.items() if one.is_exact], network, images[:CHECKED])
        single = take_turns(
            {n: in_batches(run, images[:SINGLE_IMAGES], 1) for n, run in runs.items()}, options.repetitions
        )
        at_once = {name: in_batches(run, images, BATCH) for name, run in runs.items()}
        cut = {f"{name} cut": in_batches(run, images, BATCH_SAMPLES) for name, run in runs.items()}
        batched = take_turns({**at_once, **cut}, options.repetitions).seconds
        sizes = {name: sum(path.stat().st_size for path in one.files) for name, one in everyone.items()}
    spikes = run_reference(network, images[:CHECKED]).populations
    rates = [bits.spikes.mean() for bits in spikes.values() if bits.spikes is not None]
    neurons = sum(population.size for population in network.populations)
    busy = ", ".join(f"{rate:.3f}" for rate in rates)
    print(f"{NETWORK}: {neurons:,} neurons, T = {STEPS}; spikes per neuron and step {busy}")
    print(f"{'':18s}{'ms, batch 1':>12s}{'ratio':>7s}{'images/s: at once':>19s}", end="")
    print(f"{f'in {BATCH_SAMPLES}s':>8s}{'ratio':>7s}{'load ms':>9s}{'KiB':>6s}")
    faster = {name: np.minimum(batched[name], batched[f"{name} cut"]) for name in everyone}
    for name in everyone:
        one = np.array(single.seconds[name])
        ratios = [np.median(one / np.array(single.seconds[ONNX_FILE])), np.median(faster[name] / faster[ONNX_FILE])]
        speeds = [BATCH / np.median(batched[key]) for key in (name, f"{name} cut")]
        print(f"{name:18s}{1000 * np.median(one) / SINGLE_IMAGES:12.2f}{ratios[0]:7.2f}{speeds[0]:19,.0f}", end="")
        print(f"{speeds[1]:8,.0f}{ratios[1]:7.2f}{1000 * loading.typical(name):9.1f}{sizes[name] / 1024:6.0f}")


def in_batches(run: Run, images: Codes, batch: int) -> Callable[[], None]:
    """All images, so many at a time."""

    def work() -> None:
        for first in range(0, len(images), batch):
            run(images[first : first + batch])

    return work


if __name__ == "__main__":
    main()
