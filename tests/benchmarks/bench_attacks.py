"""Robust accuracy of the digits SNN at epsilon 0.1 under each attack: the whole test split, three seeds.

Every row is one attack on the float SNN, on all images it classifies correctly; intervals are Wilson's at 95 %.
Run as ``python -m tests.benchmarks.bench_attacks``; networks are kept in ``runs/bench``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hardware.surrogates import TRIANGLE
from pipeline.attacks.backward import Adaptive
from pipeline.attacks.ensemble import MIXED, PRESETS, WARM, AnyMember, Member, run_ensemble
from pipeline.attacks.targets import FloatTarget, budget_of
from pipeline.compute import use_cpu
from pipeline.config import load_config
from pipeline.models.float_file import load_float
from pipeline.run import Run
from pipeline.statistics import wilson_interval

SEEDS = (0, 1, 2)
EPSILON = 0.1
ROWS: Sequence[tuple[str, tuple[AnyMember, ...]]] = (
    ("PGD 10, one surrogate", (Member(TRIANGLE),)),
    ("APGD 100, one surrogate", (Member(TRIANGLE, "APGD", 100),)),
    ("SA-PGD 40, ASSG", (Member(Adaptive(), "SA-PGD", 40),)),
    ("SA-PGD 100, ASSG", (Member(Adaptive(), "SA-PGD", 100),)),
    ("APGD 100, ASSG warm", (Member(WARM, "APGD", 100),)),
    ("mixed: APGD 100, rules in turn", (Member(MIXED, "APGD", 100),)),
    ("quick", PRESETS["quick"]),
    ("paper", PRESETS["paper"]),
    ("strong", PRESETS["strong"]),
)


def main() -> None:
    """Train where needed, attack, and print a table per seed."""
    use_cpu(1)
    console = Console(width=110)
    for seed in SEEDS:
        overrides = (f"seed={seed}", "fidelity.baseline=false")
        run = Run(load_config("digits", overrides), Path("runs/bench") / str(seed), "")
        run.ensure("finetune")
        target = FloatTarget(load_float(run.result("finetune")))
        test = run.data.test
        table = Table(title=f"seed {seed}: {len(test)} test images, epsilon {EPSILON:g}", title_justify="left")
        for column in ("attack", "robust accuracy", "95 % interval", "gradients or queries per image", "seconds"):
            table.add_column(column)
        for label, members in ROWS:
            start = time.perf_counter()
            result = run_ensemble(
                target,
                members,
                test.codes,
                test.labels,
                np.arange(len(test)),
                budget=budget_of(EPSILON),
                seed=seed,
            )
            seconds = time.perf_counter() - start
            survivors = int((~result.crafted.fooled).sum())
            low, high = wilson_interval(survivors, len(test))
            effort = result.crafted.gradients / len(test)
            cells = (f"{survivors / len(test):.1%}", f"{low:.1%} .. {high:.1%}", f"{effort:.0f}", f"{seconds:.1f}")
            table.add_row(label, *cells)
            console.print(f"[dim]seed {seed}, {label}: {cells[0]}, {seconds:.0f} s[/dim]")
        console.print(table)


if __name__ == "__main__":
    main()
