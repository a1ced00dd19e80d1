"""Kernels compiled ahead of time, for machines that start with an empty or a read-only file system: containers.

``NUMBA_CACHE_DIR=FOLDER python -m hardware.kernel_cache`` compiles every kernel of the emulator into a folder. A
process that finds that folder named in ``SPIKEGUARD_KERNELS`` copies it to its own ``NUMBA_CACHE_DIR`` first, since
numba refuses a folder that it cannot write to. Machine code is only used on the kind of processor that it was made for
(``NUMBA_CPU_NAME`` names one that is common to many); elsewhere, or without a folder to write to, kernels are compiled
when they are first used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

import numba
import numpy as np

from hardware.network import DECAY_UNITY, INPUT, InputSpec, IntegerNetwork, Population, Synapse

SHIPPED = "SPIKEGUARD_KERNELS"
FEATURES = 4
NARROW_WEIGHT, WIDE_WEIGHT = 1, 2**15
"""The second does not fit the 16 bits of a narrow kernel."""


def take_shipped() -> None:
    """Copy the kernels that were shipped to where numba looks for them, unless something lies there already."""
    shipped, own = os.environ.get(SHIPPED), numba.config.CACHE_DIR
    if shipped and own and not Path(own).exists():
        with suppress(OSError):  # nothing can be written: kernels are compiled anew
            shutil.copytree(shipped, own, copy_function=shutil.copyfile)


def sample_networks() -> Iterator[IntegerNetwork]:
    """Networks that between them need every kernel in every width."""
    from hardware.synapse_kernels import TILE_SIZES

    for outputs, weight, leaky, max_code in product(TILE_SIZES, (NARROW_WEIGHT, WIDE_WEIGHT), (False, True), (1, 255)):
        yield _network(outputs, weight, leaky, max_code)


def compile_all() -> None:
    """Run the sample networks, which compiles what they need and stores it in numba's folder."""
    from hardware.emulator import run_emulator

    records: tuple[Literal["readouts", "traces"], ...] = ("readouts", "traces")
    for network, record in product(sample_networks(), records):
        codes = np.ones((2, FEATURES), np.uint8)
        run_emulator(network, codes, record)
        run_emulator(network, np.repeat(codes[:, None], network.steps, axis=1), record)


def _network(outputs: int, weight: int, leaky: bool, max_code: int) -> IntegerNetwork:
    sizes = {INPUT: FEATURES, "first": outputs, "second": outputs, "out": outputs}
    names = list(sizes)
    decay = DECAY_UNITY // 2 if leaky else DECAY_UNITY
    populations = tuple(
        Population(
            name=name,
            shape=(outputs,),
            threshold=0,
            bias=np.zeros(outputs, np.int64),
            scale=1.0,
            spiking=name != "out",
            current_decay=decay,
        )
        for name in names[1:]
    )
    synapses = tuple(
        Synapse(source, target, "dense", np.full((sizes[target], sizes[source]), weight, np.int32), bits=17)
        for source, target in pairwise(names)
    )
    return IntegerNetwork(InputSpec((FEATURES,), max_code), populations, synapses, steps=2)


if __name__ == "__main__":
    compile_all()
