"""A service as a runtime: exact readouts from the real server, a clear error for everything else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from exporters.bundle import write_bundle
from hardware.errors import SpikeguardError
from hardware.formats.bundle import Bundle, open_bundle
from hardware.network import IntegerNetwork
from hardware.reference import run_reference
from hardware.runtimes.opening import open_runtime
from hardware.runtimes.remote import RemoteRuntime
from tests.networks import random_codes, random_network
from tests.served import Served, served

READOUT = "readout"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("remote") / "bundle"
    network = random_network(np.random.default_rng(8), hidden=2, constant_channels=1)
    golden = random_codes(np.random.default_rng(0), network)
    write_bundle(folder, network, golden_codes=golden, float_model_files={}, provenance={}, models=())
    return open_bundle(folder)


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(bundle.path, tmp_path_factory.mktemp("log"), "--name", "digits", "--runtime", "emulator") as found:
        yield found


@pytest.mark.parametrize("samples", [0, 1, 64, 65, 300])
def test_readouts_are_the_reference_s(bundle: Bundle, server: Served, samples: int) -> None:
    runtime = open_runtime(f"{server.url}/v2/models/digits", bundle)
    codes = random_codes(np.random.default_rng(3), bundle.network, samples)
    for given in (codes, codes.astype(np.int64)):
        trace = runtime.run(given, record="traces")
        assert trace.populations == {}
        assert trace.readouts.dtype == np.int64
        assert np.array_equal(trace.readouts, run_reference(bundle.network, codes, "readouts").readouts)
    assert runtime.name == f"{server.url}/v2/models/digits"
    assert runtime.version.startswith("spikeguard ")
    assert "emulator" in runtime.version


def test_a_service_of_another_name_or_network_is_refused(bundle: Bundle, server: Served) -> None:
    with pytest.raises(SpikeguardError, match="is not ready"):
        open_runtime(server.url, bundle)  # it has no model "model"
    other = random_network(np.random.default_rng(1), kind="dense")
    with pytest.raises(SpikeguardError, match="takes image UINT8"):
        RemoteRuntime(f"{server.url}/v2/models/digits", other)


@pytest.mark.parametrize("codes", [np.full((1, 1), 0.5), np.full((1, 1), 256), np.full((1, 1), -1)])
def test_only_codes_of_bytes_are_sent(bundle: Bundle, server: Served, codes: Any) -> None:
    runtime = open_runtime(f"{server.url}/v2/models/digits", bundle)
    with pytest.raises(SpikeguardError, match=r"integers 0\.\.255"):
        runtime.run(codes)


def test_what_the_service_refuses_is_said_in_its_words(bundle: Bundle, server: Served) -> None:
    runtime = open_runtime(f"{server.url}/v2/models/digits", bundle)
    with pytest.raises(SpikeguardError, match=r"refused 2 images \(status 400\): image: shape"):
        runtime.run(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    "address",
    [
        "http://",
        "ftp://host",
        "http://host:port",
        "http://host:99999",
        "http://host/v2",
        "http://a:b@host",
        "http://h?q",
    ],
)
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(SpikeguardError, match="no address of a service"):
        RemoteRuntime(address, random_network(np.random.default_rng(0)))


def test_a_service_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(SpikeguardError, match=r"127\.0\.0\.1:9 does not answer"):
        RemoteRuntime("http://127.0.0.1:9", random_network(np.random.default_rng(0)))


Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Double:
    """Another implementation of the protocol, with faults: replies by method and last part of the path."""

    network: IntegerNetwork
    replies: dict[str, Callable[[bytes], Reply | None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def reply(self, path: str, body: bytes) -> Reply | None:
        kind = path.rpartition("/")[2]
        self.asked.append(kind)
        if kind in self.replies:
            return self.replies[kind](body)
        if kind == "ready":
            return 200, {}, b""
        if kind == "v2":
            return 200, {}, b'{"name": "triton", "version": "2.60", "extensions": ["x"]}'
        image = {"name": "image", "datatype": "UINT8", "shape": [-1, *self.network.input.shape]}
        readout = {"name": READOUT, "datatype": "INT32", "shape": [-1, self.network.classes]}
        return 200, {}, json.dumps({"platform": "onnx", "inputs": [image], "outputs": [readout]}).encode()


@contextmanager
def doubled(double: Double) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = double.reply(self.path, body)
            if reply is None:
                self.close_connection = True
                return
            status, headers, content = reply
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def answered(readouts: Any, **changes: Any) -> Reply:
    port = {"name": READOUT, "datatype": "INT32", "shape": list(readouts.shape), **changes}
    text = json.dumps({"model_name": "m", "outputs": [port]}).encode()
    return 200, {"Inference-Header-Content-Length": str(len(text))}, text + readouts.astype("<i4").tobytes()


@pytest.fixture
def double() -> Double:
    return Double(random_network(np.random.default_rng(8), hidden=1))


def test_other_servers_answer_with_32_bits_and_may_be_busy_or_gone_for_a_while(double: Double) -> None:
    codes = random_codes(np.random.default_rng(1), double.network, 3)
    expected = run_reference(double.network, codes, "readouts").readouts
    replies: Iterator[Reply | None] = iter([(503, {"Retry-After": "0"}, b"{}"), None, answered(expected)])
    double.replies["infer"] = lambda _body: next(replies)
    with doubled(double) as url:
        runtime = RemoteRuntime(url, double.network)
        assert runtime.version == "triton 2.60"
        assert np.array_equal(runtime.run(codes).readouts, expected)
    assert double.asked.count("infer") == 3


FAULTS: dict[str, tuple[str, Callable[[Any], Reply | None], str]] = {
    "not ready": ("ready", lambda _r: (400, {}, b""), "is not ready"),
    "no protocol": ("v2", lambda _r: (404, {}, b"no"), "does not speak the Open Inference Protocol"),
    "no JSON": ("v2", lambda _r: (200, {}, b"<html>"), "v2"),
    "no metadata": ("model", lambda _r: (200, {}, b'{"inputs": []}'), "outputs"),
    "no image": ("model", lambda _r: (200, {}, b'{"inputs": [], "outputs": []}'), "not this network's images"),
    "endless": ("v2", lambda _r: (200, {}, b" " * (2**20 + 1)), "more than"),
    "error without a sentence": ("infer", lambda _r: (500, {}, b"[" * 10), "status 500"),
    "other samples": ("infer", lambda r: answered(r[:-1]), "no readout of shape"),
    "other type": ("infer", lambda r: answered(r, datatype="FP32"), "no readout of shape"),
    "other output": ("infer", lambda r: answered(r, name="other"), "no readout of shape"),
    "too few bytes": ("infer", lambda r: answered(r[:-1], shape=list(r.shape)), "bytes of readout"),
    "busy": ("infer", lambda _r: (503, {"Retry-After": "9"}, b'{"error": "full"}'), "status 503.*full"),
    "gone": ("infer", lambda _r: None, "does not answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_service_are_one_sentence(double: Double, fault: str) -> None:
    codes = random_codes(np.random.default_rng(1), double.network, 3)
    expected = run_reference(double.network, codes, "readouts").readouts
    kind, reply, words = FAULTS[fault]
    double.replies[kind] = lambda _body: reply(expected)
    with doubled(double) as url, pytest.raises(SpikeguardError, match=words):
        RemoteRuntime(url, double.network, timeout=2).run(codes)


def test_a_silent_service_is_given_up(double: Double) -> None:
    go_on = threading.Event()

    def silent(_body: bytes) -> Reply:
        go_on.wait(10)
        return 500, {}, b""

    double.replies["infer"] = silent
    with doubled(double) as url:
        runtime = RemoteRuntime(url, double.network, timeout=0.3)
        with pytest.raises(SpikeguardError, match=r"did not answer within 0\.3 s"):
            runtime.run(random_codes(np.random.default_rng(1), double.network, 1))
        go_on.set()
