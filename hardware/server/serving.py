"""Runs the application: listening, time limits for connections, and an end that leaves no request unanswered."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import HANDLED_SIGNALS, ServerState

from hardware.errors import SpikeguardError
from hardware.server.app import create_app
from hardware.server.logs import log, log_as_json
from hardware.server.model import ServedModel
from hardware.server.service import Service, Settings

BACKLOG = 2048
POLL_SECONDS = 0.05
TICKS_PER_SECOND = 10
SLOW_CLIENT = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: 62\r\nconnection: close\r\n\r\n"
    b'{"error":"the request did not arrive in time; send it faster"}'
)


def serve(load: Callable[[], ServedModel], settings: Settings, host: str, port: int, log_level: str) -> None:
    """Serve until SIGTERM or SIGINT, and return when every request that was accepted is answered.

    The model is loaded and verified while the server listens already: it is live, but not ready.

    Args:
        load: makes the verified model.
        settings: limits and sizes.
        host: address to listen on.
        port: of TCP; 0 for any that is free (the log says which).
        log_level: debug, info or warning.

    Raises:
        SpikeguardError: if the address cannot be used, or the model could not be loaded or verified.
    """
    log_as_json(log_level)
    service = Service(load, settings)
    config = uvicorn.Config(
        create_app(service),
        loop="uvloop",
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.connections,
        timeout_keep_alive=max(1, round(settings.timeout)),
        timeout_graceful_shutdown=max(1, round(2 * settings.timeout)),
    )
    with _listening(host, port) as listener:
        log(logging.INFO, "listening", host=host, port=listener.getsockname()[1], model=settings.name)
        _Server(config, service).run([listener])
    log(logging.INFO, "stopped")
    if service.failure is not None:
        raise service.failure


class _State(ServerState):
    """What connections share; while draining, each closes after its answer."""

    draining = False


class _Server(uvicorn.Server):
    """Stops when its model cannot be served; on a signal it first lets its clients know, then stops listening."""

    server_state: _State

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.server_state = _State()
        self._service = service

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_PER_SECOND == 0:
            self._give_up_late_ones()
        return await super().on_tick(counter) or self._service.state == "failed"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Clients that reuse connections are told to leave: a request that is on its way meets no closed socket."""
        seconds = self._service.settings.drain_seconds
        log(logging.INFO, "draining", seconds=seconds, connections=len(self.server_state.connections))
        self._service.drain()
        self.server_state.draining = True
        for connection in self.server_state.connections:
            if isinstance(connection, _Protocol):
                connection.close_after_answer()
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._service.failure is None and not self.force_exit:
            await asyncio.sleep(POLL_SECONDS)
        watch = asyncio.create_task(self._watch())
        await super().shutdown(sockets)
        watch.cancel()

    async def _watch(self) -> None:
        """Ticks have ended; clients can be late all the same."""
        while True:
            await asyncio.sleep(1)
            self._give_up_late_ones()

    def _give_up_late_ones(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            if isinstance(connection, _Protocol):
                connection.give_up_if_late(now)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As its parent, but a signal that was obeyed is not raised again: the exit status is 0."""
        before = {kind: signal.signal(kind, self.handle_exit) for kind in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


class _Protocol(HttpToolsProtocol):
    """A connection that is given up if a request does not arrive in time, or its answer is not taken.

    Its deadline is looked at once a second: a timer for each request would cost more.
    """

    server_state: _State

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arriving = False
        self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._arriving = True
        self._wait()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.server_state.draining:
            self.close_after_answer()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._arriving = False
        self._deadline = math.inf

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else the next request came with it
            self._wait()

    def close_after_answer(self) -> None:
        """Let the answer to the request that is being served be the last one."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def give_up_if_late(self, now: float) -> None:
        """End the connection if its client has kept this server waiting for too long."""
        if now < self._deadline:
            return
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if self._arriving and not answering and not self.transport.is_closing():
            log(logging.INFO, "request", status=408, reason="slow_client")
            self.transport.write(SLOW_CLIENT)
            self.transport.close()
            self._wait()
        else:
            self.transport.abort()

    def _wait(self) -> None:
        self._deadline = self.loop.time() + self.timeout_keep_alive


@contextmanager
def _listening(host: str, port: int) -> Iterator[Any]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise SpikeguardError(
            f"cannot listen on {host} port {port} ({error}); choose another --host or --port"
        ) from error
    with listener:
        yield listener
