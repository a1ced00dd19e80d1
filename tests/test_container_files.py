"""The files that describe containers agree with each other and with the code; what they build is checked elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
USER = 10001


def instructions(name: str) -> list[str]:
    """Of a Dockerfile, continued lines joined."""
    text = (DOCKER / f"{name}.Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def copied(name: str) -> list[str]:
    """What a Dockerfile takes from the project."""
    copies = [line.split()[1:-1] for line in instructions(name) if line.startswith("COPY") and "--from" not in line]
    return [source for sources in copies for source in sources]


def test_images_without_training_code_have_all_that_their_commands_need(tmp_path: Path) -> None:
    assert set(copied("serve")) < set(copied("lava"))
    for source in copied("serve"):
        target = tmp_path / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / source, target)
    assert not (tmp_path / "exporters").exists()
    assert not list((tmp_path / "pipeline").rglob("*train*"))
    program = (
        "import pipeline, hardware.server.serving; print(pipeline.__file__); from pipeline.cli import main; main()"
    )
    for command in (["serve", "--help"], ["verify", "nothing"], ["emulate", "nothing"], ["info", "nothing"]):
        finished = subprocess.run(
            [sys.executable, "-c", program, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.stdout.startswith(str(tmp_path)), finished.stderr
        assert "not installed" not in finished.stderr
        assert ("is not a bundle" in finished.stderr) == (command[1] == "nothing"), finished.stderr


@pytest.mark.parametrize("path", sorted(DOCKER.glob("*.Dockerfile")), ids=lambda path: path.stem)
def test_images_are_labelled_and_run_as_the_same_user(path: Path) -> None:
    lines = instructions(path.name.removesuffix(".Dockerfile"))
    assert f"USER {USER}:{USER}" in lines
    assert any("org.opencontainers.image.licenses" in line for line in lines)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in copied(path.name.removesuffix(".Dockerfile")):
        assert (ROOT / source).exists()
        assert f"!{source.split('/')[0]}" in ignored


def test_services_of_the_compose_file_are_hardened() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"serve", "metrics", "fidelity"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert all(volume.endswith(":ro") for volume in service["volumes"])
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
    scraped = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"][0]["targets"] == ["serve:8000"]


def test_the_deployment_is_hardened_and_probes_what_the_server_has() -> None:
    deployment, service = yaml.safe_load_all((DOCKER / "k8s" / "serve.yaml").read_text())
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsUser"] == USER
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]) == {"requests", "limits"}
    routes = set(re.findall(r'Route\("([^"{]+)"', (ROOT / "hardware" / "server" / "app.py").read_text()))
    probed = {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probed | {deployment["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]} <= routes
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    assert all(claim["readOnly"] for claim in claims)


def test_the_inference_service_runs_triton_s_repository() -> None:
    service = yaml.safe_load((DOCKER / "k8s" / "inference-service.yaml").read_text())
    model = service["spec"]["predictor"]["model"]
    assert (model["runtime"], model["protocolVersion"]) == ("kserve-tritonserver", "v2")
