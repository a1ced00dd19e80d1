"""The command line. Imports are made by the command that needs them, so that verifying needs no torch."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hardware.errors import RuleViolations, SpikeguardError
from pipeline.bundle_tables import arm_table, attribution_table, conformance_table, mismatch_table, population_table
from pipeline.fidelity.tables import fidelity_tables
from pipeline.fidelity.wording import ATTRIBUTION_NOTE, corpus_line, looks_line
from pipeline.interruption import listen
from pipeline.target_tables import VIOLATION_COLUMNS, violation_rows

if TYPE_CHECKING:
    from hardware.formats.bundle import Bundle
    from pipeline.config import Config
    from pipeline.fidelity.check import CheckResult

app = typer.Typer(
    name="spikeguard",
    help="Train spiking networks that withstand attacks, export them, and prove that the deployed model does too.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
errors = Console(stderr=True)
ERROR, USAGE, FAIL, INTERRUPTED = 1, 2, 3, 130
UNBROKEN = 15  # columns no wider than this keep their words whole on a narrow terminal
CONFORMANCE_WIDTH = 140

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


@app.command()
def demo(
    folder: RunFolder = None, overrides: Overrides = None, resume: Reuse = True, jobs: Jobs = 1, threads: Threads = 1
) -> None:
    """Run everything on the handwritten digits that ship with scikit-learn, on all runtimes there are."""
    from pipeline.run import without_lava

    config, missing = without_lava(_config("digits", overrides))
    for row in missing:
        errors.print(f"[yellow]{row['name']} will not be certified:[/yellow] {escape(row['reason'])}", highlight=False)
    _run(config, folder or Path("runs/demo"), resume, jobs, threads, missing)


@app.command()
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

    parsed = _config(config, [*(overrides or []), *_folder_override(data_dir)])
    _require_data_folder(parsed)
    require_runtimes(parsed)
    _run(parsed, folder or Path("runs") / Path(config).stem, resume, jobs, threads, [])


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a bundle, a run folder, or a NIR file")],
    target: Annotated[str, typer.Option("--target", help="nir, loihi, onnx, triton or all (of the others)")] = "all",
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="of the new bundle (default: bundle), or a Triton model repository"),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="of the model in a Triton repository")] = "model",
    written_by: Annotated[
        str | None, typer.Option(help="of a NIR file: the framework, snntorch, norse, spikingjelly or sinabs")
    ] = None,
    assumed: Annotated[
        list[str] | None, typer.Option("--assume", metavar="KEY=VALUE", help="what a NIR file leaves open")
    ] = None,
    bits: Annotated[int, typer.Option(min=2, max=8, help="of the weights of a NIR file")] = 8,
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
        _usage(f"there is no target {target!r}; choose among {', '.join(EXPORT_TARGETS)}, triton")
    from hardware.formats.bundle import open_bundle

    if source.is_file():
        if target == "triton":
            _usage(f"target triton is made of a bundle; export {source} to one first")
        _import(source, target, folder or Path("bundle"), written_by, assumed or [], bits, data)
        return
    if written_by or assumed or data:
        _usage(f"--written-by, --assume and --data are for NIR files; {source} is none")
    bundle = open_bundle(_bundle_folder(source))
    if target == "triton":
        _write_triton(bundle, folder or Path("triton"), name)
        return
    folder = folder or Path("bundle")
    export_target(bundle, target, folder, _float_onnx(bundle) if target in FLOAT_ONNX_TARGETS else {})
    _show_files(open_bundle(folder))


@app.command()
def emulate(
    path: BundlePath,
    images: Annotated[
        Path | None,
        typer.Option(help=".npz with images (uint8 codes) and perhaps labels; default: golden inputs"),
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="reference, emulator, lava, netx, onnxruntime or http://host:port")
    ] = "emulator",
    trace: Annotated[Path | None, typer.Option(help="save spikes, membranes and readouts to this .npz")] = None,
) -> None:
    """Run images through a deployed model and show its answers."""
    from hardware.files import read_arrays, write_arrays
    from hardware.formats.bundle import open_bundle
    from hardware.runtimes.opening import open_runtime
    from hardware.trace import pack_trace

    bundle = open_bundle(path)
    arrays = {"images": bundle.golden.codes} if images is None else read_arrays(images)
    if "images" not in arrays:
        raise SpikeguardError(f"{images} holds no array 'images'; save it with numpy.savez(path, images=…)")
    if "labels" in arrays and arrays["labels"].shape != arrays["images"].shape[:1]:
        raise SpikeguardError(f"{images} has labels of shape {arrays['labels'].shape}; save one label per image")
    if arrays["images"].shape[:1] in ((), (0,)):
        raise SpikeguardError(f"{images} holds no images; save at least one")
    model = open_runtime(runtime, bundle)
    start = time.perf_counter()
    result = model.run(arrays["images"], record="traces" if trace else "readouts")
    seconds = time.perf_counter() - start
    answers = result.readouts.argmax(1)
    counts = {str(label): int((answers == label).sum()) for label in range(bundle.network.classes)}
    out.print(_table("answers", ("class", "images"), counts.items()))
    if "labels" in arrays:
        right = int((answers == arrays["labels"]).sum())
        out.print(f"accuracy {right / len(answers):.1%} ({right} of {len(answers)})")
    out.print(f"{len(answers)} images on {model.name} ({model.version}) in {seconds:.2f} s")
    if trace:
        write_arrays(trace, pack_trace(result))
        out.print(f"trace written to {escape(str(trace))}", soft_wrap=True)


@app.command()
def fidelity(
    path: BundlePath,
    runtimes: Annotated[
        list[str] | None, typer.Option("--runtime", help="to certify, or http://host:port; may be repeated")
    ] = None,
    overrides: Overrides = None,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="for report.json and report.html")] = Path(
        "fidelity"
    ),
    against: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="an earlier build, to compare with instead of the float SNN")
    ] = None,
    grow: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write a new bundle that holds the grown counterexamples")
    ] = None,
    data_dir: DataFolder = None,
    jobs: Jobs = 1,
    threads: Threads = 1,
) -> None:
    """Attack the trained and the deployed model alike, and conclude: exit code 0 pass, 3 fail, 4 undecided."""
    if grow is not None and grow.exists():
        _usage(f"{grow} exists already, and a bundle is never edited; name a new folder")
    from exporters.bundle import grow_bundle
    from hardware.formats.bundle import open_bundle
    from pipeline.fidelity.check import Circumstances, run_check
    from pipeline.fidelity.crafting import Images
    from pipeline.run import Run, collected_corpus, require_runtimes, require_same_test_split, write_report
    from pipeline.stages import quantization_images

    bundle, earlier = open_bundle(path), None if against is None else open_bundle(against)
    config = _config_of(bundle, [*(overrides or []), *_runtime_override(runtimes), *_folder_override(data_dir)])
    _require_data_folder(config)
    require_runtimes(config)
    _use_threads(threads)
    splits = Run(config, folder, "").data
    bundles = [bundle] if earlier is None else [bundle, earlier]
    for one in bundles:
        require_same_test_split(one, splits.test)
    images = Images(splits.test.codes, splits.test.labels, config.seed)
    calibration = quantization_images(splits.train, config.seed)
    circumstances = Circumstances(data=splits.name, reproduce=_command(), calibration=calibration, jobs=jobs)
    result = run_check(
        bundle,
        images,
        config.fidelity,
        folder / "crafted",
        circumstances,
        corpus=collected_corpus(bundles, folder),
        against=earlier,
    )
    write_report(result, folder)
    if grow is not None:
        grow_bundle(bundle, result.counterexamples, grow)
        out.print(escape(f"bundle with {len(result.counterexamples)} counterexamples: {grow}"), soft_wrap=True)
    _conclude(result, folder)


@app.command()
def selftest(
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="run folder")] = Path("runs/selftest"),
    seeds: Annotated[int, typer.Option(min=1, help="checks of the unharmed bundle")] = 20,
    images: Annotated[int, typer.Option(min=1, help="of each of those checks, of 800")] = 240,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="reuse what is finished and still valid")] = True,
    threads: Threads = 1,
) -> None:
    """Score the fidelity check itself: planted deployment errors must fail it, an unharmed bundle must pass it."""
    from pipeline.run import sole_user
    from pipeline.selftest.scoring import score
    from pipeline.selftest.tables import build_table, conclusion, false_alarm_line, score_table

    _use_threads(threads)
    with sole_user(folder):
        result = score(folder, seeds, images, fresh=not resume)
    for table in (score_table(result), build_table(result)):
        out.print(_table(*table))
    out.print(escape(false_alarm_line(result)), highlight=False)
    colour, word = ("green", "PASS") if result["passed"] else ("red", "FAIL")
    out.print(f"[bold {colour}]{word}[/] {escape(conclusion(result))}", highlight=False)
    out.print(escape(f"score: {folder / 'selftest.json'}"), soft_wrap=True)
    if not result["passed"]:
        raise typer.Exit(FAIL)


@app.command()
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
        _usage("\n".join(problems))
    from hardware.formats.bundle import open_bundle
    from pipeline.run import sole_user
    from pipeline.sweep.report import accuracy_table, cost_table, notes_of, refusal_table, write_sweep
    from pipeline.sweep.sweeping import run_sweep, subject_of

    bundle = open_bundle(_bundle_folder(source))
    config = _config_of(bundle, [*(overrides or []), *_folder_override(data_dir)])
    if samples is not None and samples > config.data.test:
        _usage(f"--samples {samples} is more than the {config.data.test} test images of the run")
    _require_data_folder(config)
    _use_threads(threads)
    subject = subject_of(bundle, config, samples)
    folder = folder or bundle.path.parent / "sweep"
    with sole_user(folder):
        result = run_sweep(subject, grid_of(bits, steps, subject.network.steps), folder, fresh=not resume)
        files = write_sweep(result, folder, _command())
    for table in (accuracy_table(result), cost_table(result), refusal_table(result)):
        if table.rows:
            out.print(_table(*table))
    for note in notes_of(result):
        out.print(f"[dim]{escape(note)}[/dim]", highlight=False)
    out.print(escape(f"sweep: {', '.join(map(str, files))}"), soft_wrap=True)


@app.command()
def verify(
    path: BundlePath,
    runtimes: Annotated[
        list[str] | None,
        typer.Option("--runtime", help="to certify too: lava, netx or http://host:port; may be repeated"),
    ] = None,
) -> None:
    """Check every byte and re-run the golden traces through every file of a bundle; needs no torch."""
    from hardware.formats.bundle import open_bundle
    from hardware.formats.verify import verify_bundle

    rows = verify_bundle(open_bundle(path), runtimes or ())
    out.print(_table(*mismatch_table(rows)))
    for row in rows:
        if row.note:
            out.print(f"[dim]{row.file} against the network as trained: {row.note}[/dim]", highlight=False)
    if not all(row.equal for row in rows):
        errors.print("[red]FAIL[/red] a file does not mean what the bundle says; export it again")
        raise typer.Exit(FAIL)
    out.print("[green]OK[/green] every file leaves the golden traces")


@app.command()
def conformance(
    path: BundlePath,
    samples: Annotated[int | None, typer.Option(min=1, help="first golden inputs; default: all")] = None,
    processes: Annotated[int, typer.Option(min=1, help="fresh ones for each reader of NIR")] = 5,
) -> None:
    """Run every file in every independent reader: exit code 0 all alike, 3 a value differs, 1 one failed."""
    try:
        from exporters.conformance.rows import READERS, Outcome, conformance_rows
    except ModuleNotFoundError as error:
        raise SpikeguardError(f"this needs {error.name}; install spikeguard with its extra 'conformance'") from error
    from hardware.formats.bundle import open_bundle
    from pipeline.progress import track

    bundle = open_bundle(path)
    if samples is not None and samples > len(bundle.golden.codes):
        _usage(f"--samples {samples} is more than the {len(bundle.golden.codes)} golden inputs of the bundle")
    rows = []
    with track("conformance", len(READERS)) as advance:
        for row in conformance_rows(bundle, samples, processes):
            rows.append(row)
            advance(f"{row.reader}: {row.outcome}")
    # On a narrower terminal lines wrap, but no cell is lost.
    wide = Console(file=out.file, width=max(out.width, CONFORMANCE_WIDTH))
    wide.print(_table(*conformance_table(rows)))
    outcomes = {row.outcome for row in rows}
    if Outcome.DIFFERS in outcomes:
        errors.print("[red]FAIL[/red] a reader computes something else than the reference")
        raise typer.Exit(FAIL)
    if Outcome.FAILED in outcomes:
        raise SpikeguardError("a reader failed, so nothing is shown of it; its row says why")
    if not outcomes & {Outcome.EQUAL, Outcome.DEVIATES}:
        raise SpikeguardError("nothing could be compared; the rows say why")
    equal = sum(row.outcome is Outcome.EQUAL for row in rows)
    deviating = sum(row.outcome is Outcome.DEVIATES for row in rows)
    parts = [f"{equal} readings equal the reference"]
    parts += [f"{deviating} compute in floating point and deviate"] if deviating else []
    parts += [f"{len(rows) - equal - deviating} could not be made"]
    out.print(f"[green]OK[/green] {', '.join(parts)}")


@app.command()
def check(
    path: BundlePath,
    target: Annotated[str, typer.Option("--target", help="loihi2, generic-int8, lava or netx")] = "loihi2",
) -> None:
    """List every rule of a target that a network breaks, its placement, proofs and energy: exit code 0 fits, 3 not."""
    from hardware.targets.catalogue import TARGETS

    if target not in TARGETS:
        _usage(f"there is no target {target!r}; choose among {', '.join(TARGETS)}")
    from hardware.bounds import prove
    from hardware.formats.bundle import open_bundle
    from hardware.targets import rules
    from hardware.targets.energy import count_operations, estimate_energy
    from pipeline.target_tables import connection_table, energy_table, placement_table, proof_table

    bundle = open_bundle(path)
    network, golden = bundle.network, bundle.golden
    operations = count_operations(network, golden.codes, golden.trace)
    placed = rules.placement(network, TARGETS[target])
    energies = energy_table(estimate_energy(operations), len(golden.codes))
    for table in (connection_table(placed), placement_table(placed), proof_table(prove(network)), energies):
        out.print(_table(*table))
    violations = rules.check(network, TARGETS[target])
    if violations:
        out.print(_table(f"broken rules of {target}", VIOLATION_COLUMNS, violation_rows(violations)))
        errors.print(f"[red]FAIL[/red] the network breaks {len(violations)} rule(s) of {target}", highlight=False)
        raise typer.Exit(FAIL)
    out.print(f"[green]OK[/green] the network fits {target}", highlight=False)


@app.command()
def serve(
    path: BundlePath,
    runtime: Annotated[str, typer.Option(help="emulator, onnx, lava, netx or reference")] = "emulator",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one; the log says which")] = 8000,
    name: Annotated[str, typer.Option(help="of the model, in the paths")] = "model",
    batch: Annotated[int, typer.Option(min=1, help="images the runtime gets at once, from what is queued")] = 64,
    queue: Annotated[int, typer.Option(min=1, help="images that may wait; more are refused with 503")] = 1024,
    concurrency: Annotated[int, typer.Option(min=1, help="batches that run at the same time")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="of one batch, in ONNX Runtime and the emulator")] = 1,
    body_mib: Annotated[int, typer.Option("--body-mib", min=1, max=64, help="of one request; more gets 413")] = 8,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for a body to arrive, and for its answer")] = 30.0,
    drain: Annotated[float, typer.Option(min=0, help="seconds between SIGTERM and the end of listening")] = 1.0,
    log_level: Annotated[str, typer.Option("--log-level", help="debug (each request), info or warning")] = "info",
) -> None:
    """Answer the Open Inference Protocol over HTTP, once the golden traces are verified; needs no torch."""
    if log_level not in ("debug", "info", "warning"):
        _usage(f"there is no log level {log_level!r}; choose debug, info or warning")
    from hardware.files import MIB
    from hardware.server.model import load_verified
    from hardware.server.service import Settings
    from hardware.server.serving import serve as serve_model

    settings = Settings(
        name=name,
        batch=batch,
        queue=queue,
        concurrency=concurrency,
        body_bytes=body_mib * MIB,
        timeout=timeout,
        drain_seconds=drain,
    )
    serve_model(lambda: load_verified(path, runtime, threads), settings, host, port, log_level)


@app.command()
def info(path: BundlePath) -> None:
    """Show what a bundle holds: semantics, populations, proofs, files."""
    from hardware.bounds import prove
    from hardware.formats.bundle import open_bundle

    bundle = open_bundle(path)
    network = bundle.network
    title = f"{path}: T = {network.steps}, input {network.input.shape}"
    out.print(_table(*population_table(title, network, prove(network))))
    card = network.semantics_card()
    out.print(_table("semantics", ("", ""), ((key, str(value)) for key, value in card.items())))
    _show_files(bundle)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: every error is one sentence on stderr and an exit code, never a traceback."""
    listen()
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == INTERRUPTED:  # typer answers Ctrl-C with this code and no word
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("interrupted; finished stages and attacks are kept, run the same command to go on")
        sys.exit(INTERRUPTED)
    except RuleViolations as error:
        errors.print(f"[red]error:[/red] {escape(error.subject)}", highlight=False, soft_wrap=True)
        errors.print(_table("", VIOLATION_COLUMNS, violation_rows(error.violations)))
        sys.exit(ERROR)
    except SpikeguardError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(ERROR)
    except ModuleNotFoundError as error:
        remedy = "install spikeguard with the extra that brings it ('verify', 'serve' or 'train')"
        errors.print(f"[red]error:[/red] this needs {error.name}, which is not installed; {remedy}", highlight=False)
        sys.exit(ERROR)
    except OSError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}; check the path", highlight=False, soft_wrap=True)
        sys.exit(ERROR)
    except Exception as error:
        show = getattr(error, "show", None)  # click's usage errors print themselves
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", USAGE))


def _run(config: Config, folder: Path, resume: bool, jobs: int, threads: int, missing: list[dict[str, str]]) -> None:
    from pipeline.run import Run, check_run, require_deployable, sole_user

    _use_threads(threads)
    with sole_user(folder):
        work = Run(config, folder, _command())
        require_deployable(work)
        timings = work.ensure(fresh=not resume)
        result = check_run(work, timings, missing, jobs)
    _conclude(result, folder)


def _import(
    source: Path, target: str, folder: Path, written_by: str | None, assumed: list[str], bits: int, data: Path | None
) -> None:
    from pipeline.importing.conventions import WRITERS
    from pipeline.importing.deployment import import_nir
    from pipeline.importing.tables import comparison_table, conclusion

    if written_by not in (None, *WRITERS):
        _usage(f"nothing is known of how {written_by!r} writes NIR; choose among {', '.join(WRITERS)}, or use --assume")
    result = import_nir(source, target, folder, written_by=written_by, assumed=assumed, bits=bits, data=data)
    _show_files(result.bundle)
    out.print(_table(*comparison_table(result)))
    for name, problems in result.left_out.items():
        why = "; ".join(f"{one.object}: {one.rule}" for one in problems)
        out.print(f"[yellow]{name} is left out, it cannot hold this network[/yellow] ({escape(why)})", highlight=False)
    for row in result.rows:
        if row.reason:
            out.print(f"[yellow]{row.model} did not run:[/yellow] {escape(row.reason)}", highlight=False)
    good, sentence = conclusion(result)
    out.print(f"[{'green' if good else 'red'}]{'OK' if good else 'FAIL'}[/] {escape(sentence)}", highlight=False)
    if not good:
        raise typer.Exit(FAIL)


def _write_triton(bundle: Bundle, repository: Path, name: str) -> None:
    from exporters.triton import write_triton

    model = write_triton(bundle, repository, name)
    files = sorted(path for path in model.rglob("*") if path.is_file())
    rows = ((str(path.relative_to(model)), f"{path.stat().st_size:,}") for path in files)
    out.print(_table(str(model), ("file", "bytes"), rows))
    check = escape(str(model / "selfcheck.py"))
    out.print(f"where it will run: python {check} --provider CUDAExecutionProvider", soft_wrap=True)


def _float_onnx(bundle: Bundle) -> dict[str, bytes]:
    """The ONNX files of a bundle's float SNN, if it holds one."""
    from pipeline.models.float_file import holds_spiking, load_float
    from pipeline.models.float_onnx import float_onnx_files

    return float_onnx_files(load_float(bundle.path), bundle.golden.codes) if holds_spiking(bundle.path) else {}


def _bundle_folder(source: Path) -> Path:
    nested = source / "bundle"
    return nested if nested.is_dir() else source


def _use_threads(threads: int) -> None:
    from pipeline.compute import use_cpu

    use_cpu(threads)


def _config(source: str, overrides: Iterable[str] | None) -> Config:
    from pipeline.config import ConfigError, load_config

    try:
        return load_config(source, tuple(overrides or ()))
    except ConfigError as error:
        _usage(str(error))
        raise


def _config_of(bundle: Bundle, overrides: list[str]) -> Config:
    from pipeline.config import ConfigError, override_config

    try:
        return override_config(bundle.manifest.provenance.get("config"), tuple(overrides), str(bundle.path))
    except ConfigError as error:
        _usage(str(error))
        raise


def _runtime_override(runtimes: list[str] | None) -> list[str]:
    return [f"fidelity.runtimes={json.dumps(runtimes)}"] if runtimes else []


def _folder_override(folder: Path | None) -> list[str]:
    # Overrides are YAML, which reads JSON's text as it is meant.
    return [] if folder is None else [f"data.dir={json.dumps(str(folder), ensure_ascii=False)}"]


def _require_data_folder(config: Config) -> None:
    """Refuse as wrong usage, before any work, a configuration that does not say where its files lie."""
    from pipeline.data.loading import needs_folder, require_folder

    if needs_folder(config.data.name):
        try:
            require_folder(config.data)
        except SpikeguardError as error:
            _usage(str(error))


def _conclude(result: CheckResult, folder: Path) -> None:
    report = result.report
    if report["attribution"]:
        out.print(_table(*attribution_table(report["attribution"])))
        out.print(f"[dim]{escape(ATTRIBUTION_NOTE)}[/dim]", highlight=False)
    title = f"{report['samples']} images, epsilon {report['epsilon'][0]:g}"
    out.print(_table(*arm_table(title, report["arms"], report["reference"]["word"])))
    for table in fidelity_tables(report):
        out.print(_table(*table))
    colour = {"pass": "green", "fail": "red"}.get(report["verdict"], "yellow")
    out.print(
        f"[bold {colour}]{report['verdict'].upper()}[/bold {colour}] {escape(report['summary'])}", highlight=False
    )
    if report["sequential"]:
        out.print(escape(looks_line(report["sequential"])), highlight=False)
    out.print(escape(corpus_line(report["corpus"])), highlight=False)
    for row in report["missing_runtimes"]:
        out.print(f"[yellow]not certified on {row['name']}[/yellow]")
    files = ", ".join(str(folder / name) for name in ("report.html", "report.json", "report.md"))
    out.print(escape(f"report: {files}"), soft_wrap=True)
    raise typer.Exit(result.exit_code)


def _show_files(bundle: Bundle) -> None:
    rows = ((name, f"{r.bytes:,}", r.sha256[:16]) for name, r in sorted(bundle.manifest.files.items()))
    out.print(_table(str(bundle.path), ("file", "bytes", "sha256"), rows))


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = Table(title=escape(title), title_justify="left", show_header=any(columns))
    cells = [[str(cell) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        widest = max((len(row[index]) for row in cells), default=0)
        table.add_column(column, overflow="fold", no_wrap=widest <= UNBROKEN)
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _command() -> str:
    return shlex.join(["spikeguard", *sys.argv[1:]])


def _usage(message: str) -> None:
    errors.print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(USAGE)


if __name__ == "__main__":
    main()
