"""Options that several commands share, and the configurations they lead to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hardware.errors import SpikeguardError
from pipeline.commands import terminal

if TYPE_CHECKING:
    from hardware.formats.bundle import Bundle
    from pipeline.config import Config

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="bundle folder")]
RunOrBundle = Annotated[Path, typer.Argument(metavar="SOURCE", help="a bundle, or a run folder")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting")]
RunFolder = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="run folder")]
Reuse = Annotated[bool, typer.Option("--resume/--fresh", help="reuse finished stages that are still valid")]
DataFolder = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="folder of the data set's standard files, or one that holds it"),
]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="processes that share the attacks; results stay the same")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="of torch; more than free cores is far slower")]


def bundle_folder(source: Path) -> Path:
    """The bundle that a run folder holds, or the folder itself."""
    nested = source / "bundle"
    return nested if nested.is_dir() else source


def use_threads(threads: int) -> None:
    """Set the number of threads of torch, and what else makes it fast on a CPU."""
    from pipeline.compute import use_cpu

    use_cpu(threads)


def config_named(source: str, overrides: Iterable[str] | None) -> Config:
    """A preset or a file, with overrides; whatever is wrong with it is wrong usage."""
    from pipeline.config import ConfigError, load_config

    try:
        return load_config(source, tuple(overrides or ()))
    except ConfigError as error:
        terminal.usage(str(error))


def config_of(bundle: Bundle, overrides: list[str]) -> Config:
    """The configuration in a bundle, with overrides; whatever is wrong with it is wrong usage."""
    from pipeline.config import ConfigError, override_config

    try:
        return override_config(bundle.manifest.provenance.get("config"), tuple(overrides), str(bundle.path))
    except ConfigError as error:
        terminal.usage(str(error))


def runtime_override(runtimes: list[str] | None) -> list[str]:
    """Runtimes named on the command line, as an override."""
    return [f"fidelity.runtimes={json.dumps(runtimes)}"] if runtimes else []


def folder_override(folder: Path | None) -> list[str]:
    """A data folder named on the command line, as an override."""
    # Overrides are YAML, which reads JSON's text as it is meant.
    return [] if folder is None else [f"data.dir={json.dumps(str(folder), ensure_ascii=False)}"]


def require_data_folder(config: Config) -> None:
    """Refuse as wrong usage, before any work, a configuration that does not say where its files lie."""
    from pipeline.data.loading import needs_folder, require_folder

    if needs_folder(config.data.name):
        try:
            require_folder(config.data)
        except SpikeguardError as error:
            terminal.usage(str(error))
