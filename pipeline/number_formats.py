"""What integers a deployment has for a population: the target's few bits, or so many that nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hardware.targets.loihi2 import MAX_BIAS, MAX_WEIGHT_EXPONENT, WEIGHT_BITS
from pipeline.folding import RealPopulation, RealSynapse

EXPONENT: Mapping[Literal["conv", "dense"], int] = {"conv": 0, "dense": 1}
"""Of 8-bit mantissas. Loihi keeps only even weights of mixed-sign dense synapses, so theirs are shifted by one bit."""
CONV_SHIFTS = MAX_WEIGHT_EXPONENT
"""Powers of two that a conv's 8-bit mantissas may be shifted by. Those of dense synapses cannot be, for their weights
end at 254."""
CONSTANT_CHANNELS = 1
"""That may carry the constant part of an image; a second one would carry what rounding the first leaves."""
WIDE_BITS, WIDE_SHIFTS = 24, 7
"""Weights of the mapping without rounding: 24-bit mantissas, which shifted by 7 still fit 32 bits."""


@dataclass(frozen=True)
class NumberFormat:
    """Integers for one population.

    Attributes:
        bits: of the signed weight mantissas.
        exponents: by kind of synapse the powers of two that its weights may be multiples of.
        max_bias: largest magnitude of a bias; beyond, a constant input channel carries it. None if there is no limit.
        constant_channels: that carry the constant part of an image, if it has one.
    """

    bits: int
    exponents: Mapping[Literal["conv", "dense"], range]
    max_bias: int | None
    constant_channels: int = CONSTANT_CHANNELS

    @property
    def mantissas(self) -> tuple[int, int]:
        """The smallest and the largest."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def ceiling(self, real: RealPopulation) -> float:
        """The largest scale (weight units per real unit) that is of use.

        There every synapse's largest weight still fits, and the synapse with the finest weights has the smallest
        exponent. Without any weight, the threshold counts as one.
        """
        synapses = [(synapse, _largest(synapse)) for synapse in real.synapses]
        known = [(self.exponents[synapse.kind], largest) for synapse, largest in synapses if largest]
        if not known:
            known = [(self.exponents[real.synapses[0].kind], real.threshold or 1.0)]
        _, mantissa = self.mantissas
        coarsest = min((mantissa << allowed[-1]) / largest for allowed, largest in known)
        return min(coarsest, max((mantissa << allowed[0]) / largest for allowed, largest in known))

    def exponents_at(self, real: RealPopulation, scale: float) -> tuple[int, ...]:
        """Per synapse the smallest exponent at which its largest weight fits at ``scale``, or the largest allowed."""
        _, mantissa = self.mantissas
        found = []
        for synapse in real.synapses:
            allowed, largest = self.exponents[synapse.kind], _largest(synapse) * scale
            # A scale that was chosen for a weight to fit just so may exceed it by a rounding.
            fitting = (exponent for exponent in allowed if largest <= (mantissa << exponent) * (1 + 1e-12))
            found.append(next(fitting, allowed[-1]))
        return tuple(found)


def target_format(bits: int) -> NumberFormat:
    """Loihi's integers, with weights of ``bits`` bits: those left of eight are there to be shifted into."""
    spare = WEIGHT_BITS - bits
    conv, dense = EXPONENT["conv"], EXPONENT["dense"]
    return NumberFormat(
        bits,
        {"conv": range(conv, conv + spare + CONV_SHIFTS + 1), "dense": range(dense, dense + spare + 1)},
        MAX_BIAS,
    )


WIDE = NumberFormat(WIDE_BITS, dict.fromkeys(EXPONENT, range(WIDE_SHIFTS + 1)), None)
"""Integers so wide that rounding to them changes no spike but at a near tie."""


def _largest(synapse: RealSynapse) -> float:
    return float(np.abs(synapse.weight).max(initial=0.0))
