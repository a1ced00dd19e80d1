"""Commands that make something: runs, bundles, sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from pipeline.commands import terminal
from pipeline.commands.checking import conclude
from pipeline.commands.settings import (
    DataFolder,
    Jobs,
    Overrides,
    Reuse,
    RunFolder,
    RunOrBundle,
    Threads,
    bundle_folder,
    config_named,
    config_of,
    folder_override,
    require_data_folder,
    use_threads,
)

if TYPE_CHECKING:
    from hardware.formats.bundle import Bundle
    from pipeline.config import Config


def demo(
    folder: RunFolder = None, overrides: Overrides = None, resume: Reuse = True, jobs: Jobs = 1, threads: Threads = 1
) -> None:
    """Run everything on the handwritten digits that ship with scikit-learn, on all runtimes there are."""
    from pipeline.run import without_lava

    config, missing = without_lava(config_named("digits", overrides))
    for row in missing:
        terminal.errors.print(
            f"[yellow]{row['name']} will not be certified:[/yellow] {escape(row['reason'])}", highlight=False
        )
    _run(config, folder or Path("runs/demo"), resume, jobs, threads, missing)


def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a .yaml file or the name of a preset")],
    overrides: Overrides = None,
    folder: RunFolder = None,
    data_dir: DataFolder = None,
    resume: Reuse = True,
    jobs: Jobs = 1,
    threads: Threads = 1,
) -> None:
    """Train, convert, fine-tune, quantise, export and check what a configuration says."""
    from pipeline.run import require_runtimes

    parsed = config_named(config, [*(overrides or []), *folder_override(data_dir)])
    require_data_folder(parsed)
    require_runtimes(parsed)
    _run(parsed, folder or Path("runs") / Path(config).stem, resume, jobs, threads, [])


def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a bundle, a run folder, or a NIR file")],
    target: Annotated[str, typer.Option("--target", help="nir, loihi, onnx, triton or all (of the others)")] = "all",
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="of the new bundle (default: bundle), or a Triton model repository"),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="of the model in a Triton repository; default: model")
    ] = None,
    written_by: Annotated[
        str | None, typer.Option(help="of a NIR file: the framework, snntorch, norse, spikingjelly or sinabs")
    ] = None,
    assumed: Annotated[
        list[str] | None, typer.Option("--assume", metavar="KEY=VALUE", help="what a NIR file leaves open")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(min=2, max=8, help="of the weights of a NIR file of other software; default: 8")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help=".npz with images and perhaps labels, to quantise and compare a NIR file on")
    ] = None,
) -> None:
    """Write a bundle with the files of one target (the integer network and golden traces always go with them).

    A NIR file of other software is quantised first. What NIR leaves open is asked for.

    Target triton is no bundle: it puts the folder of one model, with a self-check for the machine that will serve it,
    into a Triton model repository (default: triton) and leaves the repository's other models alone.
    """
    from exporters.bundle import EXPORT_TARGETS, FLOAT_ONNX_TARGETS, export_target

    if target not in (*EXPORT_TARGETS, "triton"):
        terminal.usage(f"there is no target {target!r}; choose among {', '.join(EXPORT_TARGETS)}, triton")
    from hardware.formats.bundle import open_bundle

    if name is not None and target != "triton":
        terminal.usage(f"--name is of a model in a Triton repository; target {target} makes a bundle, named by --out")
    if source.is_file():
        if target == "triton":
            terminal.usage(f"target triton is made of a bundle; export {source} to one first")
        _import(source, target, folder or Path("bundle"), written_by, assumed or [], bits, data)
        return
    if written_by or assumed or bits or data:
        terminal.usage(f"--written-by, --assume, --bits and --data are for NIR files; {source} is none")
    bundle = open_bundle(bundle_folder(source))
    if target == "triton":
        _write_triton(bundle, folder or Path("triton"), name or "model")
        return
    folder = folder or Path("bundle")
    export_target(bundle, target, folder, _float_onnx(bundle) if target in FLOAT_ONNX_TARGETS else {})
    terminal.show_files(open_bundle(folder))


def sweep(
    source: RunOrBundle,
    bits: Annotated[list[int] | None, typer.Option("--bits", help="of the weights, 2 to 8; default: 8 6 4 3 2")] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option("--steps", help="T, 1 to 64; default: as fine-tuned for, half and twice as many"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="first test images; default: all of the run's")] = None,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="default: sweep beside the bundle")
    ] = None,
    data_dir: DataFolder = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="reuse finished points")] = True,
    threads: Threads = 1,
) -> None:
    """Quantise to several bits at several T, and attack each: accuracies, spikes, operations, memory; table and plot.

    A report on test images: whoever chooses a point by it has to check that point on others.
    """
    from pipeline.sweep.grid import grid_of, option_problems

    if problems := option_problems(bits, steps, samples, overrides or []):
        terminal.usage("\n".join(problems))
    from hardware.formats.bundle import open_bundle
    from pipeline.run import sole_user
    from pipeline.sweep.report import accuracy_table, cost_table, notes_of, refusal_table, write_sweep
    from pipeline.sweep.sweeping import run_sweep, subject_of

    bundle = open_bundle(bundle_folder(source))
    config = config_of(bundle, [*(overrides or []), *folder_override(data_dir)])
    if samples is not None and samples > config.data.test:
        terminal.usage(f"--samples {samples} is more than the {config.data.test} test images of the run")
    require_data_folder(config)
    use_threads(threads)
    subject = subject_of(bundle, config, samples)
    folder = folder or bundle.path.parent / "sweep"
    with sole_user(folder):
        result = run_sweep(subject, grid_of(bits, steps, subject.network.steps), folder, fresh=not resume)
        files = write_sweep(result, folder, terminal.command_line())
    for table in (accuracy_table(result), cost_table(result), refusal_table(result)):
        if table.rows:
            terminal.out.print(terminal.table(*table))
    for note in notes_of(result):
        terminal.out.print(f"[dim]{escape(note)}[/dim]", highlight=False)
    terminal.out.print(escape(f"sweep: {', '.join(map(str, files))}"), soft_wrap=True)


def _run(config: Config, folder: Path, resume: bool, jobs: int, threads: int, missing: list[dict[str, str]]) -> None:
    from pipeline.run import Run, check_run, require_deployable, sole_user

    use_threads(threads)
    with sole_user(folder):
        work = Run(config, folder, terminal.command_line())
        require_deployable(work)
        timings = work.ensure(fresh=not resume)
        result = check_run(work, timings, missing, jobs)
    conclude(result, folder)


def _import(
    source: Path,
    target: str,
    folder: Path,
    written_by: str | None,
    assumed: list[str],
    bits: int | None,
    data: Path | None,
) -> None:
    from pipeline.importing.conventions import WRITERS
    from pipeline.importing.deployment import import_nir
    from pipeline.importing.tables import comparison_table, conclusion

    if written_by not in (None, *WRITERS):
        terminal.usage(
            f"nothing is known of how {written_by!r} writes NIR; choose among {', '.join(WRITERS)}, or use --assume"
        )
    result = import_nir(source, target, folder, written_by=written_by, assumed=assumed, bits=bits, data=data)
    terminal.show_files(result.bundle)
    terminal.out.print(terminal.table(*comparison_table(result)))
    for name, problems in result.left_out.items():
        why = "; ".join(f"{one.object}: {one.rule}" for one in problems)
        terminal.out.print(
            f"[yellow]{name} is left out, it cannot hold this network[/yellow] ({escape(why)})", highlight=False
        )
    for row in result.rows:
        if row.reason:
            terminal.out.print(f"[yellow]{row.model} did not run:[/yellow] {escape(row.reason)}", highlight=False)
    good, sentence = conclusion(result)
    terminal.out.print(
        f"[{'green' if good else 'red'}]{'OK' if good else 'FAIL'}[/] {escape(sentence)}", highlight=False
    )
    if not good:
        raise typer.Exit(terminal.FAIL)


def _write_triton(bundle: Bundle, repository: Path, name: str) -> None:
    from exporters.triton import write_triton

    model = write_triton(bundle, repository, name)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    rows = ((str(path.relative_to(model)), f"{path.stat().st_size:,}") for path in files)
    terminal.out.print(terminal.table(str(model), ("file", "bytes"), rows))
    check = escape(str(model / "selfcheck.py"))
    terminal.out.print(f"where it will run: python {check} --provider CUDAExecutionProvider", soft_wrap=True)


def _float_onnx(bundle: Bundle) -> dict[str, bytes]:
    """The ONNX files of a bundle's float SNN, if it holds one."""
    from pipeline.models.float_file import holds_spiking, load_float
    from pipeline.models.float_onnx import float_onnx_files

    return float_onnx_files(load_float(bundle.path), bundle.golden.codes) if holds_spiking(bundle.path) else {}
