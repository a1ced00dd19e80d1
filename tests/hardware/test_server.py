"""The Open Inference Protocol server: exact answers, one clear sentence for every malformed request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from exporters.bundle import write_bundle
from hardware.errors import SpikeguardError
from hardware.formats.bundle import Bundle, open_bundle
from hardware.network import IntArray
from hardware.reference import run_reference
from hardware.runtimes.emulator import EmulatorRuntime
from hardware.server.app import MAX_BODY_BYTES, MAX_IMAGES, create_app
from hardware.trace import Record, Trace
from tests.networks import random_codes, random_network

INFER = "/v2/models/model/infer"
DEEP = '{"inputs": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.fixture(scope="module", params=[255, 1])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("served") / "bundle"
    network = random_network(np.random.default_rng(21), hidden=2, max_code=request.param, constant_channels=1)
    codes = random_codes(np.random.default_rng(0), network)
    write_bundle(folder, network, golden_codes=codes, float_model_files={}, provenance={}, models=())
    return open_bundle(folder)


@pytest.fixture(scope="module")
def client(bundle: Bundle) -> TestClient:
    return TestClient(create_app(bundle, EmulatorRuntime(bundle.network)), raise_server_exceptions=False)


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
    assert model["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, *bundle.network.input.shape]}]
    classes = bundle.network.classes
    shapes = {row["name"]: (row["datatype"], row["shape"]) for row in model["outputs"]}
    assert shapes == {"readout": ("INT64", [-1, classes]), "class": ("INT64", [-1]), "logits": ("FP64", [-1, classes])}


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
        "other type": tensor(codes, datatype="FP32"),
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
        "many unknown fields": {"inputs": [good], **{f"field {i}": 1 for i in range(10_000)}},
        "id is a number": {"inputs": [good], "id": 7},
        "a list": [],
        "nothing": b"",
        "no JSON": b"{",
        "no text": b"\xff\xfe\x00",
        "deep JSON": DEEP.encode(),
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


def test_a_runtime_that_leaves_other_readouts_is_not_served(bundle: Bundle) -> None:
    runtime = Broken(bundle.network)
    create_app(bundle, runtime)
    runtime.wrong = True
    with pytest.raises(SpikeguardError, match=r"1 of .* golden readouts"):
        create_app(bundle, runtime)


def test_a_runtime_that_fails_later_says_so_and_serves_on(bundle: Bundle) -> None:
    runtime = Broken(bundle.network)
    client = TestClient(create_app(bundle, runtime), raise_server_exceptions=False)
    body = {"inputs": [tensor(images(bundle))]}
    runtime.fails = True
    response = client.post(INFER, json=body)
    assert (response.status_code, response.json()) == (500, {"error": "the runtime stopped; start it again"})
    runtime.fails = False
    assert client.post(INFER, json=body).status_code == 200


def test_the_app_is_named(bundle: Bundle) -> None:
    client = TestClient(create_app(bundle, EmulatorRuntime(bundle.network), name="digits"))
    assert client.get("/v2/models/digits").json()["name"] == "digits"
    assert client.get("/v2/models/model").status_code == 404
