"""Commands that judge: a bundle, its files, or the check itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hardware.errors import SpikeguardError
from pipeline.bundle_tables import arm_table, attribution_table, conformance_table, mismatch_table
from pipeline.commands import terminal
from pipeline.commands.settings import (
    BundlePath,
    DataFolder,
    Jobs,
    Overrides,
    Threads,
    config_of,
    folder_override,
    require_data_folder,
    runtime_override,
    use_threads,
)
from pipeline.fidelity.tables import fidelity_tables
from pipeline.fidelity.wording import ATTRIBUTION_NOTE, corpus_line, looks_line
from pipeline.target_tables import VIOLATION_COLUMNS, violation_rows

if TYPE_CHECKING:
    from pipeline.fidelity.check import CheckResult

CONFORMANCE_WIDTH = 140


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
        terminal.usage(f"{grow} exists already, and a bundle is never edited; name a new folder")
    from exporters.bundle import grow_bundle
    from hardware.formats.bundle import open_bundle
    from pipeline.fidelity.check import Circumstances, run_check
    from pipeline.fidelity.crafting import Images
    from pipeline.run import Run, collected_corpus, require_runtimes, require_same_test_split, write_report
    from pipeline.stages import quantization_images

    bundle, earlier = open_bundle(path), None if against is None else open_bundle(against)
    config = config_of(bundle, [*(overrides or []), *runtime_override(runtimes), *folder_override(data_dir)])
    require_data_folder(config)
    require_runtimes(config)
    use_threads(threads)
    splits = Run(config, folder, "").data
    bundles = [bundle] if earlier is None else [bundle, earlier]
    for one in bundles:
        require_same_test_split(one, splits.test)
    images = Images(splits.test.codes, splits.test.labels, config.seed)
    calibration = quantization_images(splits.train, config.seed)
    circumstances = Circumstances(
        data=splits.name, reproduce=terminal.command_line(), calibration=calibration, jobs=jobs
    )
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
        terminal.out.print(escape(f"bundle with {len(result.counterexamples)} counterexamples: {grow}"), soft_wrap=True)
    conclude(result, folder)


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

    use_threads(threads)
    with sole_user(folder):
        result = score(folder, seeds, images, fresh=not resume)
    for table in (score_table(result), build_table(result)):
        terminal.out.print(terminal.table(*table))
    terminal.out.print(escape(false_alarm_line(result)), highlight=False)
    colour, word = ("green", "PASS") if result["passed"] else ("red", "FAIL")
    terminal.out.print(f"[bold {colour}]{word}[/] {escape(conclusion(result))}", highlight=False)
    terminal.out.print(escape(f"score: {folder / 'selftest.json'}"), soft_wrap=True)
    if not result["passed"]:
        raise typer.Exit(terminal.FAIL)


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
    terminal.out.print(terminal.table(*mismatch_table(rows)))
    for row in rows:
        if row.note:
            terminal.out.print(f"[dim]{row.file} against the network as trained: {row.note}[/dim]", highlight=False)
    if not all(row.equal for row in rows):
        terminal.errors.print("[red]FAIL[/red] a file does not mean what the bundle says; export it again")
        raise typer.Exit(terminal.FAIL)
    terminal.out.print("[green]OK[/green] every file leaves the golden traces")


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
        terminal.usage(f"--samples {samples} is more than the {len(bundle.golden.codes)} golden inputs of the bundle")
    rows = []
    with track("conformance", len(READERS)) as advance:
        for row in conformance_rows(bundle, samples, processes):
            rows.append(row)
            advance(f"{row.reader}: {row.outcome}")
    # On a narrower terminal lines wrap, but no cell is lost.
    wide = Console(file=terminal.out.file, width=max(terminal.out.width, CONFORMANCE_WIDTH))
    wide.print(terminal.table(*conformance_table(rows)))
    outcomes = {row.outcome for row in rows}
    if Outcome.DIFFERS in outcomes:
        terminal.errors.print("[red]FAIL[/red] a reader computes something else than the reference")
        raise typer.Exit(terminal.FAIL)
    if Outcome.FAILED in outcomes:
        raise SpikeguardError("a reader failed, so nothing is shown of it; its row says why")
    if not outcomes & {Outcome.EQUAL, Outcome.DEVIATES}:
        raise SpikeguardError("nothing could be compared; the rows say why")
    equal = sum(row.outcome is Outcome.EQUAL for row in rows)
    deviating = sum(row.outcome is Outcome.DEVIATES for row in rows)
    parts = [f"{equal} readings equal the reference"]
    parts += [f"{deviating} compute in floating point and deviate"] if deviating else []
    parts += [f"{len(rows) - equal - deviating} could not be made"]
    terminal.out.print(f"[green]OK[/green] {', '.join(parts)}")


def check(
    path: BundlePath,
    target: Annotated[str, typer.Option("--target", help="loihi2, generic-int8, lava or netx")] = "loihi2",
) -> None:
    """List every rule of a target that a network breaks, its placement, proofs and energy: exit code 0 fits, 3 not."""
    from hardware.targets.catalogue import TARGETS

    if target not in TARGETS:
        terminal.usage(f"there is no target {target!r}; choose among {', '.join(TARGETS)}")
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
        terminal.out.print(terminal.table(*table))
    violations = rules.check(network, TARGETS[target])
    if violations:
        terminal.out.print(terminal.table(f"broken rules of {target}", VIOLATION_COLUMNS, violation_rows(violations)))
        terminal.errors.print(
            f"[red]FAIL[/red] the network breaks {len(violations)} rule(s) of {target}", highlight=False
        )
        raise typer.Exit(terminal.FAIL)
    terminal.out.print(f"[green]OK[/green] the network fits {target}", highlight=False)


def conclude(result: CheckResult, folder: Path) -> None:
    """Show what a check found, and end with its exit code."""
    report = result.report
    if report["attribution"]:
        terminal.out.print(terminal.table(*attribution_table(report["attribution"])))
        terminal.out.print(f"[dim]{escape(ATTRIBUTION_NOTE)}[/dim]", highlight=False)
    title = f"{report['samples']} images, epsilon {report['epsilon'][0]:g}"
    terminal.out.print(terminal.table(*arm_table(title, report["arms"], report["reference"]["word"])))
    for table in fidelity_tables(report):
        terminal.out.print(terminal.table(*table))
    colour = {"pass": "green", "fail": "red"}.get(report["verdict"], "yellow")
    terminal.out.print(
        f"[bold {colour}]{report['verdict'].upper()}[/bold {colour}] {escape(report['summary'])}", highlight=False
    )
    if report["sequential"]:
        terminal.out.print(escape(looks_line(report["sequential"])), highlight=False)
    terminal.out.print(escape(corpus_line(report["corpus"])), highlight=False)
    for row in report["missing_runtimes"]:
        terminal.out.print(f"[yellow]not certified on {row['name']}[/yellow]")
    files = ", ".join(str(folder / name) for name in ("report.html", "report.json", "report.md"))
    terminal.out.print(escape(f"report: {files}"), soft_wrap=True)
    raise typer.Exit(result.exit_code)
