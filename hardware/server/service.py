"""The service behind the routes: loads and verifies its model, takes bodies within limits, and answers them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from hardware.errors import SpikeguardError
from hardware.files import MIB
from hardware.server.batching import Answer, Batcher, FullError
from hardware.server.logs import log
from hardware.server.metrics import Metrics
from hardware.server.model import ServedModel
from hardware.server.protocol import HEADER_LENGTH, SPIKES
from hardware.server.tensors import read_body, sentence, write_body

BUFFER_BYTES = 32 * MIB
"""Of all bodies that are being received or read; a body alone may have more."""
INLINE_BYTES = 2**16
"""Longer bodies are read in a thread, one at a time: JSON takes time, and several times the memory of its text."""
HEADER_LENGTH_KEY = HEADER_LENGTH.lower().encode()
COMPUTING_HERE = ("emulator", "onnxruntime")
"""Runtimes that wait for nothing but their own arithmetic."""
State = Literal["loading", "ready", "failed", "draining"]


@dataclass(frozen=True)
class Settings:
    """Limits and sizes of a server.

    Attributes:
        name: of the model, in the paths.
        batch: images that the runtime gets at once.
        queue: images that may wait.
        concurrency: batches that run at the same time.
        images: in one request.
        body_bytes: of one request.
        timeout: seconds for a request to arrive, and for its answer.
        connections: that may be open at once.
        drain_seconds: between SIGTERM and the end of listening; a load balancer notices in that time.
        count_spikes_every: requests, the spikes of one of which are counted for the metrics; 0 counts only what is
            asked for.
    """

    name: str = "model"
    batch: int = 64
    queue: int = 1024
    concurrency: int = 1
    images: int = 1024
    body_bytes: int = 8 * MIB
    timeout: float = 30.0
    connections: int = 1024
    drain_seconds: float = 1.0
    count_spikes_every: int = 1000


class RefusedError(Exception):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        reason: a word for the metrics.
        text: the sentence for the client.
        retry_after: seconds, where trying again helps.
    """

    def __init__(self, status: int, reason: str, text: str, retry_after: int | None = None) -> None:
        self.status, self.reason, self.text, self.retry_after = status, reason, text, retry_after
        super().__init__(text)


class Service:
    """One model and what it needs to be served; starts empty.

    Args:
        load: makes the verified model; runs in a thread.
        settings: limits and sizes.

    Attributes:
        state: requests are answered in "ready" and "draining".
        failure: why the model could not be loaded.
    """

    def __init__(self, load: Callable[[], ServedModel], settings: Settings) -> None:
        self.settings = settings
        self.state: State = "loading"
        self.failure: Exception | None = None
        self.metrics = Metrics(
            lambda: self._batcher.queued if self._batcher else 0, lambda: float(self.state == "ready")
        )
        self._load = load
        self._model: ServedModel | None = None
        self._batcher: Batcher | None = None
        self._buffered = 0
        self._requests = 0
        self._reading = asyncio.Lock()

    async def start(self) -> None:
        """Load and verify the model; afterwards the state is "ready" or "failed"."""
        try:
            model = await asyncio.to_thread(self._load)
        except Exception as error:
            self.failure, self.state = error, "failed"
            known = isinstance(error, (SpikeguardError, OSError))
            log(logging.ERROR, "never ready", reason=str(error) if known else repr(error))
            return
        settings = self.settings
        self._model = model
        self._batcher = Batcher(
            model.run,
            settings.batch,
            settings.queue,
            settings.concurrency,
            settings.timeout,
            model.runtime.name in COMPUTING_HERE,
            self.metrics.batch,
        )
        if self.state == "loading":
            self.state = "ready"
        log(logging.INFO, "ready", runtime=model.runtime.name, version=model.runtime.version, model=settings.name)

    def drain(self) -> None:
        """From now on say that this server is not ready, and answer all the same."""
        self.state = "draining"

    def close(self) -> None:
        """Wait for what runs."""
        if self._batcher is not None:
            self._batcher.close()

    def model(self) -> ServedModel:
        """The verified model.

        Raises:
            RefusedError: if there is none yet.
        """
        if self._model is None:
            raise RefusedError(503, "not_ready", "the model is not verified yet; try again soon", retry_after=1)
        return self._model

    async def infer(self, receive: Receive, headers: Mapping[bytes, bytes]) -> tuple[bytes, int | None]:
        """Answer a request; see :func:`~hardware.server.tensors.write_body` for what is returned.

        Args:
            receive: gives the parts of its body, as ASGI does.
            headers: by name in lower case.

        Raises:
            RefusedError: if there is no answer to it.
            ClientDisconnect: if the client left before the body was complete.
        """
        model = self.model()
        batcher, settings = self._batcher, self.settings
        assert batcher is not None
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise RefusedError(415, "malformed", "compressed bodies are not taken; send the body as it is")
        body = await self._receive(receive, headers.get(b"content-length", b""))
        header_length = headers.get(HEADER_LENGTH_KEY)
        try:
            if len(body) <= INLINE_BYTES:
                request, codes = read_body(body, header_length, model.form, settings.images)
            else:
                async with self._reading:
                    request, codes = await asyncio.to_thread(
                        read_body, body, header_length, model.form, settings.images
                    )
        except SpikeguardError as error:
            raise RefusedError(400, "malformed", sentence(error)) from error
        finally:
            self._buffered -= len(body)
        wanted = request.wanted()
        if SPIKES in wanted and not model.spiking:
            raise RefusedError(400, "malformed", f"the runtime {model.runtime.name} does not expose spikes")
        answer = await self._answer(batcher, codes, SPIKES in wanted)
        return write_body(settings.name, request.id, model.outputs(answer), wanted)

    async def _answer(self, batcher: Batcher, codes: NDArray[np.uint8], counts_spikes: bool) -> Answer:
        self._requests += 1
        every = self.settings.count_spikes_every
        sampled = every > 0 and self._requests % every == 0
        try:
            answer = await batcher.answer(codes, counts_spikes or sampled)
        except FullError as error:
            raise RefusedError(503, "queue_full", str(error), error.seconds) from error
        except TimeoutError as error:
            text = f"there was no answer within {self.settings.timeout:g} s; send fewer images at once or try again"
            raise RefusedError(504, "timeout", text) from error
        except SpikeguardError as error:
            raise RefusedError(500, "runtime", str(error)) from error
        if answer.spikes is not None and (counts_spikes or sampled):
            self.metrics.spikes(answer.spikes)
        return answer

    async def _receive(self, receive: Receive, stated: bytes) -> bytes:
        """The body, within the limits; its bytes count as buffered until the caller takes them back."""
        limit = self.settings.body_bytes
        too_large = f"the body has more than {limit:,} bytes; send fewer images at once"
        if stated.isdigit() and int(stated[:20]) > limit:
            raise RefusedError(413, "too_large", too_large)
        parts: list[bytes] = []
        size = 0
        try:
            while True:  # counted here, for Content-Length may be missing or wrong
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self._buffered += len(parts[-1])
                if size > limit:
                    raise RefusedError(413, "too_large", too_large)
                if size < self._buffered > BUFFER_BYTES:
                    raise RefusedError(503, "busy", "too many large bodies arrive at once; try again in 1 s", 1)
                if not message.get("more_body", False):
                    break
        except BaseException:
            self._buffered -= size
            raise
        return parts[0] if len(parts) == 1 else b"".join(parts)
