"""``spikeguard verify`` as someone runs it who was handed a bundle: in a fresh environment with the extra alone.

Run it as ``python -m tests.fresh_verify BUNDLE``; ``make check-full`` does, on the demo's. A copy of the sources is
installed with ``pip install '.[verify]'`` and the pinned versions into an environment in a temporary folder. There,
training software must be absent, every file of the bundle that something can read must have a row without mismatches,
and the command line must say so. Exit status: 0 all of this holds, 1 not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "hardware", "exporters", "pipeline")
ABSENT = ("torch", "snntorch", "onnx", "scipy", "sklearn", "matplotlib", "jinja2", "lava")
PIP_SECONDS, VERIFY_SECONDS = 900, 300

INSIDE = """
import importlib.util, sys
from pathlib import Path
import hardware
from hardware.formats.bundle import FLOAT_GOLDEN_FILE, GOLDEN_FILE, NETX_FILE, open_bundle
from hardware.formats.verify import verify_bundle

path, absent = Path(sys.argv[1]), sys.argv[2].split(",")
found = [name for name in absent if importlib.util.find_spec(name)]
assert not found, f"installed, though only the extra 'verify' was asked for: {found}"
assert not Path(hardware.__file__).is_relative_to(sys.argv[3]), "the checkout was imported, not the installation"
bundle = open_bundle(path)
rows = verify_bundle(bundle)
# netx runs in Lava's environment; arrays are read with the files they belong to, the float SNN as model.float.onnx.
companions = {NETX_FILE, GOLDEN_FILE, FLOAT_GOLDEN_FILE, "network.safetensors", "snn.json", "snn.safetensors"}
unread = set(bundle.manifest.files) - companions - {row.file for row in rows}
assert not unread, f"nothing read {sorted(unread)}"
wrong = [row for row in rows if not row.equal]
assert not wrong, wrong
print(f"{len(rows)} readings of {len({row.file for row in rows})} files, none wrong, nothing of {', '.join(absent)}")
"""


def run(title: str, command: list[str], folder: Path, environment: Mapping[str, str], seconds: float) -> None:
    """Run a command, its output shown; end with status 1 if it fails."""
    print(f"== {title}", flush=True)
    done = subprocess.run(command, cwd=folder, env={**environment}, timeout=seconds, check=False)
    if done.returncode:
        sys.exit(f"FAIL: {title}: exit status {done.returncode}")


def main(bundle: Path) -> None:
    """Make the environment, check in it, and remove it."""
    # Nothing of the checkout may be found, neither by path nor as an outer environment.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory(prefix="spikeguard-verify-") as name:
        folder = Path(name)
        for source in SOURCES:
            origin, copy = ROOT / source, folder / "source" / source
            if origin.is_dir():
                shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(origin, copy)
        make = [sys.executable, "-m", "venv", str(folder / "venv")]
        run("make an environment", make, folder, environment, VERIFY_SECONDS)
        python = str(folder / "venv" / "bin" / "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        pinned = ["-c", str(ROOT / "constraints.txt"), f"{folder / 'source'}[verify]"]
        run("pip install '.[verify]'", [*pip, *pinned], folder, environment, PIP_SECONDS)
        inside = [python, "-c", INSIDE, str(bundle), ",".join(ABSENT), str(ROOT)]
        run("every file is read, without training software", inside, folder, environment, VERIFY_SECONDS)
        verify = [str(folder / "venv" / "bin" / "spikeguard"), "verify", str(bundle)]
        run(f"spikeguard verify {bundle.name}", verify, folder, environment, VERIFY_SECONDS)
    print("OK: a fresh environment with the extra 'verify' alone checks every file of the bundle")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
