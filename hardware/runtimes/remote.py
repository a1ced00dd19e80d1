"""A network that a service runs elsewhere: asked over the Open Inference Protocol (REST, binary tensors)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from math import prod
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, JsonValue

from hardware.errors import SpikeguardError
from hardware.files import MIB
from hardware.formats.strict import StrictModel, parse_strict
from hardware.network import IntArray, IntegerNetwork
from hardware.server.protocol import HEADER_LENGTH, IMAGE, READOUT
from hardware.trace import Record, Trace

SCHEMES = ("http", "https")
DEFAULT_MODEL = "model"
BATCH_IMAGES = 64
BATCH_BYTES = MIB
"""Far under the limits that a server has unless it was told otherwise; fewer images if it says so."""
HEADER_BYTES = MIB
MAX_CODE = 255
TYPES: Mapping[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "INT32": np.dtype("<i4")}


class _Answer(StrictModel):
    """Other servers say more than is read here."""

    model_config = ConfigDict(extra="ignore")


class _Server(_Answer):
    name: str
    version: str = ""


class _Port(_Answer):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, JsonValue] = Field(default_factory=dict)


class _Model(_Answer):
    platform: str = ""
    inputs: list[_Port]
    outputs: list[_Port]
    parameters: dict[str, JsonValue] = Field(default_factory=dict)


class _Inference(_Answer):
    outputs: list[_Port]


def is_service(name: str) -> bool:
    """Whether the name of a runtime is the address of a service."""
    return name.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


class RemoteRuntime:
    """A service that runs the network; it exposes readouts only.

    Args:
        address: ``http://host:port`` for the model "model", or ``http://host:port/v2/models/NAME``.
        network: what the service is meant to run.
        timeout: seconds without a word from the service, and for it to be free.

    Attributes:
        name: the address.
        version: what the service says of itself and its runtime.

    Raises:
        SpikeguardError: if the address is none, the service does not answer or is not ready, or its model takes or
            gives something else than the network.
    """

    def __init__(self, address: str, network: IntegerNetwork, timeout: float = 30.0) -> None:
        self.name = address
        self._secure, self._host, self._port, self._path = _parse(address)
        self._timeout = timeout
        self._shape, self._classes = network.input.shape, network.classes
        with closing(self._connect()) as connection:
            status, _, _ = self._exchange(connection, "GET", f"{self._path}/ready", HEADER_BYTES)
            if status != 200:
                raise SpikeguardError(f"{address} is not ready (status {status}); start it, or see why in its log")
            server = parse_strict(_Server, self._ask(connection, "/v2"), f"{address}/v2")
            model = parse_strict(_Model, self._ask(connection, self._path), address)
        self._require(model, network)
        words = [server.name, server.version, *map(str, map(model.parameters.get, ("runtime", "runtime_version")))]
        self.version = " ".join(word for word in words if word not in ("", "None")) or "unknown"
        limit = model.parameters.get("max_images")
        self._most = max(1, min(BATCH_IMAGES, limit if isinstance(limit, int) else BATCH_IMAGES))

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        """Ask for ``(samples, [steps,] *shape)`` codes, in batches; only readouts come back, whatever ``record`` says.

        Raises:
            SpikeguardError: if the inputs are no codes of bytes, the service refuses, is too busy for too long, or
                answers anything but readouts.
        """
        del record
        if not np.issubdtype(inputs.dtype, np.integer) or (
            inputs.size and not 0 <= inputs.min() <= inputs.max() <= 255
        ):
            raise SpikeguardError(f"{self.name} takes integers 0..{MAX_CODE}; round and clip the images")
        codes = np.ascontiguousarray(inputs, np.uint8)
        count = max(1, min(self._most, BATCH_BYTES // max(1, prod(codes.shape[1:]))))
        with closing(self._connect()) as connection:
            parts = [self._batch(connection, codes[at : at + count]) for at in range(0, len(codes), count)]
        return Trace(np.concatenate([np.empty((0, self._classes), np.int64), *parts]))

    def _batch(self, connection: HTTPConnection, codes: NDArray[np.uint8]) -> NDArray[np.int64]:
        size = {"binary_data_size": codes.nbytes}
        image = {"name": IMAGE, "datatype": "UINT8", "shape": list(codes.shape), "parameters": size}
        wanted = {"name": READOUT, "parameters": {"binary_data": True}}
        text = json.dumps({"inputs": [image], "outputs": [wanted]}).encode()
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
        most = HEADER_BYTES + 8 * len(codes) * self._classes
        end = time.monotonic() + self._timeout
        while True:
            status, found, body = self._exchange(
                connection, "POST", f"{self._path}/infer", most, text + codes.tobytes(), headers
            )
            pause = found.get("retry-after", "1")
            seconds = min(int(pause), self._timeout) if pause.isdigit() and len(pause) < 6 else 1
            if status != 503 or time.monotonic() + seconds > end:
                break
            time.sleep(seconds)
        if status != 200:
            raise SpikeguardError(f"{self.name} refused {len(codes)} images (status {status}): {_said(body)}")
        return self._readouts(body, found.get(HEADER_LENGTH.lower(), ""), len(codes))

    def _readouts(self, body: bytes, header_length: str, samples: int) -> NDArray[np.int64]:
        length = int(header_length) if header_length.isdigit() and len(header_length) < 10 else len(body)
        answer = parse_strict(_Inference, body[:length], f"answer of {self.name}", "let another server answer")
        port = next((port for port in answer.outputs if port.name == READOUT), None)
        kind = TYPES.get(port.datatype) if port else None
        data = body[length:]
        if port is None or kind is None or port.shape != [samples, self._classes]:
            raise SpikeguardError(f"{self.name} answered no {READOUT} of shape [{samples}, {self._classes}]")
        if len(data) != samples * self._classes * kind.itemsize:
            raise SpikeguardError(f"{self.name} answered {len(data)} bytes of {READOUT}, not {samples} rows")
        return np.frombuffer(data, kind).reshape(samples, self._classes).astype(np.int64)

    def _require(self, model: _Model, network: IntegerNetwork) -> None:
        inputs = {port.name: port for port in model.inputs}
        outputs = {port.name: port for port in model.outputs}
        image, readout = inputs.get(IMAGE), outputs.get(READOUT)
        takes = {(-1, *network.input.shape), (-1, network.steps, *network.input.shape)}
        if image is None or image.datatype != "UINT8" or tuple(image.shape) not in takes or len(inputs) > 1:
            shown = ", ".join(f"{p.name} {p.datatype} {p.shape}" for p in model.inputs)
            raise SpikeguardError(f"{self.name} takes {shown}, not this network's images; let it serve this bundle")
        if readout is None or readout.datatype not in TYPES or tuple(readout.shape) != (-1, network.classes):
            shown = ", ".join(f"{p.name} {p.datatype} {p.shape}" for p in model.outputs)
            raise SpikeguardError(f"{self.name} gives {shown}, not this network's readouts; let it serve this bundle")

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self._secure else HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout)

    def _ask(self, connection: HTTPConnection, path: str) -> bytes:
        status, _, body = self._exchange(connection, "GET", path, HEADER_BYTES)
        if status != 200:
            raise SpikeguardError(f"{self.name} does not speak the Open Inference Protocol: status {status} for {path}")
        return body

    def _exchange(
        self,
        connection: HTTPConnection,
        method: str,
        path: str,
        most: int,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case and body of an answer, of at most ``most`` bytes."""
        for attempt in (1, 2):
            reused = connection.sock is not None
            try:
                connection.request(method, path, body, dict(headers or {}))
                response = connection.getresponse()
                content = response.read(most + 1)
                if len(content) > most:
                    raise SpikeguardError(f"{self.name} answers more than {most:,} bytes; is it the right service?")
                return response.status, {key.lower(): value for key, value in response.getheaders()}, content
            except TimeoutError as error:
                raise SpikeguardError(f"{self.name} did not answer within {self._timeout:g} s; is it busy?") from error
            except (OSError, HTTPException) as error:
                connection.close()
                # A connection that was kept may have ended meanwhile; asking again changes nothing there.
                if not reused or attempt == 2:
                    raise SpikeguardError(f"{self.name} does not answer ({error!r}); is it running there?") from error
        raise AssertionError("unreachable")


def _parse(address: str) -> tuple[bool, str, int | None, str]:
    """Whether it is secure, host, port and path of the model."""
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = -1
    segments = [segment for segment in parts.path.split("/") if segment]
    named = len(segments) == 3 and segments[:2] == ["v2", "models"]
    extra = parts.query or parts.fragment or parts.username or parts.password
    if parts.scheme not in SCHEMES or not parts.hostname or port == -1 or extra or not (named or not segments):
        raise SpikeguardError(f"{address!r} is no address of a service; give http://host:port[/v2/models/NAME]")
    model = segments[2] if named else DEFAULT_MODEL
    return parts.scheme == "https", parts.hostname, port, f"/v2/models/{model}"


def _said(body: bytes) -> str:
    """The sentence of an error, or the beginning of whatever came."""
    try:
        return str(json.loads(body)["error"])[:500]
    except (ValueError, KeyError, TypeError, RecursionError):
        return repr(body[:100])
