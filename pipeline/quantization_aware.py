"""Quantisation-aware fine-tuning: the integer network's own arithmetic, over real weights that go on learning.

On the way forward every weight, bias and threshold is the integer that will be deployed, so the loss, and the attack
inside it, see the deployed network. On the way back rounding passes gradients on unchanged (Bengio et al., "Estimating
or Propagating Gradients Through Stochastic Neurons", 2013), and spikes have their surrogate's. What learns are folded
populations: batch norm is frozen at the statistics it is deployed with, and a pooled weight is as many weights as it
has pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hardware.bounds import WRAP_LIMIT
from hardware.emulator import run_emulator
from hardware.errors import RuleViolations
from hardware.network import FRACTION_BITS, INPUT, STATE_LIMIT, IntegerNetwork, Population, Shape, Synapse
from hardware.surrogates import TRIANGLE, SpikeRule
from hardware.targets.loihi2 import LOIHI2, MAX_BIAS, MAX_VTH_MANTISSA
from hardware.targets.rules import check
from pipeline.attacks.targets import to_images
from pipeline.attribution import compare
from pipeline.checkpoints import Epoch
from pipeline.compute import CPU, Compute
from pipeline.data import Dataset
from pipeline.folding import RealPopulation, fold
from pipeline.integer_recipe import lies_on_the_grid
from pipeline.models.layers import convolve
from pipeline.models.spiking import SpikingNetwork
from pipeline.neurons import MIN_THRESHOLD, fire
from pipeline.objectives import Objective
from pipeline.quantization import SCALABLE, Quantization
from pipeline.training import Augment, Records, Schedule, fit, unchanged

REMEASURED_IMAGES = 64
FINETUNED = "everything, fine-tuned"
"""Name of the attribution row of the integers that learned on."""
CENTRED = 0.45
"""Steps of the grid that a real weight starts at most away from its integer: less than would round elsewhere."""
ROOM = 0.98
"""Share of a limit that sums are brought back to, so that rounding does not carry them over it again."""


def finetune_quantized(
    network: SpikingNetwork,
    quantized: IntegerNetwork,
    objective: Objective,
    train: Dataset,
    validation: Dataset,
    schedule: Schedule,
    *,
    epsilon: float,
    seed: int,
    label: str = "fine-tune integers",
    augment: Augment = unchanged,
    compute: Compute = CPU,
    records: Records | None = None,
) -> tuple[IntegerNetwork, list[Epoch]]:
    """Fine-tune an integer network on its grid; scales, exponents and bits stay.

    Args:
        network: the float SNN; it is not changed.
        quantized: what :func:`~pipeline.quantization.quantize` made of it; it is not changed.
        objective: of the loss, such as :func:`~pipeline.objectives.robust_finetuning`.
        compute: device; its precision must be float32, which alone holds the integers.

    The other arguments are those of :func:`~pipeline.training.fit`.

    Returns:
        The network of the epoch that was best on the validation split, and the history.

    Raises:
        RuleViolations: if the result breaks a rule of the target.
    """
    learner = RoundedNetwork(fold(network), quantized)
    history = fit(
        learner,
        objective,
        train,
        validation,
        schedule,
        epsilon=epsilon,
        seed=seed,
        label=label,
        parameter_groups=learner.parameter_groups(),
        after_step=learner.keep_to_limits,
        augment=augment,
        compute=compute,
        records=records,
    )
    deployed = learner.deployed()
    if problems := check(deployed, SCALABLE):
        raise RuleViolations(f"fine-tuned integer network on {LOIHI2.name}", problems)
    return deployed, history


def remeasured(
    network: SpikingNetwork, quantization: Quantization, deployed: IntegerNetwork, codes: NDArray[np.uint8]
) -> Quantization:
    """A quantisation with the integers that learned on, and how far their spikes now are from the float SNN's.

    Args:
        network: the float SNN.
        quantization: before the fine-tuning; what it says of each kind of rounding stays, for it is about that.
        deployed: after it.
        codes: uint8 ``(samples, *shape)`` training images; the first ones only are used.
    """
    codes = codes[:REMEASURED_IMAGES]
    float_logits, activity = copy.deepcopy(network).cpu().eval().record(to_images(codes))
    spikes = {name: layer.spikes.numpy() for name, layer in activity.items()}
    trace = run_emulator(deployed, codes, "spikes")
    found = {name: one.spikes for name, one in trace.populations.items() if one.spikes is not None}
    row = compare(FINETUNED, found, deployed.logits(trace.readouts), spikes, float_logits.double().numpy())
    choices = tuple(
        replace(choice, disagreement=row.disagreement.get(choice.population, row.logit_error))
        for choice in quantization.choices
    )
    return Quantization(deployed, choices, (*quantization.attribution, row))


class RoundedNetwork(nn.Module):
    """An integer network in torch, its integers rounded from real parameters at every call.

    Where neurons do not leak, reset to zero and never saturate, spikes and logits are those of the integer network;
    otherwise its rounding of the membrane is left out.

    Args:
        populations: the folded float SNN.
        quantized: its integer network; real parameters start as near to the float SNN's as rounds to its integers.
    """

    def __init__(self, populations: Sequence[RealPopulation], quantized: IntegerNetwork) -> None:
        super().__init__()
        self.quantized = quantized
        self.steps = quantized.steps
        self.populations = nn.ModuleDict({real.name: _RoundedPopulation(real, quantized) for real in populations})

    def forward(self, images: Tensor, surrogate: SpikeRule = TRIANGLE) -> Tensor:
        """Logits in real units ``(samples, classes)`` of images ``(samples, *shape)`` in [0, 1].

        Args:
            images: what to classify; each pixel is rounded to its code.
            surrogate: how gradients pass the spikes.
        """
        spec = self.quantized.input
        codes = _rounded(images * spec.max_code)
        constant = codes.new_tensor(spec.constant_codes).reshape(1, -1, *([1] * (len(spec.shape) - 1)))
        activity = {INPUT: codes[None]}
        for name, population in self.populations.items():
            assert isinstance(population, _RoundedPopulation)
            current = population.current(activity, constant.expand(1, -1, *spec.shape[1:]))
            if not population.start.spiking:
                # Divided last, so that equal integers are equal logits.
                return current.mean(0).flatten(1) / population.start.scale
            activity[name] = population.fire(current, self.steps, surrogate)
        raise AssertionError("the last population is the readout")

    def parameter_groups(self) -> list[dict[str, object]]:
        """For the optimiser: weights and biases decay, thresholds do not."""
        thresholds = [value for name, value in self.named_parameters() if name.endswith("threshold")]
        held = {id(value) for value in thresholds}
        others = [value for value in self.parameters() if id(value) not in held]
        return [{"params": others}, {"params": thresholds, "weight_decay": 0.0}]

    @torch.no_grad()
    def keep_to_limits(self) -> None:
        """Bring every parameter back to what the bits hold, and sums to what cannot wrap (after an optimiser step)."""
        for population in self.populations.values():
            assert isinstance(population, _RoundedPopulation)
            population.keep_to_limits(self.steps, self.quantized)

    @torch.no_grad()
    def deployed(self) -> IntegerNetwork:
        """The integer network of the parameters as they are."""
        parts = [part for part in self.populations.values() if isinstance(part, _RoundedPopulation)]
        return replace(
            self.quantized,
            populations=tuple(part.population() for part in parts),
            synapses=tuple(synapse for part in parts for synapse in part.integer_synapses()),
        )


class _RoundedPopulation(nn.Module):
    """Weights, bias and threshold of one population in real units, and the integers they round to."""

    def __init__(self, real: RealPopulation, quantized: IntegerNetwork) -> None:
        super().__init__()
        self.start = quantized.by_name[real.name]
        self.synapses = quantized.incoming(real.name)
        self.on_the_grid = real.threshold is not None and lies_on_the_grid(real)
        self.beta, self.subtract = real.beta, real.subtract
        self.channels, self.presented_channels = quantized.input.shape[0], quantized.input.presented_shape[0]
        # Weights of pixels are per full scale, not per code, so that one learning rate suits all.
        self.units = [
            self.start.scale / (quantized.input.max_code if synapse.source == INPUT else 1) for synapse in self.synapses
        ]
        by_source = {synapse.source: synapse.weight for synapse in real.synapses}
        self.weights = nn.ParameterList(
            _near(by_source[synapse.source] * self.start.scale, synapse, unit)
            for synapse, unit in zip(self.synapses, self.units, strict=True)
        )
        bias = torch.from_numpy(self.start.bias.reshape(len(self.start.bias), -1)[:, 0].copy())
        self.bias = nn.Parameter((bias / self.start.scale).float())
        if real.threshold is not None:
            self.threshold = nn.Parameter(torch.tensor(real.threshold, dtype=torch.float32))

    def integers(self, index: int) -> Tensor:
        """Weights of a synapse in weight units."""
        step = 2.0 ** self.synapses[index].exponent
        return _rounded(self.weights[index] * (self.units[index] / step)) * step

    def current(self, activity: Mapping[str, Tensor], constant: Tensor) -> Tensor:
        """What enters at each step in weight units, ``(steps or 1, samples, *shape)``.

        Args:
            activity: by source, codes or spikes of that form.
            constant: the constant input channels, ``(1, channels, ...)``.
        """
        bias = _rounded(self.bias * self.start.scale)
        total = bias.reshape(1, 1, -1, *([1] * (len(self.start.shape) - 1)))
        for index, synapse in enumerate(self.synapses):
            source, weight = activity[synapse.source], self.integers(index)
            if synapse.source == INPUT and constant.shape[1]:
                image, fixed = self._split(weight)
                total = total + _propagate(synapse, fixed, constant)[None]
                weight = image
            entering = _propagate(synapse, weight, source.flatten(0, 1))
            total = total + entering.reshape(*source.shape[:2], *entering.shape[1:])
        return total

    def fire(self, current: Tensor, steps: int, rule: SpikeRule) -> Tensor:
        """Spikes ``(steps, samples, *shape)``; surrogates are of membranes in real units."""
        # Half a unit below the first integer that spikes, where the twin's neurons have their threshold as well.
        integer = _rounded(self.threshold * self.start.scale).clamp(min=1)
        level = integer - 0.5 if self.on_the_grid else integer
        return fire(current / self.start.scale, level / self.start.scale, self.beta, self.subtract, steps, rule)

    def keep_to_limits(self, steps: int, network: IntegerNetwork) -> None:
        """Clamp all parameters; shrink the weights of outputs whose sums come near the limit."""
        scale = self.start.scale
        for weight, unit, synapse in zip(self.weights, self.units, self.synapses, strict=True):
            low, high = (bound * 2.0**synapse.exponent / unit for bound in _mantissas(synapse))
            weight.clamp_(low, high)
        self.bias.clamp_(-MAX_BIAS / scale, MAX_BIAS / scale)
        limit = float(min(WRAP_LIMIT - 1, STATE_LIMIT / 2**FRACTION_BITS))
        if self.start.spiking:
            self.threshold.clamp_(max(MIN_THRESHOLD, 1 / scale), MAX_VTH_MANTISSA / scale)
            room = torch.full_like(self.bias, limit)
        else:
            room = limit / steps - (self.bias * scale).abs()
        # Rounding may carry what was shrunk over the limit again.
        while bool(((reached := self._largest_sums(network)) > room).any()):
            shrunk = torch.where(reached > room, ROOM * room / reached, torch.ones_like(room))
            for weight in self.weights:
                weight.mul_(shrunk.reshape(-1, *([1] * (weight.ndim - 1))))

    def population(self) -> Population:
        """With its integer bias and threshold."""
        bias = (self.bias * self.start.scale).round().to(torch.int64).numpy()
        per_neuron = np.broadcast_to(bias.reshape(-1, *([1] * (len(self.start.shape) - 1))), self.start.shape)
        threshold = 0
        if self.start.spiking:
            nearest = max(int((self.threshold * self.start.scale).round()), 1)
            threshold = nearest - 1 if self.on_the_grid else nearest
        return replace(self.start, bias=per_neuron.copy(), threshold=threshold)

    def integer_synapses(self) -> tuple[Synapse, ...]:
        """With their integer weights."""
        return tuple(
            replace(synapse, weight=np.ascontiguousarray(self.integers(index).to(torch.int32).numpy()))
            for index, synapse in enumerate(self.synapses)
        )

    def _split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the image's own channels, and of the constant ones."""
        if weight.ndim == 4:
            return weight[:, : self.channels], weight[:, self.channels :]
        by_channel = weight.unflatten(1, (self.presented_channels, -1))
        return by_channel[:, : self.channels].flatten(1), by_channel[:, self.channels :].flatten(1)

    def _largest_sums(self, network: IntegerNetwork) -> Tensor:
        """Per output the largest magnitude that a sum of one step can reach, in weight units."""
        spec = network.input
        upper, lower = torch.zeros(self.start.shape), torch.zeros(self.start.shape)
        for index, synapse in enumerate(self.synapses):
            shape = network.source_shape(synapse)
            taps = self.integers(index).cpu().reshape(len(self.bias), shape[0], -1)
            if synapse.source == INPUT:
                image, fixed = taps[:, : spec.shape[0]], taps[:, spec.shape[0] :]
                always = (fixed * fixed.new_tensor(spec.constant_codes)[None, :, None]).sum(1)
                high = image.clamp(min=0).sum(1) * spec.max_code + always
                low = image.clamp(max=0).sum(1) * spec.max_code + always
            else:
                high, low = taps.clamp(min=0).sum(1), taps.clamp(max=0).sum(1)
            upper, lower = upper + _everywhere(synapse, high, shape), lower + _everywhere(synapse, low, shape)
        largest: Tensor = torch.maximum(upper, -lower).reshape(len(self.bias), -1).amax(1).to(self.bias)
        return largest


def _everywhere(synapse: Synapse, taps: Tensor, source_shape: Shape) -> Tensor:
    """Sums at every output position of what each tap gives ``(out, taps)``, where its pixel is not padding."""
    if synapse.kind == "dense":
        return taps.sum(1)
    plane = torch.ones(1, 1, *source_shape[1:])
    return convolve(plane, taps.reshape(-1, 1, *synapse.weight.shape[2:]), None, synapse.stride, synapse.padding)[0]


def _near(ideal: NDArray[np.float64], synapse: Synapse, unit: float) -> nn.Parameter:
    """Real weights that round to a synapse's integers, and beyond that lie as near to the ideal ones as they can.

    Args:
        ideal: in weight units; without those of constant channels, which start at their integers.
        synapse: with its integers.
        unit: weight units per real unit.
    """
    step = 2.0**synapse.exponent
    low, high = _mantissas(synapse)
    start = synapse.weight.astype(np.float64)
    image = start[:, : ideal.shape[1]]
    near = np.clip(ideal, image - CENTRED * step, image + CENTRED * step)
    start[:, : ideal.shape[1]] = np.clip(near, low * step, high * step)
    weight = torch.from_numpy(start / unit).float()
    return nn.Parameter(weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight)


def _mantissas(synapse: Synapse) -> tuple[int, int]:
    return -(2 ** (synapse.bits - 1)), 2 ** (synapse.bits - 1) - 1


def _propagate(synapse: Synapse, weight: Tensor, rows: Tensor) -> Tensor:
    """Weighted sums ``(rows, *target_shape)`` of activity ``(rows, *source_shape)``."""
    if synapse.kind == "dense":
        return F.linear(rows.flatten(1), weight)
    return convolve(rows, weight, None, synapse.stride, synapse.padding)


def _rounded(values: Tensor) -> Tensor:
    rounded: Tensor = _Round.apply(values)  # type: ignore[no-untyped-call]
    return rounded


class _Round(torch.autograd.Function):
    """The nearest integer; gradients pass unchanged."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        return values.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient
