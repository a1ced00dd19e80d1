"""The Open Inference Protocol's words: the records of a request, and the names this server gives to its tensors."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from hardware.formats.strict import MAX_SHOWN, StrictModel, parse_strict

HEADER_LENGTH = "Inference-Header-Content-Length"
"""Where binary tensors follow the JSON of a body, this HTTP header says how many bytes that JSON has."""
REMEDY = "send what GET /v2/models/NAME describes"
IMAGE, READOUT, CLASS, LOGITS, SPIKES = "image", "readout", "class", "logits", "spike_counts"
DEFAULT_OUTPUTS = (READOUT, CLASS, LOGITS)
"""What is answered if a request names no outputs: counting spikes takes more time, so it must be asked for."""
MAX_PROBLEMS = 5
NOT_OFFERED = frozenset(
    {
        "classification",
        "sequence_id",
        "shared_memory_region",
        "shared_memory_byte_size",
        "shared_memory_offset",
    }
)
"""Parameters of extensions that change what an answer means; others that are unknown concern nothing here."""

Count = Annotated[int, Field(ge=1)]
Datatype = Literal["UINT8", "FP32", "FP64"]


class RequestModel(StrictModel):
    """A strict record that names unknown fields in one error: one each, for a body full of them, takes gigabytes."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _has_no_other_fields(self) -> Self:
        if self.model_extra:
            some = ", ".join(repr(field[:MAX_SHOWN]) for field in islice(self.model_extra, MAX_PROBLEMS))
            raise ValueError(f"there are {len(self.model_extra)} unknown fields, among them {some}")
        return self


class _WithParameters(RequestModel):
    parameters: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _asks_for_no_extension(self) -> Self:
        if asked := sorted(NOT_OFFERED & self.parameters.keys()):
            raise ValueError(f"parameters that are not offered here: {', '.join(asked)}")
        for name in ("binary_data", "binary_data_output"):
            if not isinstance(self.parameters.get(name, False), bool):
                raise ValueError(f"the parameter {name} is neither true nor false")
        return self


class InputTensor(_WithParameters):
    """The images: of ``shape``, as ``data`` nested like it or flat in C order, or as bytes behind the JSON."""

    name: Literal["image"]
    datatype: Datatype
    shape: Annotated[list[Count], Field(min_length=1, max_length=5, fail_fast=True)]
    data: list[JsonValue] | None = None

    @model_validator(mode="after")
    def _has_its_data_once(self) -> Self:
        size = self.parameters.get("binary_data_size")
        if size is None and self.data is None:
            raise ValueError("there is neither data nor the parameter binary_data_size")
        if size is not None and (self.data is not None or type(size) is not int or size < 0):
            raise ValueError("binary_data_size is the number of bytes behind the JSON, and there is no data then")
        return self

    @property
    def binary_size(self) -> int | None:
        """Bytes behind the JSON; None where the data are in it."""
        size = self.parameters.get("binary_data_size")
        return size if isinstance(size, int) else None


class RequestedOutput(_WithParameters):
    """An output the client wants; the parameter ``binary_data`` says how."""

    name: Literal["readout", "class", "logits", "spike_counts"]


class InferenceRequest(_WithParameters):
    """Body of an inference request. The path says which model is meant; KServe's client says it here once more."""

    model_config = ConfigDict(protected_namespaces=())

    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1, fail_fast=True)]
    outputs: Annotated[tuple[RequestedOutput, ...], Field(max_length=4, fail_fast=True)] = ()
    id: str | None = None
    model_name: str | None = None
    model_version: str | None = None

    @model_validator(mode="after")
    def _wants_each_output_once(self) -> Self:
        if len({output.name for output in self.outputs}) < len(self.outputs):
            raise ValueError("an output is named twice")
        return self

    def wanted(self) -> dict[str, bool]:
        """The outputs to answer, and whether as binary data."""
        binary = self.parameters.get("binary_data_output") is True
        if not self.outputs:
            return dict.fromkeys(DEFAULT_OUTPUTS, binary)
        return {output.name: output.parameters.get("binary_data", binary) is True for output in self.outputs}


def parse_request(text: bytes) -> InferenceRequest:
    """The JSON of a request, already limited in size.

    Raises:
        RuleViolations: all that is wrong with it.
    """
    return parse_strict(InferenceRequest, text, "request", REMEDY)
