"""Structured logs: a line of JSON for each event, on standard error, and nothing of what clients send."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

LOG = logging.getLogger("spikeguard.server")


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, event, what is passed as ``extra={"facts": {…}}``, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        facts: dict[str, Any] = getattr(record, "facts", {})
        row = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **facts,
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, default=str)


def log_as_json(level: str) -> None:
    """Send all that this server and what it runs on log to standard error.

    Args:
        level: "debug" has a line for each request, "info" for each change of state and each refusal, "warning" only
            for what went wrong.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    LOG.setLevel(level.upper())


def log(level: int, event: str, **facts: Any) -> None:
    """One event with its facts."""
    if LOG.isEnabledFor(level):
        LOG.log(level, event, extra={"facts": facts})
