"""How large the sums of a network can become: what an exporter must know before integers travel as floats."""

from __future__ import annotations

import numpy as np

from hardware.bounds import FLOAT32_INTEGERS, current_bounds, synaptic_magnitudes
from hardware.errors import Violation
from hardware.network import STATE_LIMIT, IntegerNetwork


def largest_sums(network: IntegerNetwork) -> dict[str, int]:
    """By population, the largest ``sum |w| x + |b|`` of its neurons in weight units per step.

    Every partial sum of a step is within it, whatever the order of addition.
    """
    magnitudes = synaptic_magnitudes(network)
    return {p.name: int((magnitudes[p.name] + np.abs(p.bias)).max()) for p in network.populations}


def float32_violations(network: IntegerNetwork, populations: set[str] | None = None) -> list[Violation]:
    """Populations whose sum over all steps may reach 2**24, where float32 stops holding every integer.

    Args:
        network: what is to be exported.
        populations: names to look at; all if not given.
    """
    return [
        Violation(
            name,
            "sums over all steps are exact in float32",
            f"up to {largest * network.steps:,}",
            f"below {FLOAT32_INTEGERS:,}",
            "quantise with a smaller scale, or run fewer steps",
        )
        for name, largest in largest_sums(network).items()
        if largest * network.steps >= FLOAT32_INTEGERS and (populations is None or name in populations)
    ]


def current_violations(network: IntegerNetwork) -> list[Violation]:
    """Leaky populations whose accumulated current may leave 24 bits, as graphs keep it without wrapping or clipping."""
    problems = []
    for name, bounds in current_bounds(network).items():
        low, high = bounds.range
        if network.by_name[name].is_leaky and max(-low, high) > STATE_LIMIT:
            rule, actual = "accumulated current stays within 24 bits", f"{low:,}..{high:,}"
            problems.append(Violation(name, rule, actual, f"+-{STATE_LIMIT:,}", "quantise with a smaller scale"))
    return problems
