"""The direction of imports: pipeline → exporters → hardware, and torch only where gradients flow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "hardware": {"exporters", "pipeline", "tests"},
    "exporters": {"pipeline", "tests"},
    "pipeline": {"tests"},
}
TORCH_IN_HARDWARE = {
    "hardware/surrogates.py",
    "hardware/twin.py",
    "hardware/twin_convolutions.py",
    "hardware/twin_neurons.py",
}
# What only the extra 'train' brings; a bundle is verified, run and served without it.
TRAINING_PACKAGES = ("torch", "snntorch", "onnx", "sklearn", "scipy", "jinja2", "matplotlib")

IMPORT_WITHOUT_TRAINING = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

BLOCKED, EXCEPT = set(sys.argv[1].split(",")), set(sys.argv[2].split(","))
sys.meta_path.insert(0, Blocked())
import hardware
names = [module.name for module in pkgutil.walk_packages(hardware.__path__, "hardware.")]
for name in names:
    if name not in EXCEPT:
        importlib.import_module(name)
print(len(names))
"""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_modules(source: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports; ``from a import b`` gives ``a`` and ``a.b``."""
    package = source.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(source.read_text(), str(source))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
                if node.level
                else [node.module or ""]
            )
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def top_level(source: Path) -> set[str]:
    return {module.partition(".")[0] for module in imported_modules(source)}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_one_way(package: str) -> None:
    offenders = {
        str(source.relative_to(ROOT)): sorted(top_level(source) & FORBIDDEN[package]) for source in sources(package)
    }
    assert offenders, f"{package} has no files"
    assert {path: names for path, names in offenders.items() if names} == {}


def test_hardware_uses_torch_only_where_gradients_flow() -> None:
    # The worker runs in the Lava environment, where 'torch' can only be its own stand-in.
    own = [source for source in sources("hardware") if "lava_worker" not in source.parts]
    users = {str(source.relative_to(ROOT)) for source in own if "torch" in top_level(source)}
    assert users <= TORCH_IN_HARDWARE


def test_the_lava_worker_imports_nothing_of_ours() -> None:
    worker = sources("hardware/runtimes/lava_worker")
    assert worker
    assert [str(source) for source in worker if top_level(source) & set(FORBIDDEN)] == []


def test_nothing_imports_the_command_line() -> None:
    everything = [source for package in FORBIDDEN for source in sources(package)]
    assert [str(source) for source in everything if "pipeline.cli" in set(imported_modules(source))] == []
    own = {ROOT / "pipeline" / "cli.py", *sources("pipeline/commands")}
    assert [
        str(source)
        for source in everything
        if source not in own and any(name.startswith("pipeline.commands") for name in imported_modules(source))
    ] == []


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    source = tmp_path / "hardware" / "formats" / "sample.py"
    source.parent.mkdir(parents=True)
    source.write_text("def late():\n    from .. import files\n    from .bundle import load\n")
    assert set(imported_modules(source)) == {
        "hardware",
        "hardware.files",
        "hardware.formats.bundle",
        "hardware.formats.bundle.load",
    }


def test_hardware_needs_no_training_packages() -> None:
    exceptions = ",".join(path.removesuffix(".py").replace("/", ".") for path in TORCH_IN_HARDWARE)
    finished = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TRAINING, ",".join(TRAINING_PACKAGES), exceptions],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 10
