"""The Open Inference Protocol server: exact answers, one clear sentence for every malformed request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from exporters.bundle import write_bundle
from hardware.errors import SpikeguardError
from hardware.formats.bundle import Bundle, open_bundle
from hardware.network import IntArray, IntegerNetwork
from hardware.reference import run_reference
from hardware.runtimes.emulator import EmulatorRuntime
from hardware.runtimes.protocol import Runtime
from hardware.server.app import create_app
from hardware.server.model import verified
from hardware.server.service import Service, Settings
from hardware.trace import Record, Trace
from tests.networks import random_codes, random_network

INFER = "/v2/models/model/infer"
MAX_BODY_BYTES, MAX_IMAGES = Settings().body_bytes, Settings().images
DEEP = '{"inputs": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.fixture(scope="module", params=[255, 1])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("served") / "bundle"
    network = random_network(np.random.default_rng(21), hidden=2, max_code=request.param, constant_channels=1)
    codes = random_codes(np.random.default_rng(0), network)
    write_bundle(folder, network, golden_codes=codes, float_model_files={}, provenance={}, models=())
    return open_bundle(folder)


@contextmanager
def serving(bundle: Bundle, runtime: Runtime, **settings: Any) -> Iterator[TestClient]:
    """A client of a server that has verified its model, or failed to."""
    service = Service(lambda: verified(bundle, runtime), Settings(**settings))
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        while service.state == "loading":
            time.sleep(0.01)
        yield client


@pytest.fixture(scope="module")
def client(bundle: Bundle) -> Iterator[TestClient]:
    with serving(bundle, EmulatorRuntime(bundle.network)) as client:
        yield client


def images(bundle: Bundle, samples: int = 5) -> NDArray[np.uint8]:
    return random_codes(np.random.default_rng(3), bundle.network, samples)


def tensor(codes: NDArray[np.uint8], **changes: Any) -> dict[str, Any]:
    data = {"name": "image", "datatype": "UINT8", "shape": list(codes.shape), "data": codes.tolist()}
    return {key: value for key, value in {**data, **changes}.items() if value is not ...}


def outputs(answer: dict[str, Any]) -> dict[str, NDArray[Any]]:
    types = {"INT64": np.int64, "FP64": np.float64}
    return {
        row["name"]: np.array(row["data"], types[row["datatype"]]).reshape(row["shape"]) for row in answer["outputs"]
    }


def test_health_and_metadata(client: TestClient, bundle: Bundle) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/model/ready").json() == {"name": "model", "ready": True}
    assert client.get("/v2").json()["name"] == "spikeguard"
    model = client.get("/v2/models/model").json()
    ((image,), classes) = (model["inputs"], bundle.network.classes)
    assert (image["name"], image["datatype"]) == ("image", "UINT8")
    assert image["shape"] == [-1, *bundle.network.input.shape]
    spiking = [population.name for population in bundle.network.populations if population.spiking]
    shapes = {row["name"]: (row["datatype"], row["shape"]) for row in model["outputs"]}
    assert shapes == {
        "readout": ("INT64", [-1, classes]),
        "class": ("INT64", [-1]),
        "logits": ("FP64", [-1, classes]),
        "spike_counts": ("INT64", [-1, len(spiking)]),
    }
    assert model["outputs"][3]["parameters"]["populations"] == ", ".join(spiking)


@pytest.mark.parametrize("flat", [False, True])
def test_answers_are_the_reference_s_bit_for_bit(client: TestClient, bundle: Bundle, flat: bool) -> None:
    codes = images(bundle)
    body = {"id": "7", "inputs": [tensor(codes, data=(codes.ravel() if flat else codes).tolist())]}
    response = client.post(INFER, json=body)
    assert response.status_code == 200, response.text
    assert (response.json()["model_name"], response.json()["id"]) == ("model", "7")
    readouts = run_reference(bundle.network, codes, "readouts").readouts
    found = outputs(response.json())
    assert np.array_equal(found["readout"], readouts)
    assert np.array_equal(found["class"], readouts.argmax(1))
    assert np.array_equal(found["logits"], bundle.network.logits(readouts))


def test_kserve_s_client_says_the_model_twice(client: TestClient, bundle: Bundle) -> None:
    body = {"id": "1", "model_name": "model", "inputs": [tensor(images(bundle))]}
    assert client.post(INFER, json=body).status_code == 200


def test_only_requested_outputs_are_answered(client: TestClient, bundle: Bundle) -> None:
    body = {"inputs": [tensor(images(bundle))], "outputs": [{"name": "class", "parameters": {"binary_data": False}}]}
    assert list(outputs(client.post(INFER, json=body).json())) == ["class"]


def malformed(codes: NDArray[np.uint8], max_code: int) -> dict[str, object]:
    """Bodies by what is wrong with them."""
    flat = codes.ravel().tolist()
    too_many = [MAX_IMAGES + 1, *codes.shape[1:]]
    tensors = {
        "no shape": tensor(codes, shape=...),
        "no data": tensor(codes, data=...),
        "other name": tensor(codes, name="picture"),
        "other type": tensor(codes, datatype="INT8"),
        "pixels above 1": tensor(codes, datatype="FP32", data=[1.001, *[0.5] * (codes.size - 1)]),
        "pixels below 0": tensor(codes, datatype="FP64", data=[-1e-9, *[0.5] * (codes.size - 1)]),
        "pixel of 4000 digits": tensor(codes, datatype="FP32", data=[10**4000, *[0.5] * (codes.size - 1)]),
        "pixels are text": tensor(codes, datatype="FP32", data=["0.5"] * codes.size),
        "truth values as pixels": tensor(codes, datatype="FP32", data=[True] * codes.size),
        "data twice": tensor(codes, parameters={"binary_data_size": codes.size}),
        "binary size without bytes": tensor(codes, data=..., parameters={"binary_data_size": codes.size}),
        "binary size is negative": tensor(codes, data=..., parameters={"binary_data_size": -1}),
        "binary size is text": tensor(codes, data=..., parameters={"binary_data_size": "12"}),
        "shared memory": tensor(codes, data=..., parameters={"shared_memory_region": "a"}),
        "unknown field": tensor(codes, datum=1),
        "shape of other images": tensor(codes[..., :-1]),
        "shape of one image": tensor(codes[0]),
        "shape over time": tensor(codes[:, None]),
        "no images": tensor(codes[:0]),
        "too many images": tensor(codes, shape=too_many, data=[0] * int(np.prod(too_many))),
        "shape of text": tensor(codes, shape=[str(size) for size in codes.shape]),
        "negative shape": tensor(codes, shape=[-1, *codes.shape[1:]]),
        "huge shape": tensor(codes, shape=[2**62] * codes.ndim),
        "fewer images than stated": tensor(codes, shape=[len(codes) + 1, *codes.shape[1:]]),
        "fewer values than stated": tensor(codes, data=flat[:-1]),
        "ragged data": tensor(codes, data=[codes[0].tolist(), *codes[1:, ..., :-1].tolist()]),
        "half nested data": tensor(codes, data=[codes[0].tolist(), *flat]),
        "nested too deep": tensor(codes, data=codes[..., None].tolist()),
        "data are text": tensor(codes, data="AAAA"),
        "fraction": tensor(codes, data=[0.5, *flat[1:]]),
        "whole float": tensor(codes, data=[1.0, *flat[1:]]),
        "truth value": tensor(codes, data=[True, *flat[1:]]),
        "null": tensor(codes, data=[None, *flat[1:]]),
        "negative code": tensor(codes, data=[-1, *flat[1:]]),
        "code above the network's": tensor(codes, data=[max_code + 1, *flat[1:]]),
        "code of 64 bits": tensor(codes, data=[2**64, *flat[1:]]),
        "code of 4000 digits": tensor(codes, data=[10**4000, *flat[1:]]),
    }
    good = tensor(codes)
    return {
        **{name: {"inputs": [bad]} for name, bad in tensors.items()},
        "no inputs": {},
        "empty inputs": {"inputs": []},
        "two inputs": {"inputs": [good, good]},
        "unknown output": {"inputs": [good], "outputs": [{"name": "spikes"}]},
        "an output twice": {"inputs": [good], "outputs": [{"name": "class"}, {"name": "class"}]},
        "classification": {"inputs": [good], "outputs": [{"name": "class", "parameters": {"classification": 2}}]},
        "binary as text": {"inputs": [good], "parameters": {"binary_data_output": "yes"}},
        "many unknown fields": {"inputs": [good], **{f"field {i}": 1 for i in range(10_000)}},
        "id is a number": {"inputs": [good], "id": 7},
        "a list": [],
        "nothing": b"",
        "no JSON": b"{",
        "no text": b"\xff\xfe\x00",
        "deep JSON": DEEP.encode(),
        "JSON of empty lists": json.dumps({"inputs": [tensor(codes, data=[[]] * 300_000)]}).encode(),
        "JSON of texts": json.dumps({"inputs": [tensor(codes, data=["a"] * 200_000)]}).encode(),
        "not a number": json.dumps({"inputs": [tensor(codes, data=[float("nan"), *flat[1:]])]}).encode(),
    }


CASES = list(malformed(np.zeros((2, 1, 6, 6), np.uint8), 255))


@pytest.mark.parametrize("case", CASES)
def test_malformed_requests_are_refused_in_a_sentence(client: TestClient, bundle: Bundle, case: str) -> None:
    content = malformed(images(bundle), bundle.network.input.max_code)[case]
    response = client.post(INFER, content=content if isinstance(content, bytes) else json.dumps(content).encode())
    assert response.status_code == 400, response.text
    assert set(response.json()) == {"error"}
    assert 20 < len(response.json()["error"]) < 1500


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/other/ready", "/v3", "/v2/models/model/other"])
def test_unknown_paths_and_models(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]


def test_unknown_model_does_not_infer(client: TestClient, bundle: Bundle) -> None:
    response = client.post("/v2/models/other/infer", json={"inputs": [tensor(images(bundle))]})
    assert response.status_code == 404
    assert "other" in response.json()["error"]


def test_large_bodies_are_refused_without_reading_on(client: TestClient) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:  # no Content-Length
        nonlocal sent
        while sent < MAX_BODY_BYTES + 1:
            sent += 2**20
            yield b" " * 2**20

    for content in (chunks(), b" " * (MAX_BODY_BYTES + 1)):
        response = client.post(INFER, content=content)
        assert response.status_code == 413
        assert f"{MAX_BODY_BYTES:,}" in response.json()["error"]
    assert client.post(INFER, content=b" " * MAX_BODY_BYTES).status_code == 400


class Broken(EmulatorRuntime):
    """Right until told otherwise: then one readout is wrong by one, or it does not finish."""

    wrong, fails = False, False

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        if self.fails:
            raise SpikeguardError("the runtime stopped; start it again")
        readouts = super().run(inputs, record).readouts
        readouts[-1, -1] += int(self.wrong)
        return Trace(readouts)


def test_a_runtime_that_leaves_other_readouts_is_never_ready(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    runtime = Broken(bundle.network)
    runtime.wrong = True
    with serving(bundle, runtime) as client:
        assert client.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", "/v2/models/model/ready", "/v2/models/model"):
            assert client.get(path).status_code == 503
        response = client.post(INFER, json={"inputs": [tensor(images(bundle))]})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    (record,) = [record for record in caplog.records if record.getMessage() == "never ready"]
    assert "1 golden readouts" in record.__dict__["facts"]["reason"]


def test_a_runtime_that_fails_later_says_so_and_serves_on(bundle: Bundle) -> None:
    runtime = Broken(bundle.network)
    body = {"inputs": [tensor(images(bundle))]}
    with serving(bundle, runtime) as client:
        runtime.fails = True
        response = client.post(INFER, json=body)
        assert (response.status_code, response.json()) == (500, {"error": "the runtime stopped; start it again"})
        runtime.fails = False
        assert client.post(INFER, json=body).status_code == 200


def test_the_model_is_named(bundle: Bundle) -> None:
    with serving(bundle, EmulatorRuntime(bundle.network), name="digits") as client:
        assert client.get("/v2/models/digits").json()["name"] == "digits"
        assert client.get("/v2/models/model").status_code == 404


def test_bodies_are_binary_as_well(client: TestClient, bundle: Bundle) -> None:
    codes = images(bundle)
    header = json.dumps(
        {
            "inputs": [tensor(codes, data=..., parameters={"binary_data_size": codes.size})],
            "outputs": [{"name": "readout", "parameters": {"binary_data": True}}, {"name": "class"}],
        }
    ).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}
    response = client.post(INFER, content=header + codes.tobytes(), headers=length)
    assert response.status_code == 200, response.text
    size = int(response.headers["Inference-Header-Content-Length"])
    readout, label = json.loads(response.content[:size])["outputs"]
    expected = run_reference(bundle.network, codes, "readouts").readouts
    assert readout["parameters"] == {"binary_data_size": expected.nbytes}
    assert response.content[size:] == expected.astype("<i8").tobytes()
    assert label["data"] == expected.argmax(1).tolist()


@pytest.mark.parametrize("length", ["", "-1", "1e3", "x", "9" * 30, "4", "1000000"])
def test_wrong_header_lengths_are_refused_in_a_sentence(client: TestClient, bundle: Bundle, length: str) -> None:
    content = json.dumps({"inputs": [tensor(images(bundle))]}).encode()
    response = client.post(INFER, content=content, headers={"Inference-Header-Content-Length": length})
    assert response.status_code == 400, response.text
    assert len(response.json()["error"]) > 20


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
@pytest.mark.parametrize("binary", [False, True])
def test_pixels_between_0_and_1_are_rounded_to_codes(
    client: TestClient, bundle: Bundle, datatype: str, binary: bool
) -> None:
    most = bundle.network.input.max_code
    kind = np.dtype("<f4" if datatype == "FP32" else "<f8")
    rng = np.random.default_rng(5)
    exact = images(bundle)
    for codes, pixels in (
        (exact, (exact / most).astype(kind)),
        (exact, np.clip((exact + rng.uniform(-0.49, 0.49, exact.shape)) / most, 0, 1).astype(kind)),
        (np.full_like(exact, 2 * (most // 4)), np.full(exact.shape, (2 * (most // 4) + 0.5) / most, np.float64)),
    ):
        if pixels.dtype != kind and datatype == "FP32":
            continue  # a tie needs all digits
        content: bytes
        sent = tensor(exact, datatype=datatype, data=pixels.astype(np.float64).tolist())
        headers = {}
        if binary:
            sent = {**sent, "parameters": {"binary_data_size": pixels.nbytes}}
            del sent["data"]
        content = json.dumps({"inputs": [sent]}).encode()
        if binary:
            headers = {"Inference-Header-Content-Length": str(len(content))}
            content += pixels.tobytes()
        response = client.post(INFER, content=content, headers=headers)
        assert response.status_code == 200, response.text
        expected = run_reference(bundle.network, codes, "readouts").readouts
        assert np.array_equal(outputs(response.json())["readout"], expected)


def test_spikes_are_counted_on_request(client: TestClient, bundle: Bundle) -> None:
    codes = images(bundle)
    trace = run_reference(bundle.network, codes)
    body = {"inputs": [tensor(codes)], "outputs": [{"name": "spike_counts"}, {"name": "readout"}]}
    found = outputs(client.post(INFER, json=body).json())
    expected = [part.spikes.sum(axis=(1, 2)) for part in trace.populations.values() if part.spikes is not None]
    assert np.array_equal(found["spike_counts"], np.stack(expected, axis=1))
    assert np.array_equal(found["readout"], trace.readouts)


class Slow(EmulatorRuntime):
    """Waits until it may go on, once it was told to; remembers how many images it was given at once."""

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__(network)
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.batches: list[int] = []

    def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
        self.batches.append(len(inputs))
        assert self.goes_on.wait(30)
        return super().run(inputs, record)


def test_a_full_queue_refuses_and_what_waits_shares_a_batch(bundle: Bundle) -> None:
    runtime = Slow(bundle.network)
    codes = images(bundle, 9)
    expected = run_reference(bundle.network, codes, "readouts").readouts
    answers: dict[int, Any] = {}
    with serving(bundle, runtime, queue=8, batch=6) as client:
        runtime.goes_on.clear()
        runtime.batches.clear()

        def ask(first: int, count: int) -> None:
            body = {"inputs": [tensor(codes[first : first + count])]}
            answers[first] = client.post(INFER, json=body)

        def queued() -> float:
            (line,) = [row for row in client.get("/metrics").text.splitlines() if row.startswith("spikeguard_queue")]
            return float(line.split()[1])

        threads = []
        for first, count, waiting in ((0, 1, 0), (1, 4, 4), (5, 1, 5), (6, 3, 8)):
            threads.append(threading.Thread(target=ask, args=(first, count)))
            threads[-1].start()
            while len(runtime.batches) < 1 or queued() != waiting:
                time.sleep(0.005)
        refused = client.post(INFER, json={"inputs": [tensor(codes[:1])]})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "full" in refused.json()["error"]
        runtime.goes_on.set()
        for thread in threads:
            thread.join()
    assert runtime.batches == [1, 5, 3]
    for first, count in ((0, 1), (1, 4), (5, 1), (6, 3)):
        assert np.array_equal(outputs(answers[first].json())["readout"], expected[first : first + count])


def test_short_batches_are_run_in_the_event_loop_and_long_ones_are_not(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    class Watched(EmulatorRuntime):
        def run(self, inputs: IntArray, record: Record = "readouts") -> Trace:
            threads.append(threading.current_thread().name)
            return super().run(inputs, record)

    body = {"inputs": [tensor(images(bundle))]}
    for seconds, expected in ((3600, ["batch-0", "loop", "loop"]), (0, ["batch-0"] * 3)):
        monkeypatch.setattr("hardware.server.batching.SHORT_SECONDS", seconds)
        with serving(bundle, Watched(bundle.network)) as client:
            threads.clear()
            for _ in range(3):
                assert client.post(INFER, json=body).status_code == 200
        assert [name if name.startswith("batch") else "loop" for name in threads] == expected


def test_a_request_of_more_images_than_a_batch_is_run_in_parts(bundle: Bundle) -> None:
    runtime = Slow(bundle.network)
    codes = images(bundle, 9)
    with serving(bundle, runtime, queue=2, batch=4) as client:
        runtime.batches.clear()
        found = outputs(client.post(INFER, json={"inputs": [tensor(codes)]}).json())
    assert runtime.batches == [4, 4, 1]
    assert np.array_equal(found["readout"], run_reference(bundle.network, codes, "readouts").readouts)


def test_an_answer_that_takes_too_long_is_a_timeout(bundle: Bundle) -> None:
    runtime = Slow(bundle.network)
    body = {"inputs": [tensor(images(bundle))]}
    with serving(bundle, runtime, timeout=0.2) as client:
        runtime.goes_on.clear()
        response = client.post(INFER, json=body)
        assert response.status_code == 504
        assert "0.2 s" in response.json()["error"]
        runtime.goes_on.set()
        assert client.post(INFER, json=body).status_code == 200


def test_compressed_bodies_are_refused(client: TestClient) -> None:
    response = client.post(INFER, content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415
    assert "compressed" in response.json()["error"]


def test_metrics_count_what_happens(bundle: Bundle) -> None:
    codes = images(bundle, 3)
    good = {"inputs": [tensor(codes)]}
    with serving(bundle, EmulatorRuntime(bundle.network), count_spikes_every=2) as client:
        assert [client.post(INFER, json=body).status_code for body in (good, good, {}, good)] == [200, 200, 400, 200]
        lines = client.get("/metrics").text.splitlines()
    spikes = sum(
        part.spikes.sum()
        for part in run_reference(bundle.network, codes).populations.values()
        if part.spikes is not None
    )
    for line in (
        'spikeguard_requests_total{status="200"} 3.0',
        'spikeguard_requests_total{status="400"} 1.0',
        'spikeguard_errors_total{reason="malformed"} 1.0',
        "spikeguard_request_seconds_count 4.0",
        "spikeguard_batch_images_sum 9.0",
        "spikeguard_queue_images 0.0",
        "spikeguard_ready 1.0",
        "spikeguard_spikes_per_inference_count 3.0",
        f"spikeguard_spikes_per_inference_sum {float(spikes)}",
    ):
        assert line in lines


def test_no_damaged_body_breaks_the_server(client: TestClient, bundle: Bundle) -> None:
    rng = np.random.default_rng(11)
    codes = images(bundle, 2)
    plain = json.dumps({"id": "a", "inputs": [tensor(codes)], "outputs": [{"name": "class"}]}).encode()
    binary = json.dumps({"inputs": [tensor(codes, data=..., parameters={"binary_data_size": codes.size})]}).encode()
    statuses = set()
    for turn in range(200):
        text, tail = (plain, b"") if turn % 2 else (binary, codes.tobytes())
        body = bytearray(text + tail)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(body)))
            match rng.integers(4):
                case 0:
                    body[at] = int(rng.integers(256))
                case 1:
                    del body[at : at + int(rng.integers(1, 40))]
                case 2:
                    body[at:at] = bytes(rng.choice(list(b'[]{}",:0123456789truefalsnull\\'), 5).astype(np.uint8))
                case 3:
                    body[at:at] = body[at // 2 : at]
        headers = (
            {} if turn % 2 else {"Inference-Header-Content-Length": str(len(text) + int(rng.choice([-1, 0, 0, 0, 2])))}
        )
        response = client.post(INFER, content=bytes(body), headers=headers)
        statuses.add(response.status_code)
        assert response.status_code in (200, 400), response.text
        assert response.status_code == 200 or len(response.json()["error"]) > 20
    assert statuses == {200, 400}


def test_inputs_that_change_over_time_are_served_as_the_golden_ones_are(tmp_path: Path) -> None:
    network = random_network(np.random.default_rng(2), hidden=1, max_code=1)
    golden = random_codes(np.random.default_rng(0), network, 8 * network.steps)
    golden = golden.reshape(8, network.steps, *network.input.shape)
    write_bundle(tmp_path / "b", network, golden_codes=golden, float_model_files={}, provenance={}, models=())
    with serving(open_bundle(tmp_path / "b"), EmulatorRuntime(network)) as client:
        assert client.get("/v2/models/model").json()["inputs"][0]["shape"] == [-1, *golden.shape[1:]]
        found = outputs(client.post(INFER, json={"inputs": [tensor(golden)]}).json())
        assert np.array_equal(found["readout"], run_reference(network, golden, "readouts").readouts)
        assert client.post(INFER, json={"inputs": [tensor(golden[:, 0])]}).status_code == 400
