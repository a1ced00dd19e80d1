"""The Open Inference Protocol (REST, JSON tensors) over any runtime.

Every answer is JSON, errors are ``{"error": sentence}``: 400 for a request that is not well formed, 404 for an unknown
path or model, 413 for a body above ``MAX_BODY_BYTES``, 500 if the runtime did not finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from itertools import chain, islice
from math import prod
from threading import Lock
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, JsonValue, model_validator
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.formats.bundle import Bundle
from hardware.formats.strict import MAX_SHOWN, StrictModel, parse_strict
from hardware.network import IntegerNetwork, Shape
from hardware.runtimes.protocol import Runtime
from hardware.trace import Trace, compare_traces

MAX_BODY_BYTES = 16 * 2**20
MAX_IMAGES = 1024
MAX_PROBLEMS = 5
MAX_CODE = 255
REMEDY = "send what GET /v2/models/NAME describes"

Count = Annotated[int, Field(ge=1)]


class RequestModel(StrictModel):
    """A strict record that names unknown fields in one error: one each, for a body full of them, takes gigabytes."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _has_no_other_fields(self) -> Self:
        if self.model_extra:
            some = ", ".join(repr(field[:MAX_SHOWN]) for field in islice(self.model_extra, MAX_PROBLEMS))
            raise ValueError(f"there are {len(self.model_extra)} unknown fields, among them {some}")
        return self


class InputTensor(RequestModel):
    """The images: uint8 codes ``shape``, nested like ``shape`` or flat in C order."""

    name: Literal["image"]
    datatype: Literal["UINT8"]
    shape: Annotated[list[Count], Field(min_length=1, max_length=4, fail_fast=True)]
    data: list[JsonValue]
    parameters: dict[str, JsonValue] = Field(default_factory=dict)


class RequestedOutput(RequestModel):
    """An output the client wants; the protocol's parameters concern extensions that are not offered here."""

    name: Literal["readout", "class", "logits"]
    parameters: dict[str, JsonValue] = Field(default_factory=dict)


class InferenceRequest(RequestModel):
    """Body of an inference request; without ``outputs``, all of them are answered."""

    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1, fail_fast=True)]
    outputs: Annotated[tuple[RequestedOutput, ...], Field(max_length=3, fail_fast=True)] = ()
    id: str | None = None
    parameters: dict[str, JsonValue] = Field(default_factory=dict)


def create_app(bundle: Bundle, runtime: Runtime, name: str = "model") -> Starlette:
    """The server as an ASGI application, ready from the start: the golden traces are verified here.

    Args:
        bundle: what the runtime was opened on.
        runtime: runs one request at a time, in a thread.
        name: of the model, in the paths.

    Raises:
        SpikeguardError: if the runtime does not leave the readouts of the bundle's golden traces.
    """
    require_golden_readouts(bundle, runtime)
    network, lock = bundle.network, Lock()

    def answer(body: bytes) -> dict[str, Any]:
        # Parsing is locked too: JSON takes several times the memory of its text.
        with lock:
            try:
                request = parse_strict(InferenceRequest, body, "request", REMEDY)
                images = read_images(request.inputs[0], network)
            except SpikeguardError as error:
                raise HTTPException(400, _sentence(error)) from error
            tensors = _outputs(network, runtime.run(images).readouts)
            wanted: list[str] = [output.name for output in request.outputs]
            identity = {} if request.id is None else {"id": request.id}
            return {"model_name": name, **identity, "outputs": [tensors[output] for output in wanted or tensors]}

    def known(request: Request) -> None:
        if request.path_params["name"] != name:
            raise HTTPException(404, f"there is no model {request.path_params['name']!r}; this server has {name!r}")

    async def live(_request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(_request: Request) -> Response:
        return JSONResponse({"ready": True})

    async def server(_request: Request) -> Response:
        return JSONResponse({"name": "spikeguard", "version": metadata.version("spikeguard"), "extensions": []})

    async def model(request: Request) -> Response:
        known(request)
        return JSONResponse(_model_metadata(network, runtime, name))

    async def model_ready(request: Request) -> Response:
        known(request)
        return JSONResponse({"name": name, "ready": True})

    async def infer(request: Request) -> Response:
        known(request)
        return JSONResponse(await run_in_threadpool(answer, await _limited_body(request)))

    return Starlette(
        routes=[
            Route("/v2", server),
            Route("/v2/health/live", live),
            Route("/v2/health/ready", ready),
            Route("/v2/models/{name}", model),
            Route("/v2/models/{name}/ready", model_ready),
            Route("/v2/models/{name}/infer", infer, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: _refused,
            SpikeguardError: _not_finished,
            ClientDisconnect: _gone,
        },
    )


def require_golden_readouts(bundle: Bundle, runtime: Runtime) -> None:
    """Run the golden inputs and compare.

    Raises:
        SpikeguardError: if there are none, or a readout differs.
    """
    golden = bundle.golden
    if not golden.trace.samples:
        raise SpikeguardError(f"{bundle.path} has no golden traces to verify {runtime.name} with; export it again")
    differing = compare_traces(Trace(golden.trace.readouts), runtime.run(golden.codes)).readouts
    if differing:
        raise SpikeguardError(
            f"{runtime.name} leaves {differing} of {golden.trace.readouts.size} golden readouts of {bundle.path} "
            "otherwise than the bundle says; run 'spikeguard verify' on it and export it again"
        )


def read_images(tensor: InputTensor, network: IntegerNetwork) -> NDArray[np.uint8]:
    """The codes ``(samples, *shape)`` of an input tensor.

    Raises:
        RuleViolations: if the data do not have the stated shape and type, or are no input of the network.
    """
    shape = tuple(tensor.shape)
    if len(shape) != 1 + len(network.input.shape) or shape[1:] != network.input.shape:
        allowed = f"[N, {', '.join(map(str, network.input.shape))}]"
        raise _refusal("shape is that of a batch of images", str(tensor.shape), allowed)
    if shape[0] > MAX_IMAGES:
        raise _refusal("images per request", f"{shape[0]:,}", f"{MAX_IMAGES:,}")
    values = _flatten(tensor.data, shape)
    kinds = {type(value).__name__ for value in values}
    if kinds != {"int"}:  # exactly: JSON's true is no code
        raise _refusal("data are integers", ", ".join(sorted(kinds)), f"integers 0..{network.input.max_code}")
    low, high = min(values), max(values)
    if low < 0 or high > MAX_CODE:
        raise _refusal("data are UINT8", f"{low}..{high}" if max(-low, high) < 2**31 else "more", f"0..{MAX_CODE}")
    codes = np.array(values, np.uint8).reshape(shape)
    network.input.present(codes)
    return codes


def _flatten(data: Sequence[Any], shape: Shape) -> Sequence[Any]:
    values = data
    if any(type(item) is list for item in data):
        if len(data) != shape[0]:
            raise _refusal("nested data have the stated shape", f"{len(data)} images", str(shape[0]))
        for size in shape[1:]:
            if not all(type(item) is list and len(item) == size for item in values):
                raise _refusal("nested data have the stated shape", "another", f"{size} values in each list")
            values = list(chain.from_iterable(values))
    if len(values) != prod(shape):
        raise _refusal("data have the stated shape", f"{len(values):,} values", f"{prod(shape):,}")
    return values


def _refusal(rule: str, actual: str, limit: str) -> RuleViolations:
    return RuleViolations("request", [Violation("image", rule, actual, limit, REMEDY)])


def _sentence(error: SpikeguardError) -> str:
    if not isinstance(error, RuleViolations):
        return str(error)
    shown = [f"{v.object}: {v.rule} (has {v.actual}, allowed {v.limit})" for v in error.violations[:MAX_PROBLEMS]]
    more = len(error.violations) - len(shown)
    return "; ".join([*shown, *([f"{more} more problems"] if more else []), error.violations[0].remedy])


def _outputs(network: IntegerNetwork, readouts: NDArray[np.int64]) -> dict[str, dict[str, Any]]:
    arrays = {
        "readout": ("INT64", readouts),
        "class": ("INT64", readouts.argmax(1)),
        "logits": ("FP64", network.logits(readouts)),
    }
    return {
        name: {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.ravel().tolist()}
        for name, (datatype, array) in arrays.items()
    }


def _model_metadata(network: IntegerNetwork, runtime: Runtime, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "versions": [],
        "platform": f"spikeguard_{runtime.name}",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, *network.input.shape]}],
        "outputs": [
            {"name": "readout", "datatype": "INT64", "shape": [-1, network.classes]},
            {"name": "class", "datatype": "INT64", "shape": [-1]},
            {"name": "logits", "datatype": "FP64", "shape": [-1, network.classes]},
        ],
    }


async def _limited_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():  # counted here, for Content-Length may be missing or wrong
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES:,} bytes; send fewer images at once")
    return bytes(body)


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _not_finished(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 500)


async def _gone(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "the client left before its request was complete"}, 400)
