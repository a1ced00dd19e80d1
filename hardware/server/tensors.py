"""Tensors of the Open Inference Protocol to arrays and back: in JSON, or as little-endian bytes behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.network import Shape
from hardware.server.protocol import MAX_PROBLEMS, REMEDY, InferenceRequest, InputTensor, parse_request

MAX_CODE = 255
MAX_STRUCTURE = 2**18
"""Images need one list per row; each list, object or text takes twenty times the memory of a number."""
_ENCODER = json.JSONEncoder(separators=(",", ":"))
TYPES: Mapping[str, np.dtype[Any]] = {
    "UINT8": np.dtype("u1"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "INT64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class InputForm:
    """What a model takes.

    Attributes:
        shape: of one input: an image, or ``(steps, *image)`` for inputs that change over time.
        max_code: largest code.
    """

    shape: Shape
    max_code: int


def read_body(body: bytes, header_length: bytes | None, form: InputForm, most: int) -> tuple[InferenceRequest, Any]:
    """The request and the codes ``(samples, *shape)`` of its images.

    Args:
        body: JSON, and binary data behind it if there is a header length.
        header_length: of the HTTP header that says where the JSON ends.
        form: of the model's inputs.
        most: images in one request.

    Raises:
        SpikeguardError: all that is wrong with the request, or is no input of the network.
    """
    text, binary = body, b""
    if header_length is not None:
        length = int(header_length) if header_length.isdigit() and len(header_length) < 20 else -1
        if not 0 <= length <= len(body):
            actual = header_length[:20].decode("ascii", "replace")
            raise _refusal("header length lies within the body", actual, f"0..{len(body)}")
        text, binary = body[:length], body[length:]
    structure = sum(text.count(mark) for mark in (b"[", b"{", b'"'))
    if structure > MAX_STRUCTURE:
        raise _refusal("lists, objects and texts of the JSON", f"{structure:,}", f"{MAX_STRUCTURE:,}")
    request = parse_request(text)
    return request, read_images(request.inputs[0], binary, form, most)


def read_images(tensor: InputTensor, binary: bytes, form: InputForm, most: int) -> NDArray[np.uint8]:
    """The codes ``(samples, *shape)`` of an input tensor.

    Numbers in [0, 1] are multiplied by the largest code in double precision and rounded to the nearest integer, ties
    to the even one: ``k / 255`` is read as the code ``k``, in single precision too.

    Raises:
        RuleViolations: if the data do not have the stated shape and type, or are no input of the network.
    """
    shape = tuple(tensor.shape)
    if shape[1:] != form.shape:
        allowed = f"[N, {', '.join(map(str, form.shape))}]"
        raise _refusal("shape is that of a batch of images", str(tensor.shape), allowed)
    if shape[0] > most:
        raise _refusal("images per request", f"{shape[0]:,}", f"{most:,}")
    kind = TYPES[tensor.datatype]
    expected = prod(shape) * kind.itemsize if tensor.data is None else 0
    if len(binary) != expected or tensor.binary_size not in (None, expected):
        actual = f"{len(binary):,}, stated {tensor.binary_size}"
        raise _refusal("bytes behind the JSON", actual, f"{expected:,}")
    values: NDArray[Any]
    if tensor.data is None:
        values = np.frombuffer(binary, kind).reshape(shape)
    else:
        values = _from_json(tensor.data, shape, kind, form.max_code)
    if kind.kind == "f":
        return _rounded(values, form.max_code)
    if form.max_code < MAX_CODE and values.max() > form.max_code:
        raise _refusal("codes are in range", f"up to {values.max()}", f"0..{form.max_code}")
    return values


def _from_json(data: Sequence[Any], shape: Shape, kind: np.dtype[Any], max_code: int) -> NDArray[Any]:
    values = _flatten(data, shape)
    kinds = {type(value).__name__ for value in values}
    if kind.kind == "f":
        if not kinds <= {"int", "float"}:
            raise _refusal("data are numbers", ", ".join(sorted(kinds)), "numbers in [0, 1]")
        if not all(0 <= value <= 1 for value in values):  # before the conversion, which overflows for 10**400
            raise _refusal("data are in range", "values outside", "numbers in [0, 1]")
        return np.array(values, kind).reshape(shape)
    if kinds != {"int"}:  # exactly: JSON's true is no code
        raise _refusal("data are integers", ", ".join(sorted(kinds)), f"integers 0..{max_code}")
    low, high = min(values), max(values)
    if low < 0 or high > MAX_CODE:
        raise _refusal("data are UINT8", f"{low}..{high}" if max(-low, high) < 2**31 else "more", f"0..{MAX_CODE}")
    return np.array(values, kind).reshape(shape)


def _rounded(values: NDArray[Any], max_code: int) -> NDArray[np.uint8]:
    if not (values.min() >= 0 and values.max() <= 1):  # so that NaN is refused too
        raise _refusal("data are in range", "values outside", "numbers in [0, 1]")
    return np.rint(values.astype(np.float64) * max_code).astype(np.uint8)


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


def write_body(
    model: str, identity: str | None, outputs: Mapping[str, NDArray[Any]], wanted: Mapping[str, bool]
) -> tuple[bytes, int | None]:
    """The body of an answer, and how many bytes of it are JSON if binary data follow.

    Args:
        model: its name.
        identity: of the request.
        outputs: by name, int64 or float64.
        wanted: names of the outputs to answer, and whether as binary data.
    """
    rows, tail = [], []
    for name, binary in wanted.items():
        array = outputs[name]
        row: dict[str, Any] = {"name": name, "datatype": "INT64" if array.dtype.kind == "i" else "FP64"}
        row["shape"] = list(array.shape)
        if binary:
            content = array.astype(TYPES[row["datatype"]], copy=False).tobytes()
            row["parameters"] = {"binary_data_size": len(content)}
            tail.append(content)
        else:
            row["data"] = array.ravel().tolist()
        rows.append(row)
    answer: dict[str, Any] = {"model_name": model, "outputs": rows}
    if identity is not None:
        answer["id"] = identity
    text = _ENCODER.encode(answer).encode()
    return (b"".join([text, *tail]), len(text)) if tail else (text, None)


def sentence(error: SpikeguardError) -> str:
    """One line for an answer: the first problems of several."""
    if not isinstance(error, RuleViolations):
        return str(error)
    shown = [f"{v.object}: {v.rule} (has {v.actual}, allowed {v.limit})" for v in error.violations[:MAX_PROBLEMS]]
    more = len(error.violations) - len(shown)
    return "; ".join([*shown, *([f"{more} more problems"] if more else []), error.violations[0].remedy])


def _refusal(rule: str, actual: str, limit: str) -> RuleViolations:
    return RuleViolations("request", [Violation("image", rule, actual, limit, REMEDY)])
