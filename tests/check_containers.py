"""Builds the container images and exercises them: ``make check-containers``.

Run it as ``python -m tests.check_containers BUNDLE [--engine docker] [--build 'docker build -t'] [--only serve …]``.
The engine is a command like docker or podman; the build command is given a tag, the context and ``-f DOCKERFILE``.
Without an engine that answers, it says so and checks nothing. Every check is printed; the exit status is 1 if one
fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import tritonclient.http
import yaml

from hardware.emulator import run_emulator
from hardware.formats.bundle import Bundle, open_bundle

ROOT = Path(__file__).parent.parent
IMAGES = ("serve", "lava", "pipeline")
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
MAX_ADDED_MB, MAX_READY_SECONDS = 320, 3.0
SAMPLES = 1000
QUICK = ("fidelity.square_queries=5", "fidelity.certify=8")
"""The check's own quality is measured elsewhere; here two runs of it are compared."""
PATIENCE = 120.0
Check = Callable[["Checks"], None]


class Checks:
    """What is checked with, and what came out."""

    def __init__(self, engine: Sequence[str], build: Sequence[str], bundle: Bundle, folder: Path) -> None:
        self.engine, self.build, self.bundle, self.folder = tuple(engine), tuple(build), bundle, folder
        self.failures = 0

    def note(self, what: str, right: bool, found: object = "") -> None:
        """Print one finding."""
        self.failures += not right
        print(f"{'ok' if right else 'FAIL':5}{what}{f': {found}' if found != '' else ''}", flush=True)

    def run(self, *arguments: str, status: int | None = 0) -> str:
        """Run the engine; its output. Fails on any other exit status, unless that is None."""
        finished = subprocess.run([*self.engine, *arguments], capture_output=True, text=True, check=False)
        if status is not None and finished.returncode != status:
            raise SystemExit(f"{shlex.join(arguments)} ended with {finished.returncode}\n{finished.stderr}")
        return finished.stdout.strip()

    def inside(self, image: str, program: str) -> str:
        """Run Python in an image."""
        return self.run("run", "--rm", "--network", "none", "--entrypoint", "python3", image, "-c", program)

    @contextmanager
    def container(self, image: str, options: Sequence[str], command: Sequence[str]) -> Iterator[str]:
        """A container that runs in the background, removed at the end."""
        name = f"spikeguard-check-{os.getpid()}-{time.monotonic_ns() % 10**6}"
        self.run("run", "--detach", "--name", name, "--publish", "127.0.0.1::8000", *options, image, *command)
        try:
            yield name
        finally:
            self.run("rm", "--force", name, status=None)

    def port(self, name: str) -> int:
        """Where the port of a container is published."""
        return int(self.run("port", name, "8000").splitlines()[0].rpartition(":")[2])

    @property
    def mounted(self) -> tuple[str, str]:
        """The bundle at /bundle, not to be written to."""
        return ("--volume", f"{self.bundle.path.resolve()}:/bundle:ro")


def build_images(checks: Checks, names: Sequence[str]) -> None:
    """Build, and look at what was built."""
    for name in names:
        start = time.perf_counter()
        image = f"spikeguard-{name}"
        finished = subprocess.run(
            [*checks.build, image, str(ROOT), "-f", str(ROOT / "docker" / f"{name}.Dockerfile")],
            capture_output=True,
            text=True,
            check=False,
        )
        checks.note(f"build {image}", finished.returncode == 0, f"{time.perf_counter() - start:.0f} s")
        if finished.returncode:
            raise SystemExit(finished.stdout[-2000:] + finished.stderr[-2000:])
        config = json.loads(checks.run("inspect", "--type", "image", image))[0]["Config"]
        checks.note(f"{image} runs as a fixed user", config["User"] == "10001:10001", config["User"])
        labels = [key for key in config["Labels"] if key.startswith("org.opencontainers.image.")]
        checks.note(f"{image} has OCI labels", len(labels) >= 4, len(labels))
        found = checks.inside(image, SOFTWARE)
        checks.note(f"{image} has an SBOM of what is installed, no compiler and no cache", found == "[]", found)
    lint = shutil.which("hadolint")
    if lint is None:
        print("-    hadolint is not installed: Dockerfiles were not linted")
        return
    files = [str(path) for path in sorted((ROOT / "docker").glob("*.Dockerfile"))]
    found = subprocess.run([lint, *files], capture_output=True, text=True, check=False).stdout
    checks.note("hadolint finds nothing", not found, found)


SOFTWARE = """
import glob, importlib.metadata, json, pathlib, shutil
problems = [name for name in ("gcc", "cc", "g++", "clang", "ld") if shutil.which(name)]
problems += [str(path) for path in pathlib.Path("/").glob("*/.cache/pip")] + glob.glob("/tmp/*")
files = glob.glob("/opt/spikeguard/sbom*.cdx.json")
listed = {c["name"].lower() for f in files for c in json.load(open(f))["components"]} | {"spikeguard"}
problems += sorted({d.name.lower() for d in importlib.metadata.distributions()} - listed)
print(problems if files else "no SBOM")
"""
CONTENT = """
import importlib.util, pathlib
names = ("torch", "snntorch", "sklearn", "pipeline.training", "pipeline.run", "exporters")
print([name for name in names if importlib.util.find_spec(name)])
"""


def size(checks: Checks) -> None:
    """What the serve image adds to its base, and what it must not hold."""
    sizes = [
        int(checks.run("inspect", "--type", "image", "--format", "{{.Size}}", name))
        for name in ("docker.io/library/python:3.11-slim", "spikeguard-serve")
    ]
    added = (sizes[1] - sizes[0]) / 1e6
    checks.note(f"spikeguard-serve adds at most {MAX_ADDED_MB} MB", added <= MAX_ADDED_MB, f"{added:.0f} MB")
    found = checks.inside("spikeguard-serve", CONTENT)
    checks.note("spikeguard-serve holds no torch and no training code", found == "[]", found)


def readiness(checks: Checks) -> None:
    """Start hardened on both runtimes, ask for exact answers, look at the process, stop."""
    codes = np.random.default_rng(1).integers(0, 256, (SAMPLES, *checks.bundle.network.input.shape), np.uint8)
    expected = run_emulator(checks.bundle.network, codes).readouts
    for runtime in ("onnx", "emulator"):
        command = ("/bundle", "--runtime", runtime, "--host", "0.0.0.0")
        options = (*HARDENED, "--memory", "512m", "--tmpfs", "/tmp", *checks.mounted)
        start = time.perf_counter()
        with checks.container("spikeguard-serve", options, command) as name:
            started = time.perf_counter()
            wait_until_ready(checks, name)
            ready = time.perf_counter()
            used = checks.run("exec", name, "cat", "/proc/1/stat").rpartition(")")[2].split()[11:13]
            cpu = sum(map(int, used)) / os.sysconf("SC_CLK_TCK")
            seconds = f"{ready - start:.2f} s, {started - start:.2f} s of it the engine's; {cpu:.2f} s of CPU time"
            checks.note(f"{runtime} is ready {MAX_READY_SECONDS:g} s after start", ready - start <= 3, seconds)
            wrong = mismatches(checks.port(name), codes, expected)
            checks.note(f"{runtime} answers {SAMPLES} images exactly, in binary and JSON", wrong == 0, wrong)
            status = checks.run("exec", name, "python3", "-c", STATUS)
            checks.note(f"{runtime} runs unprivileged on a read-only root", status == EXPECTED_STATUS, status)
            health = checks.run("exec", name, *health_command(checks), status=None)
            checks.note(f"{runtime} passes its HEALTHCHECK", health == "", health)
            crowd(checks, name)
            checks.run("stop", "--time", "30", name)
            code = checks.run("inspect", "--format", "{{.State.ExitCode}}", name)
            checks.note(f"{runtime} stops with status 0", code == "0", code)


STATUS = """
import os
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
try:
    open("/opt/spikeguard/x", "w")
    root = "writable"
except OSError:
    root = "read-only"
print(os.getuid(), status["CapEff"].strip(), status["NoNewPrivs"].strip(), root)
"""
EXPECTED_STATUS = "10001 0000000000000000 1 read-only"


def health_command(checks: Checks) -> list[str]:
    """The HEALTHCHECK of the image, as it would be run inside."""
    (row,) = json.loads(checks.run("inspect", "--type", "image", "spikeguard-serve"))
    test: list[str] = (row.get("HealthCheck") or row["Config"].get("Healthcheck") or row["Healthcheck"])["Test"]
    return test[1:]


def wait_until_ready(checks: Checks, name: str) -> None:
    """Poll, tightly, because it is timed."""
    url = f"http://127.0.0.1:{checks.port(name)}/v2/health/ready"
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.02)
    raise SystemExit(f"{name} is not ready\n{checks.run('logs', name)}")


def mismatches(port: int, codes: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> int:
    """Readouts that the official client gets otherwise, both ways."""
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")
    wrong = 0
    for binary in (True, False):
        for first in range(0, len(codes), 100):
            part = codes[first : first + 100]
            given = tritonclient.http.InferInput("image", list(part.shape), "UINT8")
            given.set_data_from_numpy(part, binary_data=binary)
            outputs = [tritonclient.http.InferRequestedOutput("readout", binary)]
            found = client.infer("model", [given], outputs=outputs).as_numpy("readout")
            wrong += int((found != expected[first : first + 100]).sum())
    return wrong


def crowd(checks: Checks, name: str) -> None:
    """Many large bodies at once must not cost the container its memory."""
    port, statuses = checks.port(name), []
    body = b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1],"data":[' + b"0.1," * 2_000_000 + b"0]}]}"
    head = b"POST /v2/models/model/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)

    def post() -> None:
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            connection.sendall(head + body)
            statuses.append(int(connection.makefile("rb").readline().split()[1]))

    threads = [threading.Thread(target=post) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    right = len(statuses) == len(threads) and set(counts) <= {400, 408, 503}
    checks.note("24 bodies of 8 MB at once are refused within 512 MB", right, counts)
    wait_until_ready(checks, name)


def tampering(checks: Checks) -> None:
    """A bundle with one changed byte is never served, and the log says why."""
    copy = checks.folder / "tampered"
    shutil.copytree(checks.bundle.path, copy)
    network = copy / "network.safetensors"
    content = bytearray(network.read_bytes())
    content[-1] ^= 1
    network.write_bytes(content)
    command = ["run", "--rm", *HARDENED, "--volume", f"{copy.resolve()}:/bundle:ro", "spikeguard-serve"]
    finished = subprocess.run([*checks.engine, *command], capture_output=True, text=True, check=False)
    said = [line for line in (finished.stdout + finished.stderr).splitlines() if "never ready" in line]
    right = finished.returncode == 1 and len(said) == 1 and "network.safetensors" in said[0]
    checks.note("a tampered bundle ends with status 1 and its reason in the log", right, finished.returncode)


def lava(checks: Checks) -> None:
    """Certify the bundle on Lava and netx."""
    options = (*HARDENED, "--tmpfs", "/tmp", "--shm-size", "256m", "--network", "none", *checks.mounted)
    finished = subprocess.run(
        [*checks.engine, "run", "--rm", *options, "spikeguard-lava"], capture_output=True, text=True, check=False
    )
    rows = [line.split() for line in finished.stdout.splitlines()]
    named = {word for row in rows for word in row} >= {"lava", "netx"}
    checks.note("spikeguard-lava certifies the bundle", finished.returncode == 0 and named, finished.returncode)
    if finished.returncode:
        print(finished.stdout[-3000:], finished.stderr[-3000:])


def compose(checks: Checks) -> None:
    """The services of compose.yaml, started one after the other with the options that it gives them."""
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    serve, fidelity = services["serve"], services["fidelity"]
    with checks.container(serve["image"], options_of(checks, serve), serve["command"]) as name:
        wait_until_ready(checks, name)
        with urlopen(f"http://127.0.0.1:{checks.port(name)}/metrics", timeout=10) as response:
            checks.note("the service tells its metrics", b"spikeguard_ready 1.0" in response.read())
        address = checks.run("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)
        quick = [word for setting in QUICK for word in ("--set", setting)]
        out = checks.folder / "runs"
        out.mkdir()
        out.chmod(0o777)
        command = [*options_of(checks, {**fidelity, "tmpfs": fidelity["tmpfs"][:1]}), "--volume", f"{out}:/runs"]
        host = ("--add-host", f"serve:{address}")
        checks.run("run", "--rm", *host, *command, fidelity["image"], *fidelity["command"], *quick, status=None)
        remote = json.loads((out / "fidelity" / "report.json").read_text())
    here = checks.folder / "here"
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "fidelity", str(checks.bundle.path)]
    command += ["--runtime", "onnxruntime", "--out", str(here), *quick]
    subprocess.run(command, capture_output=True, check=False)
    local = json.loads((here / "report.json").read_text())
    same = all(remote[key] == local[key] for key in ("verdict", "outcome", "arms"))
    checks.note("fidelity against the container concludes what it concludes here", same, remote["verdict"])
    row = next(row for row in remote["runtimes"] if row["name"].startswith("http"))
    answered = row["samples"] + row["adversarial_samples"]
    checks.note("every readout of the service is exact", row["mismatched_readouts"] == 0, f"{answered} images")


def options_of(checks: Checks, service: dict[str, Any]) -> list[str]:
    """The engine's options for a service of the compose file."""
    options = list(checks.mounted)
    options += ["--read-only"] if service["read_only"] else []
    options += [word for name in service["cap_drop"] for word in ("--cap-drop", name)]
    options += [word for name in service["security_opt"] for word in ("--security-opt", name.removesuffix(":true"))]
    options += [word for place in service["tmpfs"] for word in ("--tmpfs", place)]
    options += ["--memory", service["mem_limit"]]
    return options + (["--pids-limit", str(service["pids_limit"])] if "pids_limit" in service else [])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Builds the container images and exercises them.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="docker", help="command of the container engine")
    parser.add_argument("--build", default="docker build -t", help="command that is given tag, context and -f FILE")
    parser.add_argument("--only", nargs="*", choices=IMAGES, default=IMAGES, help="images to build and check")
    options = parser.parse_args()
    engine = shlex.split(options.engine)
    if not shutil.which(engine[0]) or subprocess.run([*engine, "info"], capture_output=True, check=False).returncode:
        print(f"=== NO CONTAINER ENGINE ({options.engine} does not answer): no image was built or checked ===")
        return
    with tempfile.TemporaryDirectory(prefix="check-containers-") as folder:
        Path(folder).chmod(0o755)
        bundle = Path(folder) / "bundle"  # one that every user may read
        shutil.copytree(options.bundle, bundle)
        for path in (bundle, *bundle.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        checks = Checks(engine, shlex.split(options.build), open_bundle(bundle), Path(folder))
        build_images(checks, options.only)
        steps: dict[str, tuple[Check, ...]] = {
            "serve": (size, readiness, tampering),
            "lava": (lava,),
            "pipeline": (compose,),
        }
        for name in options.only:
            for step in steps[name]:
                step(checks)
    print(f"{checks.failures} checks failed" if checks.failures else "all checks passed")
    sys.exit(checks.failures > 0)


if __name__ == "__main__":
    main()
