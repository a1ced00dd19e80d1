"""Compiled integrate-and-fire neurons: all steps of a block of neurons while the block lies in the first cache.

Arrays are ``(steps, neurons)``, the neurons of all samples in a row, of which those from ``start`` to ``stop`` are
worked on; an input or a gradient that is the same at every step has one step only. Nothing is kept from the forward
pass: the backward kernels integrate the currents again, which costs less than writing membranes and reading them back.

With g the surrogate at ``z = u - threshold`` (Özdenizci & Legenstein, TMLR 2024), and ``subtract`` for the option::

    u_t = beta v_{t-1} + x_t     s_t = [u_t >= threshold]     v_t = u_t (1 - s_t)    subtract: u_t - threshold s_t
    ds/du = g                    dv/du = (1 - s) - u g        subtract: 1 - threshold g
    ds/dthreshold = -g           dv/dthreshold = u g          subtract: threshold g - s
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware.kernels import compiled

Array = NDArray[Any]

# Membranes, slopes and gradients of 8 steps then take 24 KiB.
BLOCK = 256

TRIANGLE, RECTANGLE, EXPONENTIAL, ARCTAN, STRAIGHT_THROUGH = range(5)
RULE_IDS: Mapping[str, int] = {
    "triangle": TRIANGLE,
    "rectangle": RECTANGLE,
    "exponential": EXPONENTIAL,
    "arctan": ARCTAN,
    "straight_through": STRAIGHT_THROUGH,
}
"""The rules of :data:`hardware.surrogates.RULES` that are compiled."""


@compiled
def fire(start: int, stop: int, current: Array, threshold: float, beta: float, subtract: bool, spikes: Array) -> None:
    """Fill 0/1 ``spikes``."""
    steps = len(spikes)
    zero, one = spikes.dtype.type(0), spikes.dtype.type(1)
    membrane = np.empty(BLOCK, spikes.dtype)
    for first in range(start, stop, BLOCK):
        block = slice(first, min(first + BLOCK, stop))
        v = membrane[: block.stop - first]
        v[:] = zero
        for step in range(steps):
            x, s = current[min(step, len(current) - 1), block], spikes[step, block]
            if subtract:
                for i in range(len(v)):
                    u = beta * v[i] + x[i]
                    s[i] = one if u >= threshold else zero
                    v[i] = u - (threshold if u >= threshold else zero)
            else:
                for i in range(len(v)):
                    u = beta * v[i] + x[i]
                    s[i] = one if u >= threshold else zero
                    v[i] = zero if u >= threshold else u


@compiled
def integrate(
    start: int, stop: int, current: Array, threshold: float, beta: float, subtract: bool, membranes: Array
) -> None:
    """Fill ``membranes``, before the reset."""
    for first in range(start, stop, BLOCK):
        _integrate(current, first, threshold, beta, subtract, membranes, first, min(BLOCK, stop - first))


@compiled
def backpropagate(
    start: int,
    stop: int,
    current: Array,
    threshold: float,
    beta: float,
    subtract: bool,
    grad_spikes: Array,
    grad_current: Array,
    steps: int,
    rule: int,
    width: float,
    height: float,
) -> float:
    """Fill ``grad_current`` through the surrogate that ``rule``, one of ``RULE_IDS``, names.

    Returns:
        The gradient at the threshold.
    """
    u = np.empty((steps, BLOCK), current.dtype)
    slopes = np.empty((steps, BLOCK), current.dtype)
    total = 0.0
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        _integrate(current, first, threshold, beta, subtract, u, 0, size)
        for step in range(steps):
            _differentiate(u[step, :size], threshold, rule, width, height, slopes[step, :size])
        total += _descend(u, slopes, 0, threshold, beta, subtract, grad_spikes, grad_current, first, size)
    return total


@compiled
def backpropagate_slopes(
    start: int,
    stop: int,
    current: Array,
    threshold: float,
    beta: float,
    subtract: bool,
    grad_spikes: Array,
    grad_current: Array,
    slopes: Array,
) -> float:
    """Fill ``grad_current`` through given ``slopes``, ds/du ``(steps, neurons)``; returns as `backpropagate`."""
    steps = len(slopes)
    u = np.empty((steps, BLOCK), current.dtype)
    total = 0.0
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        _integrate(current, first, threshold, beta, subtract, u, 0, size)
        total += _descend(u, slopes, first, threshold, beta, subtract, grad_spikes, grad_current, first, size)
    return total


@compiled
def backpropagate_rate(
    start: int,
    stop: int,
    current: Array,
    threshold: float,
    beta: float,
    subtract: bool,
    grad_spikes: Array,
    grad_current: Array,
    steps: int,
) -> None:
    """Fill ``grad_current`` without recursion through time: neurons that never spike pass nothing."""
    one = current.dtype.type(1)
    u = np.empty((steps, BLOCK), current.dtype)
    share = np.empty(BLOCK, current.dtype)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        _integrate(current, first, threshold, beta, subtract, u, 0, size)
        active = share[:size]
        active[:] = 0
        for step in range(steps):
            before = u[step, :size]
            for i in range(size):
                active[i] = one if before[i] >= threshold else active[i]
        grad_current[:, first : first + size] = 0
        for step in range(steps):
            incoming = grad_spikes[min(step, len(grad_spikes) - 1), first : first + size]
            outgoing = grad_current[min(step, len(grad_current) - 1), first : first + size]
            for i in range(size):
                outgoing[i] += active[i] * incoming[i]


@compiled
def _integrate(
    current: Array,
    first: int,
    threshold: float,
    beta: float,
    subtract: bool,
    membranes: Array,
    start: int,
    size: int,
) -> None:
    """Membranes before the reset from column ``start`` on, of the neurons from ``first`` on."""
    zero = membranes.dtype.type(0)
    before = membranes[0, start : start + size]
    before[:] = current[0, first : first + size]
    for step in range(1, len(membranes)):
        x = current[min(step, len(current) - 1), first : first + size]
        u = membranes[step, start : start + size]
        if subtract:
            for i in range(size):
                u[i] = beta * (before[i] - (threshold if before[i] >= threshold else zero)) + x[i]
        else:
            for i in range(size):
                u[i] = beta * (zero if before[i] >= threshold else before[i]) + x[i]
        before = u


@compiled
def _descend(
    membranes: Array,
    slopes: Array,
    start: int,
    threshold: float,
    beta: float,
    subtract: bool,
    grad_spikes: Array,
    grad_current: Array,
    first: int,
    size: int,
) -> float:
    """From the last step to the first: gradient at the currents, summed where they are the same at every step, and
    the gradient at the threshold.
    """
    zero, one = membranes.dtype.type(0), membranes.dtype.type(1)
    carried = np.zeros(size, membranes.dtype)
    by_threshold = np.zeros(size, membranes.dtype)
    grad_current[0, first : first + size] = zero
    for step in range(len(membranes) - 1, -1, -1):
        u = membranes[step, :size]
        slope = slopes[step, start : start + size]
        incoming = grad_spikes[min(step, len(grad_spikes) - 1), first : first + size]
        outgoing = grad_current[min(step, len(grad_current) - 1), first : first + size]
        if subtract:
            for i in range(size):
                above = threshold * slope[i]
                later = beta * carried[i]
                by_threshold[i] += later * (above - (one if u[i] >= threshold else zero)) - incoming[i] * slope[i]
                carried[i] = incoming[i] * slope[i] + later * (one - above)
        else:
            for i in range(size):
                above = u[i] * slope[i]
                later = beta * carried[i]
                by_threshold[i] += later * above - incoming[i] * slope[i]
                carried[i] = incoming[i] * slope[i] + later * ((zero if u[i] >= threshold else one) - above)
        if len(grad_current) == 1:
            for i in range(size):
                outgoing[i] += carried[i]
        else:
            outgoing[:] = carried
    total = 0.0
    for i in range(size):
        total += by_threshold[i]
    return total


@compiled
def _differentiate(u: Array, threshold: float, rule: int, width: float, height: float, slopes: Array) -> None:
    """Fill ``slopes`` as :data:`hardware.surrogates.RULES` define them, scalars in the type of ``u``."""
    zero, one = u.dtype.type(0), u.dtype.type(1)
    if rule == TRIANGLE:
        scale = height / (width * width)
        for i in range(len(u)):
            slopes[i] = max(width - abs(u[i] - threshold), zero) * scale
    elif rule == RECTANGLE:
        half, level = width / u.dtype.type(2), height / width
        for i in range(len(u)):
            slopes[i] = level if abs(u[i] - threshold) < half else zero
    elif rule == EXPONENTIAL and u.itemsize == 4:
        rate = -one / width
        for i in range(len(u)):
            slopes[i] = height * exponential(abs(u[i] - threshold) * rate)
    elif rule == EXPONENTIAL:
        for i in range(len(u)):
            slopes[i] = height * math.exp(-abs(u[i] - threshold) / width)
    elif rule == ARCTAN:
        steepness, level = width * u.dtype.type(math.pi / 2), height * width / u.dtype.type(2)
        for i in range(len(u)):
            scaled = (u[i] - threshold) * steepness
            # numpy's division: Python's checks for zero, element by element.
            slopes[i] = np.divide(level, one + scaled * scaled)
    else:
        slopes[:] = height


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
