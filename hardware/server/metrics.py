"""What the server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
IMAGES = tuple(2**power for power in range(11))
SPIKES = tuple(10.0**power * factor for power in range(1, 7) for factor in (1, 2, 5))


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        queued: how many images wait.
        ready: whether requests are answered.
    """

    def __init__(self, queued: Callable[[], float], ready: Callable[[], float]) -> None:
        self._registry = of = CollectorRegistry()
        ProcessCollector(registry=of)
        self._requests = Counter(
            "spikeguard_requests", "Inference requests that are over, by HTTP status", ["status"], registry=of
        )
        self._errors = Counter(
            "spikeguard_errors", "Inference requests that got no answer, by reason", ["reason"], registry=of
        )
        self._seconds = Histogram(
            "spikeguard_request_seconds", "From a request's headers to its answer", buckets=SECONDS, registry=of
        )
        self._batch = Histogram("spikeguard_batch_images", "Images that were run at once", buckets=IMAGES, registry=of)
        self._spikes = Histogram(
            "spikeguard_spikes_per_inference",
            "Of one image, over all neurons and steps: of those that were asked for and of samples",
            buckets=SPIKES,
            registry=of,
        )
        Gauge("spikeguard_queue_images", "Images that wait", registry=of).set_function(queued)
        Gauge("spikeguard_ready", "Whether the model is verified and answers", registry=of).set_function(ready)
        self._by_status: dict[int, Counter] = {}

    def request(self, status: int, seconds: float, reason: str = "") -> None:
        """One inference request is over, for a reason unless it was answered."""
        counter = self._by_status.get(status)
        if counter is None:
            counter = self._by_status[status] = self._requests.labels(str(status))
        counter.inc()
        self._seconds.observe(seconds)
        if reason:
            self._errors.labels(reason).inc()

    def batch(self, images: int) -> None:
        """One batch is over."""
        self._batch.observe(images)

    def spikes(self, counts: NDArray[np.int64]) -> None:
        """Spikes ``(samples, populations)`` were counted."""
        for total in counts.sum(axis=1).tolist():
            self._spikes.observe(total)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
