"""Compiled surrogate gradients: one pass over z, without torch's pass per operation.

Scalars must have the type of the arrays, lest a single precision pass turn into one of double precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.kernels import compiled

Array = NDArray[Any]

TRIANGLE, RECTANGLE, EXPONENTIAL, ARCTAN, STRAIGHT_THROUGH = range(5)
RULE_IDS: Mapping[str, int] = {
    "triangle": TRIANGLE,
    "rectangle": RECTANGLE,
    "exponential": EXPONENTIAL,
    "arctan": ARCTAN,
    "straight_through": STRAIGHT_THROUGH,
}
"""The rules of :data:`hardware.surrogates.RULES` that are compiled."""

NOT_SEEN = -1
"""A mean that starts at the first distance; no distance is negative."""
RATE = 0.1
"""Share of the newest iteration in the running means of ASSG."""


@compiled
def differentiate(z: Array, rule: int, width: float, height: float, slopes: Array) -> None:
    """Fill ``slopes`` with ``height`` times ds/dz as :data:`hardware.surrogates.RULES` define it.

    Args:
        z: ``(neurons,)`` distance to the threshold in real units.
        rule: one of ``RULE_IDS``.
        width: real units.
        height: factor on the slope.
        slopes: of the shape and type of z, filled.
    """
    zero, one = z.dtype.type(0), z.dtype.type(1)
    if rule == TRIANGLE:
        scale = height / (width * width)
        for i in range(len(z)):
            slopes[i] = max(width - abs(z[i]), zero) * scale
    elif rule == RECTANGLE:
        half, level = width / z.dtype.type(2), height / width
        for i in range(len(z)):
            slopes[i] = level if abs(z[i]) < half else zero
    elif rule == EXPONENTIAL and z.itemsize == 4:
        rate = -one / width
        for i in range(len(z)):
            slopes[i] = height * exponential(abs(z[i]) * rate)
    elif rule == EXPONENTIAL:
        for i in range(len(z)):
            slopes[i] = height * math.exp(-abs(z[i]) / width)
    elif rule == ARCTAN:
        steepness, level = width * z.dtype.type(math.pi / 2), height * width / z.dtype.type(2)
        for i in range(len(z)):
            scaled = z[i] * steepness
            # numpy's division: Python's checks for zero, element by element.
            slopes[i] = np.divide(level, one + scaled * scaled)
    else:
        slopes[:] = height


@compiled
def adapt(z: Array, half_width: float, mean: Array, deviation: Array, slopes: Array) -> None:
    """One iteration of ASSG (arXiv 2512.22522): move M and D in place and fill ``slopes``.

    With ``k = tan(pi share) / pi``, half of the published w, and ``h = k / (M + 1.5 D + 1e-4)``, the slope
    ``h / (1 + (pi h z)**2)`` is written with a single division.

    Args:
        z: ``(neurons,)`` distance to the threshold in real units.
        half_width: k.
        mean: M, ``NOT_SEEN`` where it starts at ``|z|``.
        deviation: D.
        slopes: filled; may not be one of the others.
    """
    real = z.dtype.type
    rate, spread, floor, bend = real(RATE), real(1.5), real(1e-4), half_width * real(math.pi)
    for i in range(len(z)):
        distance = abs(z[i])
        m = mean[i] if mean[i] >= real(0) else distance
        m += rate * (distance - m)
        d = deviation[i] + rate * (abs(distance - m) - deviation[i])
        width = m + spread * d + floor
        bent = bend * z[i]
        mean[i], deviation[i] = m, d
        slopes[i] = np.divide(half_width * width, width * width + bent * bent)


_LOG2_E = np.float32(1 / math.log(2))
# ln 2 in two parts, the first of few bits, so that its multiples are exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
# Adding and subtracting it rounds to an integer.
_ROUNDER = np.float32(1.5 * 2**23)
_EXPONENT_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)
_SMALLEST = np.float32(-87)
_TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(8))


@compiled
def exponential(x: Any) -> Any:
    """exp(x) of a float32 from -87 (below it, exp(-87)) to 0, of operations that compile to vector instructions."""
    clipped = max(x, _SMALLEST)
    power = (clipped * _LOG2_E + _ROUNDER) - _ROUNDER
    r = clipped - power * _LN2_HIGH - power * _LN2_LOW
    c0, c1, c2, c3, c4, c5, c6, c7 = _TAYLOR
    series = c0 + r * (c1 + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))))
    bits = np.int32((np.int32(power) + _EXPONENT_BIAS) << _MANTISSA_BITS)
    return series * bits.view(np.float32)
