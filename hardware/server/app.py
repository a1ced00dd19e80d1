"""The routes of the Open Inference Protocol (REST, JSON and binary tensors) and of Prometheus.

Errors are ``{"error": sentence}``: 400 for a request that is not well formed, 404 for an unknown path or model, 408
for a body that does not arrive in time, 413 for one that is too large, 415 for one that is compressed, 503 with
``Retry-After`` while the model is not verified or too much waits, 504 for an answer that is not ready in time, 500 if
the runtime did not finish.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from hardware.server.logs import log
from hardware.server.metrics import CONTENT_TYPE
from hardware.server.protocol import HEADER_LENGTH
from hardware.server.service import RefusedError, Service

EXTENSIONS = ["binary_tensor_data"]


def create_app(service: Service) -> Starlette:
    """The service as an ASGI application. Its model is loaded while it runs; until then it is live, but not ready."""
    name = service.settings.name
    version = metadata.version("spikeguard")

    def known(request: Request) -> None:
        if request.path_params["name"] != name:
            asked = request.path_params["name"][:100]
            raise RefusedError(404, "unknown_model", f"there is no model {asked!r}; this server has {name!r}")

    async def live(_request: Request) -> Response:
        return _json({"live": True})

    async def ready(_request: Request) -> Response:
        return _json({"ready": service.state == "ready"}, 200 if service.state == "ready" else 503)

    async def server(_request: Request) -> Response:
        return _json({"name": "spikeguard", "version": version, "extensions": EXTENSIONS})

    async def model(request: Request) -> Response:
        known(request)
        model = service.model()
        limits = {
            "max_images": service.settings.images,
            "max_body_bytes": service.settings.body_bytes,
            "runtime": model.runtime.name,
            "runtime_version": model.runtime.version,
        }
        return _json(model.metadata(name, limits))

    async def model_ready(request: Request) -> Response:
        known(request)
        is_ready = service.state == "ready"
        return _json({"name": name, "ready": is_ready}, 200 if is_ready else 503)

    async def infer(request: Request) -> Response:
        start = time.perf_counter()
        status, reason = 500, "internal"
        try:
            known(request)
            body, header_length = await service.infer(request.receive, dict(request.scope["headers"]))
            status, reason = 200, ""
        except RefusedError as error:
            status, reason = error.status, error.reason
            raise
        except ClientDisconnect:
            status, reason = 499, "client_left"
            raise
        finally:
            seconds = time.perf_counter() - start
            service.metrics.request(status, seconds, reason)
            level = logging.DEBUG if status == 200 else logging.ERROR if status == 500 else logging.INFO
            log(level, "request", status=status, milliseconds=round(1000 * seconds, 3), reason=reason)
        if header_length is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={HEADER_LENGTH: str(header_length)})

    async def metrics(_request: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.start())
        yield
        await loading
        service.close()

    return Starlette(
        routes=[
            Route("/v2/models/{name}/infer", infer, methods=["POST"]),
            Route("/v2", server),
            Route("/v2/health/live", live),
            Route("/v2/health/ready", ready),
            Route("/v2/models/{name}", model),
            Route("/v2/models/{name}/ready", model_ready),
            Route("/metrics", metrics),
        ],
        exception_handlers={
            HTTPException: _http_error,
            RefusedError: _refused,
            ClientDisconnect: _gone,
            Exception: _broken,
        },
        lifespan=lifespan,
    )


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    content = json.dumps(value, separators=(",", ":"))
    return Response(content, status, headers, media_type="application/json")


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code, error.headers)


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return _json({"error": error.text}, error.status, headers)


async def _gone(_request: Request, _error: Exception) -> Response:
    return _json({"error": "the client left before its request was complete"}, 400)


async def _broken(_request: Request, _error: Exception) -> Response:
    return _json({"error": "an unexpected error, which is in this server's log; report it"}, 500)
