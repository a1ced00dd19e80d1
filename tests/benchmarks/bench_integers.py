"""Do integer networks withstand what the float SNN withstands? Worst case over the clean images and those of SA-PGD of
100 steps and the nineteen gradients of the method, crafted on both models.

Run it as ``python -m tests.benchmarks.bench_integers digits`` or ``… fashion-mnist --data-dir DIR``. The argument is a
preset: its SNN is trained where it is not there yet, in ``runs/method`` as by ``bench_method``. It is rounded to 8
bits, and to 4, 3 and 2 bits fine-tuned on the grid. Finished points are kept, and found again by a second call.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.attacks.targets import Codes
from pipeline.compute import use_cpu
from pipeline.config import Config, load_config
from pipeline.fidelity.crafting import Images
from pipeline.models.float_file import load_float
from pipeline.run import Run, sole_user
from pipeline.stages import quantization_images
from pipeline.sweep.grid import Grid
from pipeline.sweep.report import accuracy_table, notes_of
from pipeline.sweep.sweeping import Learning, Subject, run_sweep

FINETUNED_BITS = (4, 3, 2)
EPOCHS = {"digits": 20, "fashion-mnist": 1, "mnist": 1}
"""Of the fine-tuning on the grid."""


def subject_of(run: Run, config: Config, images: int | None) -> Subject:
    """The fine-tuned SNN of a run, and test images for it."""
    test, calibration = run.data.test, quantization_images(run.data.train, config.seed)
    codes: Codes = test.codes[:images]
    shown = Images(codes, test.labels[:images], config.seed)
    return Subject(load_float(run.result("finetune")), calibration, shown, config.fidelity, run.data.name)


def main() -> None:
    """Train what is missing, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="digits", choices=EPOCHS)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--images", type=int, default=None, help="first test images; default: all of the preset's")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, *FINETUNED_BITS])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    use_cpu(options.threads)
    preset, folder_of_data = options.preset, (f"data.dir={options.data_dir}",) if options.data_dir else ()
    trained = load_config(preset, ("seed=0", "fidelity.baseline=false", *folder_of_data))
    learning = (f"quantization.epochs={EPOCHS[preset]}", "fidelity.attacks=adaptive")
    config = load_config(preset, ("seed=0", *learning, *folder_of_data))
    run = Run(trained, Path("runs/method") / f"{preset}-0", "")
    run.ensure("finetune")
    plain = subject_of(run, config, options.images)
    taught = replace(plain, learning=Learning(config, run.data.train, run.data.validation))
    parts = (
        (plain, [bits for bits in options.bits if bits not in FINETUNED_BITS]),
        (taught, [bits for bits in options.bits if bits in FINETUNED_BITS]),
    )
    # One folder: both share what is crafted on the float SNN.
    folder = run.folder / "integers"
    console = Console(width=120)
    for subject, bits in parts:
        if not bits:
            continue
        with sole_user(folder):
            result = run_sweep(subject, Grid(tuple(bits), (subject.network.steps,)), folder)
        title, columns, rows = accuracy_table(result)
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table, *notes_of(result)[:-1], sep="\n")


if __name__ == "__main__":
    main()
