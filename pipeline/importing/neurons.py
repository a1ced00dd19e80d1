"""Neurons of NIR as those of ours: one threshold, two decays, and all gains in the weights.

With k the share of a membrane and j that of a current that a step keeps, gains g and h, and x what enters::

    i <- j i + h w_in x        v <- k v + g r i        spike: v > v_threshold, or v >= v_threshold

(an ``LIF`` has i = x, an ``IF`` also k = 1), where potentials count from v_leak, at which membranes rest, start and
are reset. Euler's step keeps 1 - dt / tau and has the gain dt / tau, an exponential
one exp(-dt / tau) and one minus that. A neuron is unchanged when all that enters it and its threshold are scaled
together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardware.formats.nir_graph import NirNode
from pipeline.importing.conventions import Conventions
from pipeline.importing.signals import Current, Misfit, per_row
from pipeline.neurons import MIN_THRESHOLD

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class NeuronLayer:
    """Neurons and what enters them.

    Attributes:
        entering: in units in which all neurons have one threshold.
        threshold: at which they spike; None if they never do.
        alpha, beta: shares of the current and of the membrane that a step keeps.
    """

    entering: Current
    threshold: float | None
    alpha: float
    beta: float


def neurons_of(node: NirNode, entering: Current, conventions: Conventions) -> NeuronLayer:
    """A neuron node.

    Raises:
        Misfit: if its neurons are none that a chip's population can hold.
    """
    numbers = {key: _fitting(values, entering, key) for key, values in node.numbers.items()}
    gain, alpha, beta = numbers["r"], 0.0, 1.0
    if node.kind == "IF":
        gain = gain * (conventions.dt if conventions.if_gain == "times-dt" else 1.0)
    else:
        tau = numbers["tau_mem" if node.kind.startswith("Cuba") else "tau"]
        beta, share = _step(tau, "tau", conventions)
        gain = share * gain
    if node.kind.startswith("Cuba"):
        alpha, share = _step(numbers["tau_syn"], "tau_syn", conventions)
        gain = gain * numbers["w_in"] * (share if conventions.synapse_gain == "decay" else 1.0)
    current = entering.scaled(per_row(entering, gain, "gain"))
    rest, reset = (numbers.get(name, np.zeros(())) for name in ("v_leak", "v_reset"))
    if (rest != reset).any():
        actual = f"v_leak {rest.max():g}, v_reset {reset.max():g}"
        remedy = "shift the potentials: NIR does not say where membranes start"
        raise Misfit("membranes rest where they are reset", actual, "equal", remedy)
    if node.kind in ("LI", "CubaLI"):
        return NeuronLayer(current, None, alpha, beta)
    thresholds = per_row(current, numbers["v_threshold"] - rest, "threshold")
    if (thresholds <= 0).any():
        remedy = "such a neuron always spikes"
        raise Misfit("threshold is above the potential at rest", thresholds.min(), "above 0", remedy)
    # A power of two rounds nothing, and small thresholds would be clamped.
    enlarged = 2.0 ** max(0, math.ceil(math.log2(2 * MIN_THRESHOLD / thresholds.max())))
    threshold = float(thresholds.max()) * enlarged
    factors = np.where(thresholds == thresholds.max(), enlarged, threshold / thresholds)
    return NeuronLayer(current.scaled(factors), _level(threshold, conventions), alpha, beta)


def _step(tau: Float64Array, name: str, conventions: Conventions) -> tuple[float, float]:
    """What a step keeps of a state with a time constant, and the gain of what enters."""
    if np.ptp(tau) > 0:
        actual = f"{tau.min():g}..{tau.max():g}"
        raise Misfit(f"{name} is one per population", actual, "equal", "split the population")
    ratio = conventions.dt / float(tau.reshape(-1)[0]) if tau.min() > 0 else math.inf
    # A tau of dt, which keeps nothing, may have been rounded.
    if not 0 < ratio <= (1 + 1e-6 if conventions.decay == "euler" else math.inf):
        raise Misfit(f"{name} is a step or more", f"{tau.max():g}", f"dt = {conventions.dt:g} or more", "check dt")
    kept = max(0.0, 1 - ratio) if conventions.decay == "euler" else math.exp(-ratio)
    kept = 0.0 if kept < 1e-6 else kept
    return kept, min(ratio, 1.0) if conventions.decay == "euler" else 1 - kept


def _level(threshold: float, conventions: Conventions) -> float:
    """The threshold of neurons that spike at theirs: above a number is at the next one, in float32."""
    level = np.float32(threshold)
    return float(np.nextafter(level, np.float32(np.inf)) if conventions.comparison == "above" else level)


def _fitting(values: Float64Array, current: Current, name: str) -> Float64Array:
    """Parameters in the shape of the neurons: one for all, or one for each."""
    if values.size == 1:
        return values.reshape(())
    if values.size != int(np.prod(current.shape)):
        raise Misfit(f"{name} fits what enters", values.shape, f"one, or {current.shape}", "check sizes")
    return values.reshape(current.shape)
