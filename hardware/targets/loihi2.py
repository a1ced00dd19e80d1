"""Loihi 2: the limits of its fixed-point neurons and synapses, and of its cores, as far as they are public.

Lava does not enforce these widths; a network that breaks them runs there and is wrong on the chip, or wraps
without a word in the simulation. So they are checked before anything is written.

Sources. [Lava]: the precisions that lava-nc 0.10.0 declares for its fixed-point LIF (``lava/proc/lif/models.py``),
and what it keeps of a dense weight (``lava/utils/weightutils.py``).
[Brief]: Intel, "Taking Neuromorphic Computing to the Next Level with Loihi 2", technology brief, 2021. [Hala]: Intel,
"Intel Builds World's Largest Neuromorphic System", April 2024. [Michaelis]: Michaelis et al., "Brian2Loihi: An emulator
for the neuromorphic chip Loihi", Frontiers in Neuroinformatics 16, 2022; of the first Loihi, whose neurons these are.

Not public, and therefore no rules here: axons in and out of a core, entries of its routing tables, its program
memory, and how far the encoding of synapses inflates or compresses them. (Of the first Loihi they are: 4,096 axons
in, 4,096 out, 128 KB of synapses, 1,024 neurons; Davies et al., IEEE Micro 38(1), 2018.) The 120 million synapses per
chip of [Brief] are what its memory holds at best, which the rules on memory already say. Graded spikes carry up to
32 bits [Brief], and input codes have 8, so that needs no rule either.
"""

from __future__ import annotations

from collections.abc import Iterator

from hardware.bounds import WRAP_LIMIT, current_bounds, readout_bounds, readout_cannot_saturate, synaptic_bounds
from hardware.network import STATE_LIMIT, IntegerNetwork
from hardware.targets.rules import Breach, Core, Target, check, minimum_cores

MAX_VTH_MANTISSA = 2**17 - 1
"""The threshold mantissa has 17 bits [Lava]."""
MAX_BIAS = 4095
"""A mantissa of 13 bits with exponent 6 of 3 bits [Lava], so that a bias counts in weight units."""
WEIGHT_BITS = 8
"""[Lava]"""
MIN_DENSE_WEIGHT, MAX_DENSE_WEIGHT = -256, 254
"""Mixed-sign dense weights lose their lowest bit: only even ones exist [Lava]."""
MIN_WEIGHT_MANTISSA, MAX_WEIGHT_MANTISSA = -(2 ** (WEIGHT_BITS - 1)), 2 ** (WEIGHT_BITS - 1) - 1
MAX_WEIGHT_EXPONENT = 7
"""The weight exponent is signed with 4 bits, -8..7 [Michaelis]."""
MAX_DECAY = 2**12 - 1
"""Both decays have 12 bits [Lava]."""
NEURON_BYTES = 8
"""Current and membrane of 24 bits each, a bias of 13 and its exponent of 3 [Lava]."""
NEURONS_PER_CORE = 8192
"""A million neurons on the 128 cores of a chip [Brief]; 1.15 billion on 140,544 cores [Hala]."""
MEMORY_PER_CORE = 192 * 1024
"""192 KB, divided as the network needs it [Brief]."""
CORES_PER_CHIP = 128
"""[Brief]"""
CORES_OF_LARGEST_SYSTEM = 140_544
"""On 1,152 chips [Hala]."""
CORE = Core(NEURONS_PER_CORE, MEMORY_PER_CORE, CORES_PER_CHIP)

__all__ = ["LOIHI2", "MAX_BIAS", "MAX_VTH_MANTISSA", "check"]


def membranes_reset_to_zero(network: IntegerNetwork) -> Iterator[Breach]:
    """Stock neurons forget the membrane on a spike; none subtracts the threshold."""
    for p in network.populations:
        if p.spiking and p.reset != "zero":
            remedy = "train and convert with reset to zero"
            yield Breach(p.name, f'reset "{p.reset}"', 'reset "zero"', remedy)


def thresholds_fit_17_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """The threshold mantissa is unsigned with 17 bits."""
    for p in network.populations:
        if p.spiking and p.threshold > MAX_VTH_MANTISSA:
            yield Breach(p.name, str(p.threshold), f"0..{MAX_VTH_MANTISSA}", "lower the population's scale")


def biases_fit_13_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """The bias mantissa is signed with 13 bits; its exponent 6 makes it count in weight units."""
    for p in network.populations:
        low, high = int(p.bias.min()), int(p.bias.max())
        if max(-low, high) > MAX_BIAS:
            remedy = "lower the population's scale, or carry the bias by a constant input channel"
            yield Breach(p.name, f"{low}..{high}", f"-{MAX_BIAS}..{MAX_BIAS}", remedy)


def conv_weights_have_8_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """A convolution's mantissas are signed with 8 bits."""
    for s in network.synapses:
        if s.kind == "conv":
            low, high = int(s.weight.min()) >> s.exponent, int(s.weight.max()) >> s.exponent
            if low < MIN_WEIGHT_MANTISSA or high > MAX_WEIGHT_MANTISSA:
                limit = f"{MIN_WEIGHT_MANTISSA}..{MAX_WEIGHT_MANTISSA} times 2**{s.exponent}"
                yield Breach(s.name, f"{low}..{high}", limit, f"quantise to {WEIGHT_BITS} bits or fewer")


def conv_weight_exponents_have_4_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """A convolution's mantissas are shifted by -8..7; narrow ones can take over what is beyond.

    Those of dense weights are even, and so within reach.
    """
    for s in network.synapses:
        low, high = int(s.weight.min()) >> MAX_WEIGHT_EXPONENT, int(s.weight.max()) >> MAX_WEIGHT_EXPONENT
        too_wide = low < MIN_WEIGHT_MANTISSA or high > MAX_WEIGHT_MANTISSA
        if s.kind == "conv" and s.exponent > MAX_WEIGHT_EXPONENT and too_wide:
            limit = f"{MIN_WEIGHT_MANTISSA}..{MAX_WEIGHT_MANTISSA} times 2**{MAX_WEIGHT_EXPONENT}"
            actual = f"{low}..{high} times 2**{MAX_WEIGHT_EXPONENT}"
            yield Breach(s.name, actual, limit, "lower the population's scale")


def dense_weights_are_even_and_have_8_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """Mixed-sign dense weights are even, in [-256, 254]; others are rounded and clipped without a word."""
    for s in network.synapses:
        if s.kind == "dense":
            low, high = int(s.weight.min()), int(s.weight.max())
            odd = int((s.weight & 1).sum())
            if odd or low < MIN_DENSE_WEIGHT or high > MAX_DENSE_WEIGHT:
                limit = f"even, {MIN_DENSE_WEIGHT}..{MAX_DENSE_WEIGHT}"
                remedy = f"quantise to {WEIGHT_BITS} bits with exponent 1, thresholds and biases doubled"
                yield Breach(s.name, f"{low}..{high}, {odd} odd", limit, remedy)


def decays_fit_12_bits(network: IntegerNetwork) -> Iterator[Breach]:
    """The current keeps (4095 - du) / 4096 and the membrane (4096 - dv) / 4096, du and dv in 0..4095."""
    for p in network.populations:
        if p.current_decay < 1:
            yield Breach(p.name, "current decay 0", f"1..{MAX_DECAY + 1}", "let the current decay")
        if p.voltage_decay > MAX_DECAY:
            limit = f"0..{MAX_DECAY}"
            yield Breach(p.name, f"voltage decay {p.voltage_decay}", limit, "let the membrane keep a share")


def synaptic_sums_cannot_wrap(network: IntegerNetwork) -> Iterator[Breach]:
    """A current beyond 24 bits wraps around; proven impossible for every input."""
    sums = synaptic_bounds(network)
    for name, current in current_bounds(network).items():
        low, high = current.range
        if low < -STATE_LIMIT or high > STATE_LIMIT:
            limit = f"sums below {WRAP_LIMIT} per step, current below {STATE_LIMIT + 1}"
            actual = f"sums {sums[name].range[0]}..{sums[name].range[1]}, current {low}..{high}"
            yield Breach(name, actual, limit, "lower the population's scale, or use fewer bits")


def readout_sum_fits_the_membrane(network: IntegerNetwork) -> Iterator[Breach]:
    """The answer is read off a membrane that integrates over all steps, so it must not saturate."""
    if not readout_cannot_saturate(network):
        low, high = readout_bounds(network).range
        limit = f"magnitude below {WRAP_LIMIT}"
        yield Breach(network.readout.name, f"{low}..{high}", limit, "lower the readout's scale, or run fewer steps")


def fan_in_fits_one_core(network: IntegerNetwork) -> Iterator[Breach]:
    """A neuron lives on one core, with all its weights; a convolution's channel shares one set of them."""
    room = MEMORY_PER_CORE - NEURON_BYTES
    for p in network.populations:
        needed = sum(-(-(s.weight.size // len(s.weight)) * s.bits // 8) for s in network.incoming(p.name))
        if needed > room:
            remedy = "read fewer neurons, or quantise to fewer bits"
            yield Breach(p.name, f"{needed} bytes of weights per neuron", f"at most {room}", remedy)


def cores_fit_the_largest_system(network: IntegerNetwork) -> Iterator[Breach]:
    """Chips form one mesh, but none larger than this has been built."""
    cores = sum(minimum_cores(network, p, LOIHI2) or 0 for p in network.populations)
    if cores > CORES_OF_LARGEST_SYSTEM:
        yield Breach("network", f"{cores} cores", f"{CORES_OF_LARGEST_SYSTEM} cores", "use a smaller network")


LOIHI2 = Target(
    "loihi2",
    (
        membranes_reset_to_zero,
        thresholds_fit_17_bits,
        biases_fit_13_bits,
        conv_weights_have_8_bits,
        conv_weight_exponents_have_4_bits,
        dense_weights_are_even_and_have_8_bits,
        decays_fit_12_bits,
        synaptic_sums_cannot_wrap,
        readout_sum_fits_the_membrane,
        fan_in_fits_one_core,
        cores_fit_the_largest_system,
    ),
    neuron_bytes=NEURON_BYTES,
    smallest_weight_bits=1,
    core=CORE,
)
