from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hardware import environments
from hardware.environments import Environment, SetupError, Step, VersionRange

ANY_PYTHON = VersionRange((3, 0), (4, 0))
CURRENT = sys.version_info[:2]


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def live(path: Path) -> Path:
    return script(path, f'exec "{sys.executable}" "$@"')


def dead(path: Path) -> Path:
    return script(path, 'echo "no such version" >&2; exit 127')


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment that installs nothing."""
    source = tmp_path / "pins.txt"
    source.write_text("one==1\n")
    return Environment("main", tmp_path / ".venv", ANY_PYTHON, (), ("json",), (source,))


@pytest.fixture
def made(environment: Environment) -> Environment:
    """The same, made without pip, which takes seconds, and not yet stamped."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment.folder)], check=True)
    return environment


class TestInterpreters:
    def test_a_live_interpreter_behind_a_dead_shim_is_found(self, tmp_path: Path) -> None:
        shim = dead(tmp_path / "shims" / "python3.10")
        alive = live(tmp_path / "bin" / "python3.10")
        path = os.pathsep.join([str(shim.parent), str(tmp_path / "missing"), str(alive.parent)])
        candidates = environments.interpreter_candidates("python3.10", path, tmp_path)
        assert candidates[:2] == [shim, alive]
        assert environments.first_working(candidates, ANY_PYTHON) == (alive, [shim])

    def test_pyenv_versions_are_candidates_newest_first(self, tmp_path: Path) -> None:
        for version in ("3.9.18", "3.10.12", "3.10.13", "3.11.7"):
            live(tmp_path / ".pyenv" / "versions" / version / "bin" / f"python{version.rpartition('.')[0]}")
        candidates = environments.interpreter_candidates("python3.10", "", tmp_path)
        found = [path.parent.parent.name for path in candidates if path.is_relative_to(tmp_path)]
        assert found == ["3.10.13", "3.10.12"]

    def test_the_version_must_fit(self, tmp_path: Path) -> None:
        alive = live(tmp_path / "python3.10")
        other = VersionRange((CURRENT[0], CURRENT[1] + 1), (4, 0))
        assert environments.python_version(alive) == CURRENT
        assert environments.first_working([alive], other) == (None, [alive])

    def test_one_that_cannot_make_environments_does_not_count(self, tmp_path: Path) -> None:
        crippled = script(tmp_path / "python3", "echo 'No module named ensurepip' >&2; exit 1")
        assert environments.python_version(crippled) is None

    def test_a_named_interpreter_that_does_not_serve_is_a_usage_error(self, tmp_path: Path) -> None:
        shim = dead(tmp_path / "python3.10")
        with pytest.raises(SetupError, match="SPIKEGUARD_PYTHON310") as caught:
            environments.find_lava_python({"SPIKEGUARD_PYTHON310": str(shim)})
        assert caught.value.status == environments.USAGE

    def test_without_any_the_message_names_what_was_tried_and_the_remedy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shim = dead(tmp_path / "python3.10")
        monkeypatch.setattr(environments, "interpreter_candidates", lambda *_: [shim])
        monkeypatch.setattr(environments, "uv_candidates", lambda _: iter(()))
        with pytest.raises(SetupError) as caught:
            environments.find_lava_python({})
        assert caught.value.status == environments.NO_INTERPRETER
        assert str(shim) in str(caught.value)
        assert "SPIKEGUARD_PYTHON310=" in str(caught.value)

    def test_uv_is_asked_to_fetch_only_where_it_knows_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetched = tmp_path / "fetched"
        uv = script(
            tmp_path / "uv",
            f'case "$2" in install) touch {fetched};; find) [ -e {fetched} ] && echo /new/python3.10;; esac',
        )
        monkeypatch.setattr(shutil, "which", lambda _: str(uv))
        assert list(environments.uv_candidates("3.10")) == [Path("/new/python3.10")]

    def test_an_old_python_is_refused_for_the_main_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(environments, "MAIN_PYTHON", VersionRange((3, 99), (4, 0)))
        with pytest.raises(SetupError, match="is needed") as caught:
            environments.find_main_python()
        assert caught.value.status == environments.USAGE


class TestTorchBuild:
    @pytest.mark.parametrize(
        ("requested", "gpu", "build"),
        [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
    )
    def test_choice(self, requested: str, gpu: bool, build: str) -> None:
        assert environments.chosen_torch_build(requested, gpu) == build

    def test_an_unknown_build_is_a_usage_error(self) -> None:
        with pytest.raises(SetupError, match="auto, cpu, cuda") as caught:
            environments.chosen_torch_build("rocm", gpu=False)
        assert caught.value.status == environments.USAGE

    @pytest.mark.parametrize(
        ("build", "platform", "accepted", "refused"),
        [
            ("cpu", "linux", ["2.13.0+cpu"], ["2.13.0", "2.13.0+cu130"]),
            ("cuda", "linux", ["2.13.0", "2.13.0+cu130"], ["2.13.0+cpu", "2.14.0"]),
            ("cpu", "darwin", ["2.13.0"], ["2.14.0"]),
        ],
    )
    def test_no_attempt_can_take_the_wrong_build(
        self, build: str, platform: str, accepted: list[str], refused: list[str]
    ) -> None:
        step = environments.torch_step("2.13.0", build, platform, ("--constraint", "constraints.txt"))
        for attempt in step.attempts:
            specifier = Requirement(attempt[-1]).specifier
            assert all(version in specifier for version in accepted)
            assert not any(version in specifier for version in refused)

    def test_the_cpu_build_is_looked_for_where_pip_is_configured_first(self) -> None:
        first, second = environments.torch_step("2.13.0", "cpu", "linux", ()).attempts
        assert "--index-url" not in first
        assert environments.TORCH_CPU_INDEX in second

    def test_the_project_pins_torch(self) -> None:
        constraints = (environments.ROOT / "constraints.txt").read_text()
        assert environments.pinned_version("torch", constraints).count(".") == 2
        with pytest.raises(SetupError, match="does not pin torchvision"):
            environments.pinned_version("torchvision", constraints)

    @pytest.mark.parametrize(("body", "expected"), [("echo 'GPU 0: X'", True), ("exit 9", False), ("true", False)])
    def test_a_gpu_counts_only_if_the_driver_lists_it(
        self, body: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script(tmp_path / "nvidia-smi", body)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert environments.has_gpu() is expected


class TestStamp:
    def test_finished_needs_the_same_sources_and_a_python_that_runs(self, made: Environment) -> None:
        assert not environments.is_finished(made)
        (made.folder / environments.STAMP).write_text(made.digest())
        assert environments.is_finished(made)
        assert not environments.is_finished(replace(made, imports=("json", "csv")))
        made.interpreter.unlink()
        assert not environments.is_finished(made)

    def test_a_changed_source_is_noticed(self, made: Environment) -> None:
        (made.folder / environments.STAMP).write_text(made.digest())
        made.sources[0].write_text("one==2\n")
        assert not environments.is_finished(made)

    def test_a_sound_environment_is_completed_in_place(self, made: Environment) -> None:
        assert environments.is_sound(made)
        assert not environments.is_sound(replace(made, python=VersionRange((3, 99), (4, 0))))

    def test_one_that_a_kill_left_unfinished_is_not_sound(self, made: Environment) -> None:
        (made.folder / environments.STAMP).write_text(environments.UNFINISHED)
        assert not environments.is_sound(made)

    def test_one_that_was_moved_is_neither_finished_nor_sound(self, made: Environment) -> None:
        (made.folder / environments.STAMP).write_text(made.digest())
        moved = replace(made, folder=made.folder.rename(made.folder.with_name(".venv-moved")))
        assert not environments.is_finished(moved)
        assert not environments.is_sound(moved)

    @pytest.mark.parametrize(("extra", "names"), environments.WITHOUT_DEPENDENCIES.items())
    def test_some_packages_come_with_their_extra_and_without_their_dependencies(
        self, extra: str, names: tuple[str, ...]
    ) -> None:
        more, training = (
            environments.main_environment(environments.ROOT, e, "cpu") for e in (f"train,{extra}", "train")
        )
        *others, bare = more.steps
        assert [step.title for step in others] == [step.title for step in training.steps]
        assert all(attempt[-1 - len(names) :] == ("--no-deps", *names) for attempt in bare.attempts)
        constraints = (environments.ROOT / "constraints.txt").read_text()
        assert all(environments.pinned_version(name, constraints) for name in names)

    def test_lava_does_not_depend_on_the_project_files(self, tmp_path: Path) -> None:
        lava = environments.lava_environment(tmp_path)
        assert lava.sources == ()
        assert any("--no-deps" in attempt for step in lava.steps for attempt in step.attempts)


class TestMake:
    @pytest.fixture
    def commands(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """What would run: environments are made without pip, pip commands fail if they name 'broken'."""
        recorded: list[list[str]] = []
        real_run = environments.run

        def recording(command: list[str]) -> None:
            recorded.append(command)
            if "venv" in command:
                command = [*command[:-1], "--without-pip", command[-1]]
            if "pip" not in command:
                real_run(command)
            elif "broken" in command:
                raise SetupError("pip said no")

        monkeypatch.setattr(environments, "run", recording)
        return recorded

    def test_the_second_time_does_nothing(self, environment: Environment, commands: list[list[str]]) -> None:
        environments.make(environment, {})
        assert environments.is_finished(environment)
        del commands[:]
        environments.make(environment, {})
        assert commands == []

    def test_attempts_are_made_until_one_works(self, made: Environment, commands: list[list[str]]) -> None:
        step = Step("a", (("broken",), ("good",), ("never",)))
        environments.make(replace(made, steps=(step,)), {})
        assert [command[-1] for command in commands if "pip" in command] == ["broken", "good"]

    @pytest.mark.usefixtures("commands")
    def test_a_failure_shows_all_output_and_lets_the_next_setup_go_on(self, made: Environment) -> None:
        failing = replace(made, steps=(Step("a", (("broken",), ("broken", "broken")), remedy="do this"),))
        with pytest.raises(SetupError, match=r"pip said no\npip said no\ndo this"):
            environments.make(failing, {})
        assert not environments.is_finished(failing)
        assert environments.is_sound(failing)

    @pytest.mark.usefixtures("commands")
    def test_an_import_that_fails_leaves_it_unfinished(self, made: Environment) -> None:
        with pytest.raises(SetupError, match="No module named 'nowhere'"):
            environments.make(replace(made, imports=("nowhere",)), {})
        assert environments.read_stamp(made) is None

    def test_an_unsound_one_is_made_anew(self, made: Environment, commands: list[list[str]]) -> None:
        (made.folder / environments.STAMP).write_text(environments.UNFINISHED)
        (made.folder / "leftover").mkdir()
        environments.make(made, {})
        assert environments.is_finished(made)
        assert not (made.folder / "leftover").exists()
        assert any("venv" in command for command in commands)

    def test_without_an_interpreter_nothing_usable_is_left(
        self, made: Environment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none(*_: object) -> Path:
            raise SetupError("none", environments.NO_INTERPRETER)

        monkeypatch.setattr(environments, "find_python", none)
        (made.folder / environments.STAMP).write_text(environments.UNFINISHED)
        assert environments.make_here(made, {}) == environments.NO_INTERPRETER
        assert not made.interpreter.exists()

    def test_two_setups_do_not_work_on_one_folder_at_once(self, tmp_path: Path) -> None:
        with environments.sole_user(tmp_path / ".venv"):
            other = os.open(tmp_path / ".venv", os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)


class TestRun:
    def test_a_failure_carries_the_command_and_its_output(self) -> None:
        with pytest.raises(SetupError, match=r"failed: sh -c .*\nout\nerr"):
            environments.run(["sh", "-c", "echo out; echo err >&2; exit 3"])

    def test_an_interruption_ends_the_whole_process_group(self, tmp_path: Path) -> None:
        started = tmp_path / "started"
        program = f"from hardware.environments import run; run(['sh', '-c', 'sleep 60 & touch {started}; wait'])"
        reading, writing = os.pipe()  # ends when the last process that holds its other side does
        setup = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=environments.ROOT,
            stderr=subprocess.DEVNULL,
            pass_fds=(writing,),
        )
        os.close(writing)
        end = time.monotonic() + 20
        while not started.exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert select.select([reading], [], [], 0)[0] == []
        setup.send_signal(signal.SIGINT)
        assert setup.wait(20) != 0
        assert select.select([reading], [], [], 20)[0] == [reading]
        assert os.read(reading, 1) == b""
        os.close(reading)

    @pytest.mark.parametrize(
        ("statuses", "expected"),
        [([0, 0], 0), ([0, 3], 3), ([3, 1], 1), ([1, 3], 1), ([2, 0], 2), ([], 0)],
    )
    def test_a_failure_counts_more_than_a_missing_interpreter(self, statuses: list[int], expected: int) -> None:
        assert environments.overall_status(statuses) == expected

    def test_the_script_needs_nothing_installed(self, tmp_path: Path) -> None:
        lone = Path(shutil.copy(environments.__file__, tmp_path / "environments.py"))
        finished = subprocess.run(
            [sys.executable, "-I", "-S", str(lone), "--help"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        assert "main|lava" in finished.stdout
