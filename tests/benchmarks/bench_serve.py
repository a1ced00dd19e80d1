"""What serving costs: against plain ONNX Runtime, against a handler that does nothing, and in memory.

Run it as ``python -m tests.benchmarks.bench_serve [BUNDLE] [--requests 100000]``.

Whatever is compared takes turns, so that other load on the machine meets all alike; the ratio is the median over the
turns. Every answer of the server is held against the reference's readouts. Clients are of two kinds: bytes that were
prepared beforehand over 16 connections of one process, which cost next to nothing and show the server's own overhead;
and 16 processes with the official client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import tritonclient.http
import uvloop
from numpy.typing import NDArray

from hardware.emulator import run_emulator
from hardware.formats.bundle import Bundle, open_bundle
from hardware.runtimes.opening import open_runtime
from tests.served import Served, served, until

CLIENTS = 16
BATCH, BATCH_CLIENTS = 64, 2
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Load:
    """What a number of clients saw."""

    seconds: float
    latencies: list[float]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.latencies) / self.seconds

    def row(self, images: int = 1) -> str:
        """In words."""
        ordered = sorted(self.latencies)
        p50, p99 = (1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
        return f"{images * self.rate:7.0f} images/s, p50 {p50:6.2f} ms, p99 {p99:6.2f} ms"


def prepared(codes: Codes, expected: NDArray[np.int64]) -> tuple[bytes, bytes]:
    """A whole request for the readouts of images, and the end of its right answer."""
    size = {"binary_data_size": codes.nbytes}
    image = {"name": "image", "datatype": "UINT8", "shape": list(codes.shape), "parameters": size}
    wanted = {"name": "readout", "parameters": {"binary_data": True}}
    text = json.dumps({"inputs": [image], "outputs": [wanted]}).encode()
    head = f"POST /v2/models/model/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text) + codes.nbytes}\r\n"
    length = f"Inference-Header-Content-Length: {len(text)}\r\n\r\n"
    return head.encode() + length.encode() + text + codes.tobytes(), expected.astype("<i8").tobytes()


async def _client(port: int, requests: Sequence[tuple[bytes, bytes]], turns: int, latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for turn in range(turns):
        request, expected = requests[turn % len(requests)]
        start = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        latencies.append(time.perf_counter() - start)
        if not head.startswith(b"HTTP/1.1 200") or not body.endswith(expected):
            raise SystemExit(f"a wrong answer: {head!r}")
    writer.close()


def lean(port: int, requests: Sequence[tuple[bytes, bytes]], clients: int, turns: int) -> Load:
    """Prepared requests over some connections, each waiting for its answer before the next."""
    latencies: list[float] = []

    async def everyone() -> None:
        await asyncio.gather(*(_client(port, requests, turns, latencies) for _ in range(clients)))

    start = time.perf_counter()
    uvloop.run(everyone())
    return Load(time.perf_counter() - start, latencies)


def _official(port: int, codes: Codes, turns: int, barrier: Any, results: Any) -> None:
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")
    outputs = [tritonclient.http.InferRequestedOutput("readout", True)]
    latencies = []

    def ask() -> None:
        given = tritonclient.http.InferInput("image", [1, *codes.shape[1:]], "UINT8")
        given.set_data_from_numpy(codes[:1])
        client.infer("model", [given], outputs=outputs).as_numpy("readout")

    ask()
    barrier.wait()
    begin = time.time()
    for _ in range(turns):
        start = time.perf_counter()
        ask()
        latencies.append(time.perf_counter() - start)
    results.put((begin, time.time(), latencies))


def official(port: int, codes: Codes, clients: int, turns: int) -> Load:
    """The official client, in a process each."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(clients), context.Queue()
    processes = [context.Process(target=_official, args=(port, codes, turns, barrier, results)) for _ in range(clients)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    span = max(end for _, end, _ in found) - min(begin for begin, _, _ in found)
    return Load(span, [latency for _, _, latencies in found for latency in latencies])


def compare(title: str, ours: Callable[[], Load], other: Callable[[], float], turns: int, images: int = 1) -> None:
    """Take turns and print the ratio of images per second."""
    loads, ratios, others = [], [], []
    for _ in range(turns):
        others.append(other())
        loads.append(ours())
        ratios.append(images * loads[-1].rate / others[-1])
    pooled = Load(sum(load.seconds for load in loads), [value for load in loads for value in load.latencies])
    print(
        f"{title:44} {pooled.row(images)}; other {statistics.median(others):7.0f} images/s; "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def raw(bundle: Bundle, codes: Codes, turns: int) -> float:
    """Images per second of ONNX Runtime in this process."""
    runtime = open_runtime("onnxruntime", bundle)
    runtime.run(codes)
    start = time.perf_counter()
    for _ in range(turns):
        runtime.run(codes)
    return turns * len(codes) / (time.perf_counter() - start)


def resident(server: Served) -> float:
    """MB of memory that the server says it holds."""
    text = server.get("/metrics")[1].decode()
    (row,) = [row for row in text.splitlines() if row.startswith("process_resident_memory_bytes ")]
    return float(row.split()[1]) / 1e6


def memory(server: Served, requests: Sequence[tuple[bytes, bytes]], count: int) -> None:
    """Send many requests in ten parts, and print the memory after each."""
    held = []
    for _ in range(10):
        lean(server.port, requests, CLIENTS, count // 10 // CLIENTS)
        held.append(resident(server))
    print(f"memory after each tenth of {count:,} requests: {', '.join(f'{value:.1f}' for value in held)} MB")
    print(f"memory grew by {held[-1] - held[0]:+.1f} MB from the first tenth to the last")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, default=Path("runs/demo/bundle"))
    parser.add_argument("--requests", type=int, default=100_000, help="of the measurement of memory")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    network = bundle.network
    codes = np.random.default_rng(0).integers(0, 256, (BATCH, *network.input.shape), np.uint8)
    expected = run_emulator(network, codes).readouts
    single = [prepared(codes[row : row + 1], expected[row : row + 1]) for row in range(BATCH)]
    whole = [prepared(codes, expected)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            name: stack.enter_context(served(bundle.path, folder, "--runtime", name)) for name in ("onnx", "emulator")
        }
        port = free_port()
        empty = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.empty_server", str(port), str(network.classes)]
        )
        stack.callback(empty.wait)
        stack.callback(empty.kill)
        until(lambda: answers(port))
        onnx = servers["onnx"].port
        compare(
            f"onnx, batch {BATCH}, {BATCH_CLIENTS} lean clients / raw ONNX Runtime",
            lambda: lean(onnx, whole, BATCH_CLIENTS, 100),
            lambda: raw(bundle, codes, 100),
            options.turns,
            BATCH,
        )
        nothing = [(request, b"") for request, _ in single]
        for name, server in servers.items():
            compare(
                f"{name}, batch 1, {CLIENTS} official clients / empty handler",
                lambda server=server: official(server.port, codes, CLIENTS, 200),
                lambda: official(port, codes, CLIENTS, 200).rate,
                options.turns,
            )
            compare(
                f"{name}, batch 1, {CLIENTS} lean clients / empty handler",
                lambda server=server: lean(server.port, single, CLIENTS, 400),
                lambda: lean(port, nothing, CLIENTS, 400).rate,
                options.turns,
            )
        memory(servers["onnx"], single, options.requests)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    """Whether a server is there."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1):
            return True
    except (URLError, OSError):
        return False


if __name__ == "__main__":
    main()
