"""Strict parsing of JSON from outside: unknown or missing fields and wrong types are named, all at once."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hardware.errors import RuleViolations, Violation

Model = TypeVar("Model", bound="StrictModel")
MAX_SHOWN = 60
REMEDY = "export it again with the tool that made it"


class StrictModel(BaseModel):
    """A frozen record that takes exactly its fields, of exactly their types, and no NaN or infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def parse_strict(model: type[Model], content: bytes | str, subject: str, remedy: str = REMEDY) -> Model:
    """Parse JSON into ``model``.

    Args:
        model: what the JSON must be.
        content: JSON text, already limited in size.
        subject: what is parsed, for the message.
        remedy: the way out, for the message.

    Raises:
        RuleViolations: one row per field that is missing, unknown, of the wrong type or out of range.
    """
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        rows = [
            Violation(
                object=".".join(map(str, problem["loc"])) or subject,
                rule=problem["type"].replace("_", " "),
                actual=_shorten(repr(problem.get("input"))),
                limit=problem["msg"],
                remedy=remedy,
            )
            for problem in error.errors(include_url=False)
        ]
        raise RuleViolations(subject, rows) from error


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
