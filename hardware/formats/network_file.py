"""The integer network as files: ``network.json`` holds the scalars, ``network.safetensors`` the integers.

Reader and writer stand together because their round trip is one contract: what is loaded equals what was
saved, bit for bit. Weights and biases take the narrowest integer type that holds them; loading widens them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.files import MAX_ARRAYS_BYTES, MAX_JSON_BYTES, read_bytes, require_file, write_bytes, write_json
from hardware.formats.strict import StrictModel, parse_strict
from hardware.network import DECAY_UNITY, InputSpec, IntegerNetwork, Population, Synapse

NETWORK_FORMAT: Literal["spikeguard.network/1"] = "spikeguard.network/1"
JSON_FILE = "network.json"
ARRAYS_FILE = "network.safetensors"
INTEGER_TYPES = (np.int8, np.int16, np.int32, np.int64)
MAX_NEURONS = 2**28
MAX_STEPS = 2**16

Size = Annotated[int, Field(ge=1, le=MAX_NEURONS)]
ShapeField = Annotated[tuple[Size, ...], Field(min_length=1, max_length=3)]
Decay = Annotated[int, Field(ge=0, le=DECAY_UNITY)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class InputRecord(StrictModel):
    """Scalars of an :class:`~hardware.network.InputSpec`."""

    shape: ShapeField
    max_code: Annotated[int, Field(ge=1, le=255)]
    constant_codes: Annotated[tuple[int, ...], Field(max_length=4096)]

    def build(self) -> InputSpec:
        """The value this describes."""
        return InputSpec(self.shape, self.max_code, self.constant_codes)


class PopulationRecord(StrictModel):
    """Scalars of a :class:`~hardware.network.Population`."""

    name: Name
    shape: ShapeField
    threshold: Annotated[int, Field(ge=0, lt=2**31)]
    scale: Annotated[float, Field(gt=0)]
    spiking: bool
    current_decay: Decay
    voltage_decay: Decay
    reset: Literal["zero", "subtract"]

    def build(self, bias: NDArray[Any]) -> Population:
        """The value this describes, with its bias widened to int64."""
        return Population(bias=bias.astype(np.int64), **self.model_dump())


class SynapseRecord(StrictModel):
    """Scalars of a :class:`~hardware.network.Synapse`."""

    source: Name
    target: Name
    kind: Literal["conv", "dense"]
    bits: Annotated[int, Field(ge=1, le=31)]
    exponent: Annotated[int, Field(ge=0, le=24)]
    stride: Annotated[int, Field(ge=1, le=4096)]
    padding: Annotated[int, Field(ge=0, le=4096)]

    def build(self, weight: NDArray[Any]) -> Synapse:
        """The value this describes, with its weights widened to int32."""
        return Synapse(weight=weight.astype(np.int32), **self.model_dump())


class NetworkRecord(StrictModel):
    """Everything of an :class:`~hardware.network.IntegerNetwork` that is not an array."""

    format: Literal["spikeguard.network/1"]
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    input: InputRecord
    populations: Annotated[tuple[PopulationRecord, ...], Field(min_length=1, max_length=10_000)]
    synapses: Annotated[tuple[SynapseRecord, ...], Field(min_length=1, max_length=100_000)]
    provenance: dict[str, JsonValue]

    def build(self, biases: list[NDArray[Any]], weights: list[NDArray[Any]]) -> IntegerNetwork:
        """The network, from one bias per population and one weight array per synapse, in order.

        Raises:
            RuleViolations: if it is not a well-formed network.
        """
        return IntegerNetwork(
            self.input.build(),
            tuple(record.build(bias) for record, bias in zip(self.populations, biases, strict=True)),
            tuple(record.build(weight) for record, weight in zip(self.synapses, weights, strict=True)),
            self.steps,
            self.provenance,
        )


def describe_network(network: IntegerNetwork) -> NetworkRecord:
    """The scalars of a network, ready to be written as JSON.

    Raises:
        SpikeguardError: if its provenance is not plain JSON.
    """
    values = {
        "format": NETWORK_FORMAT,
        "steps": network.steps,
        "input": {name: getattr(network.input, name) for name in InputRecord.model_fields},
        "populations": [{n: getattr(p, n) for n in PopulationRecord.model_fields} for p in network.populations],
        "synapses": [{n: getattr(s, n) for n in SynapseRecord.model_fields} for s in network.synapses],
        "provenance": dict(network.provenance),
    }
    try:
        content = json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SpikeguardError(f"network holds a value that is not plain JSON ({error}); see its provenance") from error
    return parse_strict(NetworkRecord, content, "integer network")


def save_network(network: IntegerNetwork, folder: Path) -> None:
    """Write ``network.json`` and ``network.safetensors`` into ``folder``, each atomically.

    Raises:
        SpikeguardError: if the network has values the format does not hold.
    """
    record = describe_network(network)
    arrays = {_bias_key(i): narrowest(p.bias) for i, p in enumerate(network.populations)}
    arrays |= {_weight_key(i): narrowest(s.weight) for i, s in enumerate(network.synapses)}
    write_bytes(folder / ARRAYS_FILE, save(arrays))
    write_json(folder / JSON_FILE, record.model_dump(mode="json"))


def load_network(folder: Path) -> IntegerNetwork:
    """Read what :func:`save_network` wrote.

    Raises:
        SpikeguardError: if a file is missing, too large or damaged; ``RuleViolations`` names each bad field.
    """
    subject = str(folder / JSON_FILE)
    record = parse_strict(NetworkRecord, read_bytes(folder / JSON_FILE, MAX_JSON_BYTES), subject)
    path = folder / ARRAYS_FILE
    require_file(path, MAX_ARRAYS_BYTES)
    try:
        with safe_open(path, framework="numpy") as arrays:
            _check_arrays(arrays, record, str(path))
            biases = [arrays.get_tensor(_bias_key(i)) for i in range(len(record.populations))]
            weights = [arrays.get_tensor(_weight_key(i)) for i in range(len(record.synapses))]
    except SafetensorError as error:
        raise SpikeguardError(f"{path} is damaged ({error}); export the network again") from error
    return record.build(biases, weights)


def narrowest(values: NDArray[Any]) -> NDArray[Any]:
    """The same integers in the narrowest type that holds them, C-contiguous."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for dtype in INTEGER_TYPES:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.ascontiguousarray(values, dtype)
    raise ValueError(f"values {low}..{high} do not fit 64 bits")


def _check_arrays(arrays: Any, record: NetworkRecord, subject: str) -> None:
    """Refuse missing, unknown, misshapen or mistyped arrays by their headers, before any is built."""
    present = set(arrays.keys())
    expected = {_bias_key(i): p.shape for i, p in enumerate(record.populations)}
    kinds = {_weight_key(i): s.kind for i, s in enumerate(record.synapses)}
    remedy = "export the network again"
    problems = [
        Violation(name, "array is known", "unknown", "absent", remedy)
        for name in sorted(present - expected.keys() - kinds.keys())
    ]
    for name in [*expected, *kinds]:
        if name not in present:
            problems.append(Violation(name, "array is present", "missing", "present", remedy))
            continue
        header = arrays.get_slice(name)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        widest = 64 if name in expected else 32
        if dtype not in {f"I{bits}" for bits in (8, 16, 32, 64) if bits <= widest}:
            problems.append(Violation(name, "array holds integers", dtype, f"I8..I{widest}", remedy))
        if name in expected and shape != expected[name]:
            problems.append(Violation(name, "bias has its population's shape", str(shape), str(expected[name]), remedy))
        if name in kinds and len(shape) != {"conv": 4, "dense": 2}[kinds[name]]:
            problems.append(Violation(name, f"weight is {kinds[name]}", str(shape), "4 or 2 axes", remedy))
    if problems:
        raise RuleViolations(subject, problems)


def _bias_key(population: int) -> str:
    return f"bias.{population}"


def _weight_key(synapse: int) -> str:
    return f"weight.{synapse}"
