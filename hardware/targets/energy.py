"""Energy per inference, estimated: counted operations times what an operation is published to cost.

Nothing here was measured on a machine. Counts come from a trace; prices come from the literature and leave out
what it does not price: moving data between memory and arithmetic in CMOS, routing spikes between the cores of a chip,
leakage, and the host. An estimate compares networks and settings; it does not predict a power meter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hardware.errors import SpikeguardError
from hardware.network import DECAY_UNITY, INPUT, IntArray, IntegerNetwork
from hardware.targets.rules import connections, count_activity, fan_out
from hardware.trace import Trace

PICOJOULES = 1e-3
"""In nanojoules."""
UPDATE_ADDITIONS = 3
"""A membrane is added to its input and its bias, and compared with its threshold."""


@dataclass(frozen=True)
class Operations:
    """What one inference takes, averaged over images.

    Attributes:
        synaptic: spikes times the connections each travels; every one adds a weight.
        input: input codes that are not zero times the connections of each, at every step; every one multiplies a
            weight and adds it. (A machine that keeps the sums of a still image does them once.)
        updates: neurons times steps.
        decays: multiplications of a current or a membrane by its share, neurons times steps.
        dense: connections, each once: multiplications and additions of a network of the same shape whose neurons
            answer with numbers, once per image, instead of with spikes.
    """

    synaptic: float
    input: float
    updates: float
    decays: float
    dense: float


@dataclass(frozen=True)
class Prices:
    """What operations are published to cost, in picojoules.

    Attributes:
        name: of the machine.
        accumulate: adding one weight.
        multiply_accumulate: multiplying one weight with an input code and adding it.
        update: of one neuron in one step; the least and the most.
        decay: multiplying one state by its share, beyond the update.
        source: where the figures stand, and what kind of figures they are.
    """

    name: str
    accumulate: float
    multiply_accumulate: float
    update: tuple[float, float]
    decay: float
    source: str


@dataclass(frozen=True)
class EnergyEstimate:
    """An estimate for one image.

    Attributes:
        name: what is estimated.
        nanojoules: the least and the most the prices allow.
        source: of the prices.
    """

    name: str
    nanojoules: tuple[float, float]
    source: str


# Table 2 of the paper. A synaptic operation is priced as "min". Which neurons count as active (81 pJ) and which as
# inactive (52 pJ) is not defined there, so both are carried. The first Loihi knows binary spikes only; an input code
# is priced as one of them. A neuron's update includes its decays.
LOIHI = Prices(
    name="Loihi, 14 nm",
    accumulate=23.6,
    multiply_accumulate=23.6,
    update=(52.0, 81.0),
    decay=0.0,
    source="Davies et al., IEEE Micro 38(1), 2018, table 2: simulated before silicon, for the first Loihi at 0.75 V; "
    "none are published for Loihi 2",
)
HOROWITZ = "Horowitz, ISSCC 2014, figure 1.1.9: arithmetic alone, at 0.9 V"
INT8_MULTIPLY, INT32_MULTIPLY, INT32_ADD = 0.2, 3.1, 0.1
FLOAT32_MULTIPLY, FLOAT32_ADD = 3.7, 0.9
CMOS_INT8 = Prices(
    name="45 nm CMOS, int8",
    accumulate=INT32_ADD,
    multiply_accumulate=INT8_MULTIPLY + INT32_ADD,
    update=(UPDATE_ADDITIONS * INT32_ADD, UPDATE_ADDITIONS * INT32_ADD),
    decay=INT32_MULTIPLY,
    source=HOROWITZ,
)
CMOS_FLOAT32 = Prices(
    name="45 nm CMOS, float32",
    accumulate=FLOAT32_ADD,
    multiply_accumulate=FLOAT32_MULTIPLY + FLOAT32_ADD,
    update=(UPDATE_ADDITIONS * FLOAT32_ADD, UPDATE_ADDITIONS * FLOAT32_ADD),
    decay=FLOAT32_MULTIPLY,
    source=HOROWITZ,
)
SPIKING_PRICES = (LOIHI, CMOS_INT8, CMOS_FLOAT32)
DENSE_PRICES = (CMOS_INT8, CMOS_FLOAT32)


def count_operations(network: IntegerNetwork, codes: IntArray, trace: Trace) -> Operations:
    """Operations per image, averaged over the samples of a trace.

    Args:
        network: that left the trace.
        codes: the images of the trace, ``(samples, [steps,] *shape)``.
        trace: with the spikes of every spiking population.

    Raises:
        RuleViolations: if the codes are not this network's input.
        SpikeguardError: if the trace is of other samples, has none, or does not hold all spikes.
    """
    if len(codes) != trace.samples:
        raise SpikeguardError(f"{len(codes)} images and {trace.samples} samples in their trace; give the same images")
    presented = network.input.present(codes, network.steps)
    repeats = network.steps if codes.ndim == len(network.input.shape) + 1 else 1
    events = np.count_nonzero(presented.reshape(-1, *network.input.presented_shape), axis=0).reshape(-1)
    inputs = sum(int(events @ fan_out(network, s)) for s in network.synapses if s.source == INPUT)
    decays = sum(
        p.size * ((0 < p.current_decay < DECAY_UNITY) + (0 < p.voltage_decay < DECAY_UNITY))
        for p in network.populations
    )
    return Operations(
        synaptic=count_activity(network, trace).synaptic_operations_per_image,
        input=inputs * repeats / trace.samples,
        updates=float(network.steps * sum(p.size for p in network.populations)),
        decays=float(network.steps * decays),
        dense=float(sum(connections(network, s) for s in network.synapses)),
    )


def estimate_energy(operations: Operations) -> list[EnergyEstimate]:
    """Estimates for one image: of the spiking network, then of its shape without spikes."""
    return [
        *(EnergyEstimate(prices.name, spiking_energy(operations, prices), prices.source) for prices in SPIKING_PRICES),
        *(
            EnergyEstimate(f"without spikes, {prices.name}", dense_energy(operations, prices), prices.source)
            for prices in DENSE_PRICES
        ),
    ]


def spiking_energy(operations: Operations, prices: Prices) -> tuple[float, float]:
    """Nanojoules of one inference with spikes; the least and the most."""
    arithmetic = (
        operations.synaptic * prices.accumulate
        + operations.input * prices.multiply_accumulate
        + operations.decays * prices.decay
    )
    least, most = ((arithmetic + operations.updates * update) * PICOJOULES for update in prices.update)
    return least, most


def dense_energy(operations: Operations, prices: Prices) -> tuple[float, float]:
    """Nanojoules of one inference of the same shape without spikes; the least and the most, which are equal."""
    energy = operations.dense * prices.multiply_accumulate * PICOJOULES
    return energy, energy
