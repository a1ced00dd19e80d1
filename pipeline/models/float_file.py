"""Float networks as files: the layer graph as JSON, parameters as safetensors, rebuilt without user code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import nn

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import MIB, read_bytes
from pipeline.models.graph import PIXEL_LEVELS, Layer, LayerGraph, LayerKind
from pipeline.models.spiking import RateNetwork, SpikingNetwork

FORMAT = "spikeguard.float/2"
SNN, ANN = "snn", "ann"
MAX_PARAMETER_BYTES = 2048 * MIB
MAX_STEPS = 1024
SMALLEST = {"std": torch.finfo(torch.float32).tiny, "running_var": 0.0}


Network = TypeVar("Network", bound=nn.Module)


class _LayerModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    kind: LayerKind
    options: dict[str, bool | int | float]
    path: str
    inputs: list[str]
    block: str


class _GraphModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["spikeguard.float/2"]
    input_shape: list[int]
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None
    max_code: int = PIXEL_LEVELS  # earlier files are of pixels and do not say so
    layers: list[_LayerModel]


def float_files(network: SpikingNetwork | RateNetwork) -> dict[str, bytes]:
    """Contents of the files that hold a float network, by file name: snn.* if it spikes, ann.* if not."""
    spiking = isinstance(network, SpikingNetwork)
    stem = SNN if spiking else ANN
    graph: dict[str, Any] = {
        "format": FORMAT,
        "input_shape": list(network.graph.input_shape),
        "steps": network.steps if spiking else None,
        "max_code": network.graph.max_code,
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "options": dict(layer.options),
                "path": layer.path,
                "inputs": list(network.graph.sources[layer.name]),
                "block": layer.block,
            }
            for layer in network.graph.layers
        ],
    }
    parameters = {name: value.detach().contiguous() for name, value in network.state_dict().items()}
    return {
        f"{stem}.json": (json.dumps(graph, indent=2) + "\n").encode(),
        f"{stem}.safetensors": safetensors.torch.save(parameters),
    }


def holds_spiking(folder: Path) -> bool:
    """Whether the float network in ``folder`` is an SNN."""
    return (folder / f"{SNN}.json").is_file()


def load_float(folder: Path) -> SpikingNetwork:
    """Rebuild a float SNN, in eval mode, from the two files in ``folder``.

    Raises:
        SpikeguardError: if a file is missing or is not what it should be.
        RuleViolations: if parameters are missing, of another shape, or not finite; all of them.
    """
    graph, steps = _load_graph(folder / f"{SNN}.json")
    if steps is None:
        raise SpikeguardError(f"{folder / SNN}.json has no time steps; it is not a spiking network")
    return _with_parameters(SpikingNetwork(graph, steps), folder / f"{SNN}.safetensors")


def load_rate(folder: Path) -> RateNetwork:
    """Rebuild a float ANN, in eval mode; arguments and errors as for :func:`load_float`."""
    graph, _ = _load_graph(folder / f"{ANN}.json")
    return _with_parameters(RateNetwork(graph), folder / f"{ANN}.safetensors")


def _load_graph(path: Path) -> tuple[LayerGraph, int | None]:
    content = read_bytes(path, MIB)
    try:
        model = _GraphModel.model_validate_json(content)
        layers = tuple(
            Layer(layer.name, layer.kind, layer.options, layer.path, tuple(layer.inputs), layer.block)
            for layer in model.layers
        )
        return LayerGraph(tuple(model.input_shape), layers, model.max_code), model.steps
    except ValidationError as error:
        raise SpikeguardError(f"{path} is not a {FORMAT} file: {error}") from error


def _with_parameters(network: Network, path: Path) -> Network:
    try:
        parameters = safetensors.torch.load(read_bytes(path, MAX_PARAMETER_BYTES))
    except SafetensorError as error:
        raise SpikeguardError(f"{path} is not a safetensors file ({error}); export it again") from error
    require_same_parameters(network, parameters, str(path))
    network.load_state_dict(parameters)
    network.eval()
    return network


def require_same_parameters(network: torch.nn.Module, parameters: dict[str, torch.Tensor], source: str) -> None:
    """Refuse parameters that are missing, left over, of another shape, or not finite, all at once."""
    expected = network.state_dict()
    problems = []
    for name in sorted(set(expected) | set(parameters)):
        if name not in parameters or name not in expected:
            state = "missing" if name not in parameters else "left over"
            problems.append(Violation(name, "belongs to the network", state, "present in both", "export it again"))
        elif (found := _shape_of(parameters[name])) != (wanted := _shape_of(expected[name])):
            problems.append(Violation(name, "has the network's shape and type", found, wanted, "export it again"))
        elif not bool(torch.isfinite(parameters[name]).all()):
            problems.append(
                Violation(name, "is finite", "NaN or infinite values", "numbers", "train with a lower learning rate")
            )
        elif (low := SMALLEST.get(name.rpartition(".")[2])) is not None and bool((parameters[name] < low).any()):
            actual = f"{float(parameters[name].min()):g}"
            problems.append(Violation(name, "is not negative, nor a std zero", actual, f"{low:g} or more", "mend it"))
    if problems:
        raise RuleViolations(source, problems)


def _shape_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
