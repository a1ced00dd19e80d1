"""A handler that does nothing, on the framework of the server: reads the body, answers always the same.

Run it as ``python -m tests.benchmarks.empty_server PORT CLASSES``. What it answers is well formed, so that the official
client takes it.
"""

from __future__ import annotations

import sys

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hardware.server.protocol import HEADER_LENGTH
from hardware.server.tensors import write_body


def main() -> None:
    """See the module."""
    port, classes = map(int, sys.argv[1:])
    body, length = write_body("model", None, {"readout": np.zeros((1, classes), np.int64)}, {"readout": True})

    async def empty(request: Request) -> Response:
        await request.body()
        return Response(body, media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)})

    async def ready(_request: Request) -> Response:
        return Response()

    app = Starlette(
        routes=[
            Route("/v2/models/{name}/infer", empty, methods=["POST"]),
            Route("/v2/health/ready", ready),
        ]
    )
    uvicorn.run(app, port=port, loop="uvloop", http="httptools", log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
