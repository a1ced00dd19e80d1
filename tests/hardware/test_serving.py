"""``spikeguard serve`` as a process: the official client, many clients at once, and faults."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
from geventhttpclient.response import HTTPConnectionClosed
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from exporters.bundle import write_bundle
from hardware.formats.bundle import ONNX_FILE, ONNX_STEP_FILE, Bundle, open_bundle
from hardware.reference import run_reference
from tests.networks import random_codes, random_network
from tests.served import Served, command, read_log, served

IMAGES = 1000
MODEL = "model"
HEAD = b"POST /v2/models/model/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
Readouts = NDArray[np.int64]
Codes = NDArray[np.uint8]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("served") / "bundle"
    network = random_network(np.random.default_rng(21), hidden=2, constant_channels=1)
    golden = random_codes(np.random.default_rng(0), network)
    models = (ONNX_FILE, ONNX_STEP_FILE)
    write_bundle(folder, network, golden_codes=golden, float_model_files={}, provenance={}, models=models)
    return open_bundle(folder)


@pytest.fixture(scope="module")
def codes(bundle: Bundle) -> Codes:
    return random_codes(np.random.default_rng(4), bundle.network, IMAGES)


@pytest.fixture(scope="module")
def expected(bundle: Bundle, codes: Codes) -> Readouts:
    return run_reference(bundle.network, codes, "readouts").readouts


@pytest.fixture(scope="module", params=["onnx", "emulator"])
def server(
    request: pytest.FixtureRequest, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with served(bundle.path, tmp_path_factory.mktemp("log"), "--runtime", request.param) as found:
        yield found


def tensor(codes: Codes, binary: bool) -> tritonclient.http.InferInput:
    given = tritonclient.http.InferInput("image", list(codes.shape), "UINT8")
    given.set_data_from_numpy(codes, binary_data=binary)
    return given


@pytest.mark.parametrize("binary", [True, False])
def test_the_official_client_gets_exact_answers(
    server: Served, bundle: Bundle, codes: Codes, expected: Readouts, binary: bool
) -> None:
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.get_server_metadata()["name"] == "spikeguard"
    assert client.get_model_metadata(MODEL)["inputs"][0]["shape"] == [-1, *bundle.network.input.shape]
    wanted = [tritonclient.http.InferRequestedOutput(name, binary) for name in ("readout", "class", "logits")]
    for first in range(0, IMAGES, 100):
        rows = slice(first, first + 100)
        result = client.infer(MODEL, [tensor(codes[rows], binary)], outputs=wanted, request_id=str(first))
        assert np.array_equal(result.as_numpy("readout"), expected[rows])
        assert np.array_equal(result.as_numpy("class"), expected[rows].argmax(1))
        assert np.array_equal(result.as_numpy("logits"), bundle.network.logits(expected[rows]))
        assert result.get_response()["id"] == str(first)
    defaults = client.infer(MODEL, [tensor(codes[:3], binary)])
    assert np.array_equal(defaults.as_numpy("readout"), expected[:3])
    with pytest.raises(InferenceServerException, match="there is no model 'other'"):
        client.infer("other", [tensor(codes[:1], binary)])


def test_curl_gets_exact_answers(server: Served, codes: Codes, expected: Readouts, tmp_path: Path) -> None:
    body = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": list(codes.shape), "data": codes.tolist()}]}
    (tmp_path / "body.json").write_text(json.dumps(body))
    url = f"{server.url}/v2/models/{MODEL}/infer"
    printed = subprocess.run(
        ["curl", "-sS", "--fail-with-body", "-d", f"@{tmp_path / 'body.json'}", url], capture_output=True, check=True
    ).stdout
    answer = {row["name"]: row["data"] for row in json.loads(printed)["outputs"]}
    assert answer["readout"] == expected.ravel().tolist()


def test_64_clients_at_once_get_their_own_exact_answers(server: Served, codes: Codes, expected: Readouts) -> None:
    clients, requests = 64, 12
    refused = answered = 0

    async def one(number: int) -> None:
        nonlocal refused, answered
        rng = np.random.default_rng(number)
        async with tritonclient.http.aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            for turn in range(requests):
                rows = rng.integers(0, IMAGES, int(rng.choice([1, 2, 7, 33])))
                if rng.random() < 0.25:
                    with pytest.raises(InferenceServerException, match="shape"):
                        await client.infer(MODEL, [tensor(codes[rows][..., :-1].copy(), True)])
                    refused += 1
                identity = f"{number}-{turn}"
                result = await client.infer(MODEL, [tensor(codes[rows], bool(turn % 2))], request_id=identity)
                assert np.array_equal(result.as_numpy("readout"), expected[rows])
                assert result.get_response()["id"] == identity
                answered += 1

    async def everyone() -> None:
        await asyncio.gather(*(one(number) for number in range(clients)))

    asyncio.run(everyone())
    assert answered == clients * requests
    assert refused > clients


def raw_request(codes: Codes, rows: int) -> bytes:
    shape, data = [rows, *codes.shape[1:]], codes[:rows].tolist()
    body = json.dumps({"inputs": [{"name": "image", "datatype": "UINT8", "shape": shape, "data": data}]}).encode()
    return HEAD % len(body) + body


def read_response(stream: socket.SocketIO) -> tuple[int, bool, bytes]:
    """Status, whether the connection closes, and body; ConnectionError if it ends before."""
    status = stream.readline()
    if not status:
        raise ConnectionError("no answer")
    headers = {}
    while line := stream.readline().strip():
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip().lower()
    body = stream.read(int(headers[b"content-length"]))
    assert body is not None
    if len(body) < int(headers[b"content-length"]):
        raise ConnectionError("half an answer")
    return int(status.split()[1]), headers.get(b"connection") == b"close", body


def test_sigterm_leaves_no_request_unanswered(bundle: Bundle, codes: Codes, expected: Readouts, tmp_path: Path) -> None:
    payload = raw_request(codes, 2)
    clients, failures, answers = 32, [], []

    def client(server: Served) -> None:
        try:
            with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
                stream = connection.makefile("rb")
                closes = False
                while not closes:
                    connection.sendall(payload)
                    status, closes, body = read_response(stream)
                    assert status == 200
                    assert json.loads(body)["outputs"][0]["data"] == expected[:2].ravel().tolist()
                    answers.append(closes)
        except Exception as error:
            failures.append(error)

    with served(bundle.path, tmp_path, "--runtime", "emulator") as server:
        threads = [threading.Thread(target=client, args=(server,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        while len(answers) < 10 * clients:
            time.sleep(0.01)
        assert server.stop() == 0
        for thread in threads:
            thread.join()
        events = [row["event"] for row in server.events()]
    assert failures == []
    assert sum(answers) == clients  # each was told to leave by its last answer
    assert events[-2:] == ["draining", "stopped"]


def test_a_kill_is_an_error_for_the_client_and_a_restart_serves_again(
    bundle: Bundle, codes: Codes, expected: Readouts, tmp_path: Path
) -> None:
    with served(bundle.path, tmp_path, "--runtime", "reference") as server:
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.port}")
        threading.Timer(0.3, lambda: server.process.send_signal(signal.SIGKILL)).start()

        def ask_on() -> None:
            for _ in range(1000):
                client.infer(MODEL, [tensor(codes, True)])

        with pytest.raises((OSError, HTTPConnectionClosed)):
            ask_on()
        assert server.process.wait(10) == -signal.SIGKILL
        port = str(server.port)
    with served(bundle.path, tmp_path, "--runtime", "emulator", "--port", port) as server:
        assert server.port == int(port)
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")
        assert np.array_equal(client.infer(MODEL, [tensor(codes, True)]).as_numpy("readout"), expected)


def test_a_bundle_that_was_tampered_with_is_never_ready(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "bundle")
    network = tmp_path / "bundle" / "network.safetensors"
    content = bytearray(network.read_bytes())
    content[-1] ^= 1
    network.write_bytes(content)
    log = tmp_path / "log"
    with log.open("wb") as written:
        finished = subprocess.run(command(tmp_path / "bundle"), stderr=written, check=False, timeout=60)
    assert finished.returncode == 1
    events = {row["event"]: row for row in read_log(log)}
    assert "ready" not in events
    assert "network.safetensors: SHA-256" in events["never ready"]["reason"]


def test_slow_clients_are_given_up_while_others_are_served(bundle: Bundle, codes: Codes, tmp_path: Path) -> None:
    payload = raw_request(codes, 2)
    with served(bundle.path, tmp_path, "--runtime", "emulator", "--timeout", "2") as server:
        address = ("127.0.0.1", server.port)
        beginnings = [b"", payload[:10], payload[:-1]]
        slow = [socket.create_connection(address, 10) for _ in beginnings]
        for connection, beginning in zip(slow, beginnings, strict=True):
            connection.sendall(beginning)
        with socket.create_connection(address, 10) as connection:
            connection.sendall(payload + payload[:-1])  # the second request is slow
            stream = connection.makefile("rb")
            assert [read_response(stream)[0] for _ in range(2)] == [200, 408]
        silent, *others = [connection.makefile("rb") for connection in slow]
        with pytest.raises(ConnectionError):
            read_response(silent)
        for stream in others:
            status, closes, body = read_response(stream)
            assert (status, closes) == (408, True)
            assert "in time" in json.loads(body)["error"]


def test_large_bodies_and_too_many_of_them_are_refused(bundle: Bundle, codes: Codes, tmp_path: Path) -> None:
    with served(bundle.path, tmp_path, "--runtime", "emulator", "--body-mib", "20") as server:
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address, 10) as connection:
            connection.sendall(HEAD % (21 * 2**20))
            status, _, body = read_response(connection.makefile("rb"))
            assert (status, "20,971,520" in json.loads(body)["error"]) == (413, True)
        with socket.create_connection(address, 10) as first, socket.create_connection(address, 10) as second:
            first.sendall(HEAD % (20 * 2**20) + b" " * (19 * 2**20))
            second.sendall(HEAD % (18 * 2**20))
            second.sendall(b" " * (18 * 2**20))
            status, _, body = read_response(second.makefile("rb"))
            assert (status, "too many" in json.loads(body)["error"]) == (503, True)
            first.sendall(b" " * 2**20)
            assert read_response(first.makefile("rb"))[0] == 400
        with socket.create_connection(address, 10) as connection:
            connection.sendall(raw_request(codes, 2))
            assert read_response(connection.makefile("rb"))[0] == 200


def test_a_port_that_is_taken_is_one_sentence(bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        finished = subprocess.run(
            command(bundle.path, "--port", port), capture_output=True, text=True, check=False, timeout=60
        )
    assert finished.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in finished.stderr
    assert "Traceback" not in finished.stderr
