"""Makes the environments everything runs in: ``.venv`` for spikeguard, ``.venv-lava`` for the Lava simulator.

Runs before anything is installed, so it needs the standard library only (``make setup`` calls it)::

    python -I hardware/environments.py main lava [--extras train,conformance,test]

A finished environment carries a stamp with the hash of what it was made from; with the same hash, setting up
again does nothing. One that a kill left unfinished, or that was copied to another folder, is made anew.

Variables:
    SPIKEGUARD_TORCH: which build of torch, ``auto`` (default: CUDA where ``nvidia-smi`` lists a GPU, else
        CPU), ``cpu`` or ``cuda``. On Linux the package registry's torch is a CUDA build of several GB.
    SPIKEGUARD_PYTHON310: the Python 3.10 for Lava; without it, interpreters are searched for and tried.

Exit status: 0 done, 1 failed, 2 usage, 3 no Python 3.10 for Lava (everything else is done), 130 interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH_BUILDS = ("auto", "cpu", "cuda")


class VersionRange(NamedTuple):
    """Versions of Python from ``lowest``, up to but without ``below``."""

    lowest: tuple[int, int]
    below: tuple[int, int]

    def accepts(self, version: tuple[int, int] | None) -> bool:
        """Whether a version lies in the range; None does not."""
        return version is not None and self.lowest <= version < self.below


MAIN_PYTHON = VersionRange((3, 11), (4, 0))
LAVA_PYTHON = VersionRange((3, 10), (3, 11))
LAVA_PINS = (
    "lava-nc==0.10.0",
    "h5py==3.16.0",
    "asteval==0.9.33",
    "cloudpickle==3.1.2",
    "joblib==1.6.0",
    "networkx==2.8.7",
    "numpy==1.26.4",
    "scikit-learn==1.7.2",
    "scipy==1.15.3",
    "threadpoolctl==3.8.0",
)
# lava-dl pins a torch of 5.6 GB that reading a network does not need; what it does need is listed above.
LAVA_DL_PIN = "lava-dl==0.6.0"

# By extra: packages that name a torchvision, whose wheel is a CUDA build, and more that they do not import here.
WITHOUT_DEPENDENCIES = {"conformance": ("norse", "spikingjelly"), "test": ("torchattacks",)}

STAMP = ".spikeguard-stamp"
UNFINISHED = "unfinished"
PROBE = "import ensurepip, venv, sys; print(*sys.version_info[:2])"
PROBE_SECONDS = 30
FAILED, USAGE, NO_INTERPRETER, INTERRUPTED = 1, 2, 3, 130


class SetupError(Exception):
    """What stopped the setup, as the user should read it, and the exit status that tells it to a caller."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Step:
    """One pip command, tried with each argument list until one works, and the way out if none does."""

    title: str
    attempts: tuple[tuple[str, ...], ...]
    remedy: str = "Mend what pip reports above, then set up again."


@dataclass(frozen=True)
class Environment:
    """What an environment is made from.

    Attributes:
        name: as given on the command line.
        folder: under the project.
        python: the versions it can be made with.
        steps: what pip installs, in order.
        imports: modules that must import before the environment counts as finished.
        sources: files whose content decides what is installed.
    """

    name: str
    folder: Path
    python: VersionRange
    steps: tuple[Step, ...]
    imports: tuple[str, ...]
    sources: tuple[Path, ...] = ()

    @property
    def interpreter(self) -> Path:
        """The environment's own Python."""
        return self.folder / "bin" / "python"

    def digest(self) -> str:
        """Hash of everything that decides the environment's content, and of its place."""
        content = hashlib.sha256(repr((self.folder, self.python, self.steps, self.imports)).encode())
        for source in self.sources:
            content.update(hashlib.sha256(source.read_bytes()).digest())
        return content.hexdigest()


def main_environment(root: Path, extras: str, torch_build: str) -> Environment:
    """The environment of the project itself, editable, every version pinned by ``constraints.txt``."""
    constraints = root / "constraints.txt"
    pinned = ("--constraint", str(constraints))
    bare = {extra: names for extra, names in WITHOUT_DEPENDENCIES.items() if extra in extras.split(",")}
    return Environment(
        name="main",
        folder=root / ".venv",
        python=MAIN_PYTHON,
        steps=(
            torch_step(pinned_version("torch", constraints.read_text()), torch_build, sys.platform, pinned),
            Step("spikeguard and its libraries", ((*pinned, "--editable", f"{root}[{extras}]"),)),
            *(Step(", ".join(names), ((*pinned, "--no-deps", *names),)) for names in bare.values()),
        ),
        imports=("torch", "snntorch", "onnxruntime", "h5py", "numba", "sklearn"),
        sources=(root / "pyproject.toml", constraints),
    )


def lava_environment(root: Path) -> Environment:
    """The environment of the Lava simulator, which runs on Python 3.10 only."""
    return Environment(
        name="lava",
        folder=root / ".venv-lava",
        python=LAVA_PYTHON,
        steps=(
            Step(LAVA_PINS[0], (LAVA_PINS,)),
            Step(LAVA_DL_PIN, (("--no-deps", LAVA_DL_PIN),)),
        ),
        imports=("h5py", "lava.magma.core.run_configs", "lava.lib.dl"),
    )


def pinned_version(package: str, constraints: str) -> str:
    """The version that a constraints file pins ``package`` to."""
    found = re.search(rf"^{re.escape(package)}==(\S+)", constraints, re.MULTILINE)
    if found is None:
        raise SetupError(f"constraints.txt does not pin {package}; add a line '{package}==VERSION'")
    return found[1]


def torch_step(version: str, build: str, platform: str, pinned: tuple[str, ...]) -> Step:
    """How torch is installed: ``build`` is ``cpu`` or ``cuda``, ``platform`` as in ``sys.platform``.

    On Linux the CPU build is asked for by its full name, first where pip is configured to look, then at
    PyTorch's own index. pip is not asked to resolve torch first: even a dry run downloads the wheels it
    resolves to, 2.8 GB for the CUDA build. The later steps bring what torch depends on.
    """
    if platform != "linux":
        return Step(f"torch {version}", ((*pinned, f"torch=={version}"),))
    if build == "cuda":
        return Step(f"torch {version} for CUDA", ((*pinned, f"torch=={version},!={version}+cpu"),))
    wheel = ("--no-deps", f"torch=={version}+cpu")
    return Step(
        f"torch {version}, CPU build",
        (wheel, ("--index-url", TORCH_CPU_INDEX, *wheel)),
        f"Neither where pip is configured to look nor {TORCH_CPU_INDEX} gave a CPU build for this Python. "
        "Mend that, choose another Python (make PYTHON=...), or take the CUDA build: SPIKEGUARD_TORCH=cuda",
    )


def chosen_torch_build(requested: str, gpu: bool) -> str:
    """``cpu`` or ``cuda``, from the value of SPIKEGUARD_TORCH and whether there is a GPU."""
    if requested not in TORCH_BUILDS:
        raise SetupError(f"SPIKEGUARD_TORCH is '{requested}'; it may be {', '.join(TORCH_BUILDS)}", USAGE)
    if requested == "auto":
        return "cuda" if gpu else "cpu"
    return requested


def has_gpu() -> bool:
    """Whether the NVIDIA driver runs and lists a GPU."""
    with suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
        )
        return "GPU" in listing.stdout
    return False


def python_version(interpreter: Path) -> tuple[int, int] | None:
    """Version of a Python that runs and can make environments; None for a dead shim or a missing file."""
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = subprocess.run(
            [str(interpreter), "-I", "-c", PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
        )
        major, minor = answer.stdout.split()
        return int(major), int(minor)
    return None


def interpreter_candidates(name: str, search_path: str, home: Path) -> list[Path]:
    """Files that may be the interpreter ``name`` (say ``python3.10``): all of the PATH, then usual places.

    A name on the PATH may be a shim that runs nothing, so a live one behind it counts as well.
    """
    version = name[len("python") :]
    folders = [Path(folder) for folder in search_path.split(os.pathsep) if folder]
    folders += sorted(home.glob(f".pyenv/versions/{version}*/bin"), reverse=True)
    folders += [Path("/usr/local/bin"), Path("/usr/bin"), Path("/opt/homebrew/bin"), home / ".local" / "bin"]
    return [path for path in dict.fromkeys(folder / name for folder in folders) if path.is_file()]


def uv_candidates(version: str) -> Iterator[Path]:
    """Interpreters that uv, where it is installed, knows of or fetches."""
    uv = shutil.which("uv")
    if uv is None:
        return
    find, fetch = (uv, "python", "find", "--no-project", version), (uv, "python", "install", version)
    for command in (find, fetch, find):
        answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if command is find and answer.returncode == 0:
            yield Path(answer.stdout.strip())


def first_working(candidates: Iterable[Path], python: VersionRange) -> tuple[Path | None, list[Path]]:
    """The first candidate that runs and has the right version, and those tried before it in vain."""
    refused: list[Path] = []
    for candidate in candidates:
        if python.accepts(python_version(candidate)):
            return candidate, refused
        refused.append(candidate)
    return None, refused


def find_lava_python(settings: Mapping[str, str]) -> Path:
    """A Python 3.10 that runs: the one SPIKEGUARD_PYTHON310 names, else the first found that works.

    Raises:
        SetupError: with status 2 if the named one does not serve, 3 if none is found.
    """
    named = settings.get("SPIKEGUARD_PYTHON310")
    if named:
        if not LAVA_PYTHON.accepts(python_version(Path(named))):
            raise SetupError(
                f"SPIKEGUARD_PYTHON310={named} is not a Python 3.10 that runs; name one or unset it", USAGE
            )
        return Path(named)

    def candidates() -> Iterator[Path]:
        yield from interpreter_candidates("python3.10", settings.get("PATH", ""), Path.home())
        yield from uv_candidates("3.10")

    found, refused = first_working(candidates(), LAVA_PYTHON)
    if found is None:
        tried = "".join(f"\n    {path} (does not run, or lacks ensurepip)" for path in refused) or " nothing found"
        raise SetupError(
            f"no Python 3.10, and {LAVA_PINS[0]} runs on no other. Tried:{tried}\n"
            "  Install one (uv python install 3.10, pyenv install 3.10, or your system's python3.10 with\n"
            "  python3.10-venv), or name one: SPIKEGUARD_PYTHON310=/path/to/python3.10",
            NO_INTERPRETER,
        )
    return found


def find_python(environment: Environment, settings: Mapping[str, str]) -> Path:
    """The interpreter to make an environment with."""
    return find_lava_python(settings) if environment.python == LAVA_PYTHON else find_main_python()


def find_main_python() -> Path:
    """The Python that runs this file, if it is new enough and can make environments."""
    if not MAIN_PYTHON.accepts(sys.version_info[:2]):
        raise SetupError(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}", USAGE)
    if python_version(Path(sys.executable)) is None:
        raise SetupError(f"{sys.executable} cannot make environments; install its venv package (python3-venv)", USAGE)
    return Path(sys.executable)


def is_finished(environment: Environment) -> bool:
    """Whether the environment was finished from the same sources, in the same place, and its Python runs."""
    if read_stamp(environment) != environment.digest():
        return False
    with suppress(OSError):
        return subprocess.run([str(environment.interpreter), "-I", "-c", ""], check=False).returncode == 0
    return False


def is_sound(environment: Environment) -> bool:
    """Whether an environment that is not finished can be completed in place instead of being made anew."""
    activate = environment.folder / "bin" / "activate"
    return (
        read_stamp(environment) != UNFINISHED
        and activate.is_file()
        and names_folder(activate.read_text(), environment.folder)
        and environment.python.accepts(python_version(environment.interpreter))
    )


def names_folder(activate: str, folder: Path) -> bool:
    """Whether an activation script was written for ``folder``; environments do not survive being moved."""
    return re.search(rf"""VIRTUAL_ENV=["']?{re.escape(str(folder))}["']?\s*$""", activate, re.MULTILINE) is not None


def read_stamp(environment: Environment) -> str | None:
    """The stamp, or None where there is none."""
    with suppress(OSError, UnicodeDecodeError):
        return (environment.folder / STAMP).read_text().strip()
    return None


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Waits until no other setup works on ``folder`` (made if missing), and keeps others waiting.

    Commands started meanwhile inherit the lock: should this process be killed, a pip that lives on keeps it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make(environment: Environment, settings: Mapping[str, str]) -> None:
    """Bring an environment to the state its description asks for.

    Raises:
        SetupError: if there is no interpreter for it, or pip fails (its output is in the message).
    """
    with sole_user(environment.folder):
        if is_finished(environment):
            return
        began = time.monotonic()
        stamp = environment.folder / STAMP
        if not is_sound(environment):
            try:  # resolved, because it may be a link in the very folder that is emptied
                python = find_python(environment, settings).resolve()
            finally:
                empty(environment.folder)
            say(environment, f"new environment with {python}")
            stamp.write_text(UNFINISHED)
            run([str(python), "-I", "-m", "venv", str(environment.folder)])
        stamp.write_text(UNFINISHED)
        try:
            for step in environment.steps:
                say(environment, f"installing {step.title}")
                install(environment, step)
            run([str(environment.interpreter), "-I", "-c", f"import {', '.join(environment.imports)}"])
        except SetupError:
            stamp.unlink()  # pip undoes what it cannot finish, so the next setup goes on from here
            raise
        stamp.write_text(environment.digest())
        say(environment, f"ready after {time.monotonic() - began:.0f} s")


def install(environment: Environment, step: Step) -> None:
    """Run one step; if every attempt fails, all their output is shown."""
    failures = []
    for arguments in step.attempts:
        pip = [
            str(environment.interpreter),
            "-I",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        try:
            run([*pip, *arguments])
        except SetupError as failure:
            failures.append(str(failure))
        else:
            return
    raise SetupError("\n".join([*failures, step.remedy]))


def run(command: Sequence[str]) -> None:
    """Run a command quietly, in a process group that does not outlive an interruption of this one.

    Raises:
        SetupError: if it fails, with the command and its output.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        close_fds=False,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        stop_group(process)
        raise
    if process.returncode != 0:
        raise SetupError(f"failed: {' '.join(command)}\n{output.rstrip()}")


def stop_group(process: subprocess.Popen[str]) -> None:
    """End a process and everything it started: politely, then surely."""
    for kind, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def empty(folder: Path) -> None:
    """Remove what a folder holds, and keep the folder, which a lock may rest on."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def say(environment: Environment, text: str) -> None:
    """One line of progress."""
    print(f"{environment.name}: {text}", flush=True)


def overall_status(statuses: Iterable[int]) -> int:
    """One exit status for several environments: a failure first, then a missing interpreter."""
    failures = [status for status in statuses if status]
    return next((status for status in failures if status != NO_INTERPRETER), failures[0] if failures else 0)


def make_here(environment: Environment, settings: Mapping[str, str]) -> int:
    """Make an environment, say what went wrong, and give the exit status."""
    try:
        make(environment, settings)
    except SetupError as error:
        print(f"{environment.name}: {error}", file=sys.stderr, flush=True)
        return error.status
    return 0


def make_apart(name: str, extras: str) -> subprocess.Popen[str]:
    """Make another environment beside this one, in a process of its own."""
    return subprocess.Popen([sys.executable, "-I", str(Path(__file__).resolve()), name, "--extras", extras], text=True)


def main(arguments: Sequence[str], settings: Mapping[str, str]) -> int:
    """Set up the named environments, those after the first at the same time in processes of their own."""
    parser = argparse.ArgumentParser(description="Makes the environments that spikeguard runs in.")
    parser.add_argument("names", nargs="+", choices=("main", "lava"), metavar="main|lava")
    parser.add_argument(
        "--extras", default="train,conformance,test", help="the extras of pyproject.toml that main gets"
    )
    options = parser.parse_args(arguments)
    build = chosen_torch_build(settings.get("SPIKEGUARD_TORCH") or "auto", has_gpu())
    known = {"main": main_environment(ROOT, options.extras, build), "lava": lava_environment(ROOT)}
    wanted = [name for name in dict.fromkeys(options.names) if not is_finished(known[name])]
    others = [make_apart(name, options.extras) for name in wanted[1:]]
    try:
        statuses = [make_here(known[name], settings) for name in wanted[:1]]
        return overall_status(statuses + [other.wait() for other in others])
    finally:  # after an interruption they still run
        for other in others:
            other.terminate()
            other.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except SetupError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
