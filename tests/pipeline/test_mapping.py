"""The mapping apart from rounding: with very wide integers it gives the float64 SNN's own spikes, for every network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from torch import Tensor

from hardware.bounds import synaptic_bounds
from hardware.errors import RuleViolations
from hardware.network import FRACTION_BITS, INPUT, IntegerNetwork
from hardware.reference import run_reference
from pipeline.conversion import calibrate, convert
from pipeline.finetuning import finetune
from pipeline.folding import RealPopulation, fold
from pipeline.integer_recipe import lies_on_the_grid
from pipeline.mapping import STATE_LIMIT, map_wide
from pipeline.models.graph import Layer, LayerGraph
from pipeline.models.spiking import SpikingNetwork
from pipeline.number_formats import WIDE_BITS
from pipeline.objectives import natural, robust_finetuning
from pipeline.training import Schedule, fit, images_of
from pipeline.unrounded import current
from tests.networks import same_network
from tests.pipeline.random_networks import SIDES, spiking_networks, zoo_network
from tests.pipeline.samples import NETWORKS, easy_data, random_images, rate_network, spiking_network
from tests.pipeline.test_folding import RATES, layer_by_layer

Codes = NDArray[np.uint8]
Float64Array = NDArray[np.float64]
FLOAT_ROUNDING = 2.0**-40
"""Of all magnitudes that enter a float64 membrane: more than some thousand operations in any order can be wrong by."""


@dataclass(frozen=True)
class Compared:
    """A float64 SNN and its wide integer network on the same images.

    Attributes:
        rates: of spikes, by spiking population of the float SNN.
        flips: spikes that differ, by population.
        unexplained: those among them that no rounding to these integers can be the cause of.
    """

    rates: Mapping[str, float]
    flips: Mapping[str, int]
    unexplained: Sequence[str]


def compare(network: SpikingNetwork, wide: IntegerNetwork, codes: Codes) -> Compared:
    """Spike by spike; and the logits, as long as no spike differs.

    A flip has its consequences; its root is where the neuron has heard and done the same until then. There the
    rounding alone is at work, and it is bounded by half a step of the grid for each spike or pixel heard: so much the
    float membrane may be away from the threshold, and no more.
    """
    network = network.double()
    currents, spikes = layer_by_layer(network, codes)
    trace = run_reference(wide, codes, state_limit=STATE_LIMIT)
    activity = {INPUT: torch.from_numpy(codes).double()[None], **spikes}
    agrees = {INPUT: torch.ones(wide.steps, len(codes), dtype=torch.bool)}
    rates: dict[str, float] = {}
    flips: dict[str, int] = {}
    unexplained: list[str] = []
    for real in fold(network):
        error = _error_per_step(real, wide, activity).expand(wide.steps, len(codes), *real.shape)
        scale = wide.by_name[real.name].scale
        if real.threshold is None:
            if not any(flips.values()):
                expected = currents[real.name].mean(0).numpy()
                limit = error.mean(0).numpy() / scale
                assert (np.abs(wide.logits(trace.readouts) - expected) <= limit).all()
            break
        fired = spikes[real.name].bool()
        found = trace.populations[real.name].spikes
        assert found is not None
        differs = torch.from_numpy(found.copy()).transpose(0, 1).reshape(fired.shape) != fired
        rates[real.name], flips[real.name] = float(fired.double().mean()), int(differs.sum())
        heard = torch.stack([agrees[synapse.source] for synapse in real.synapses]).all(0)
        was_the_same = torch.cat([torch.zeros_like(differs[:1]), differs[:-1]]).cumsum(0) == 0
        roots = differs & was_the_same & heard.reshape(*heard.shape, *[1] * len(real.shape))
        away, possible = _away_from_threshold(real, currents[real.name], fired, error, scale)
        unexplained += [f"{real.name} {tuple(where)}" for where in (roots & (away > possible)).nonzero().tolist()]
        agrees[real.name] = differs.flatten(2).any(2).cumsum(0) == 0
    return Compared(rates, flips, unexplained)


def _error_per_step(real: RealPopulation, wide: IntegerNetwork, activity: Mapping[str, Tensor]) -> Tensor:
    """What rounding can be wrong by in one step's sum, ``(steps or 1, samples, *shape)``, in weight units.

    It follows from the grid alone, not from the integers that are judged: half a step for each weight, for the kernel
    of a constant channel half a step times its code, half a unit for the bias.
    """
    scale = wide.by_name[real.name].scale
    codes = wide.input.constant_codes
    halves, magnitudes = [], []
    for synapse, integer in zip(real.synapses, wide.incoming(real.name), strict=True):
        half = 2.0**integer.exponent / 2
        taps = (len(synapse.weight), *synapse.weight.shape[2:])
        constant = None
        if synapse.source == INPUT and synapse.kind == "conv":
            constant = np.full(taps, half * sum(codes))
        halves.append(replace(synapse, weight=np.full_like(synapse.weight, half), constant=constant))
        absolute = None if synapse.constant is None else np.abs(synapse.constant)
        magnitudes.append(replace(synapse, weight=np.abs(synapse.weight), constant=absolute))
    rounded = replace(real, synapses=tuple(halves), bias=np.full_like(real.bias, 0.5))
    heard = replace(real, synapses=tuple(magnitudes), bias=np.abs(real.bias))
    return current(rounded, activity) + FLOAT_ROUNDING * scale * current(heard, activity)


def _away_from_threshold(
    real: RealPopulation, entering: Tensor, fired: Tensor, error: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """How far float membranes are from the threshold, and how far integer ones can be from them, in weight units."""
    assert real.threshold is not None
    v, wrong = torch.zeros_like(error[0]), torch.zeros_like(error[0])
    away, possible = [], []
    for t, spikes in enumerate(fired):
        v = real.beta * v + entering[t if len(entering) > 1 else 0]
        wrong = real.beta * wrong + error[t]
        if real.beta != 1:
            wrong = wrong + 2.0**-FRACTION_BITS
        away.append((v - real.threshold).abs() * scale)
        possible.append(wrong + 0.5)
        if real.subtract:
            v, wrong = v - real.threshold * spikes, wrong + 0.5 * spikes
        else:
            v, wrong = v.masked_fill(spikes, 0.0), wrong.masked_fill(spikes, 0.0)
    return torch.stack(away), torch.stack(possible)


def require_the_same(network: SpikingNetwork, codes: Codes) -> None:
    """Every spike of every population, and populations that neither are silent nor always fire."""
    found = compare(network, map_wide(network), codes)
    assert not any(found.flips.values()), found
    assert all(RATES[0] < rate < RATES[1] for rate in found.rates.values()), found.rates


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_chains_and_residual_networks_spike_as_in_float64(name: str, seed: int) -> None:
    network = spiking_network(name, seed, steps=8)
    require_the_same(network, random_images(network.graph.input_shape, 12, seed))


@pytest.mark.parametrize("name", SIDES)
def test_every_network_of_the_zoo_spikes_as_in_float64(name: str) -> None:
    """VGG, ResNet, pre-activation WRN, averages over the image, dense heads."""
    network = zoo_network(name, 1)
    require_the_same(network, random_images(network.graph.input_shape, 4, 1))


@pytest.mark.parametrize(("beta", "subtract"), [(0.75, False), (1.0, True), (0.5, True)])
@pytest.mark.parametrize("name", ["digits-cnn", "resnet-20", "wrn-16-4"])
def test_leaks_of_12_bits_and_subtracting_resets_spike_as_in_float64(name: str, beta: float, subtract: bool) -> None:
    network = zoo_network(name, 5, 6, beta=beta, subtract=subtract)
    require_the_same(network, random_images(network.graph.input_shape, 4, 1))


def test_other_leaks_are_those_of_their_12_bits() -> None:
    """Beta 0.9 becomes 3686 of 4096, and nothing else changes."""
    wide = map_wide(zoo_network("digits-cnn", 3, 6, beta=0.9))
    assert {population.voltage_decay for population in wide.populations if population.spiking} == {410}
    kept = zoo_network("digits-cnn", 3, 6, beta=3686 / 4096)
    kept.load_state_dict(zoo_network("digits-cnn", 3, 6, beta=0.9).state_dict())
    found = compare(kept, wide, random_images(kept.graph.input_shape, 6, 3))
    assert not any(found.flips.values())
    assert same_network(wide, map_wide(kept))


@cache
def trained(name: str) -> SpikingNetwork:
    """Trained on images, converted, calibrated and fine-tuned, each a little."""
    rate = rate_network(name)
    shape = rate.graph.input_shape
    classes = 4 if name == "conv" else 3
    train, validation = easy_data(96, shape, classes, seed=1), easy_data(32, shape, classes, seed=2)
    groups: list[dict[str, object]] = [{"params": list(rate.parameters())}]
    settings = Schedule(4, 16, 0.1, 5e-4)
    fit(rate, natural(), train, validation, settings, epsilon=0.0, seed=0, label="", parameter_groups=groups)
    network = convert(rate, 6)
    calibrate(network, list(images_of(train).split(32)), percentile=99.7, calibration_steps=20, scale=0.3)
    objective, schedule = robust_finetuning(0.05, 2.0), Schedule(2, 16, 0.01, 5e-4)
    history = finetune(network, objective, train, validation, schedule, epsilon=0.05, seed=0, label="")
    assert history[-1].clean > 0.6
    return network.eval()


@pytest.mark.parametrize("name", ["conv", "residual", "pre-activation"])
def test_trained_networks_spike_as_in_float64_on_images_and_on_noise(name: str) -> None:
    network = trained(name)
    shape = network.graph.input_shape
    images = easy_data(40, shape, 4 if name == "conv" else 3, seed=2).codes
    require_the_same(network, np.concatenate([images, random_images(shape, 20, 4)]))


@settings(max_examples=60)
@given(spiking_networks())
def test_any_graph_spikes_as_in_float64_but_for_what_rounding_explains(network: SpikingNetwork) -> None:
    """No flip without a membrane so near the threshold that half a step for each spike heard reaches it."""
    found = compare(network, map_wide(network), random_images(network.graph.input_shape, 3))
    assert not found.unexplained
    assert sum(found.flips.values()) < 100


@pytest.mark.parametrize("seed", range(4))
def test_a_membrane_within_a_rounding_of_the_threshold_may_flip_and_is_explained(seed: int) -> None:
    """The threshold lies next to a membrane on either side: what flips is that neuron, and what follows from it."""
    network = spiking_network("residual", seed).double()
    codes = random_images(network.graph.input_shape, 6, seed)
    neuron = dict(network.neurons())["neurons1"]
    u = np.unique(layer_by_layer(network, codes)[0]["neurons1"].numpy())
    level = u[np.abs(u - neuron.threshold.item()).argmin()]
    flips = 0
    for nearness in np.linspace(-3e-8, 3e-8, 15):
        with torch.no_grad():
            neuron.threshold.fill_(level * (1 + nearness))
        found = compare(network, map_wide(network), codes)
        assert not found.unexplained
        flips += sum(found.flips.values())
    assert flips > 0


@pytest.mark.parametrize("name", ["conv", "residual", "dense"])
def test_flips_that_rounding_does_not_explain_are_told(name: str) -> None:
    """The bound knows nothing of the integers it judges: wrong ones are not excused, nor are their consequences
    blamed on later populations.
    """
    network = spiking_network(name, 1)
    codes = random_images(network.graph.input_shape, 40, 1)
    wide = map_wide(network)
    first, *others = wide.populations
    little = first.threshold // 20
    for wrong in (replace(first, threshold=first.threshold + little), replace(first, bias=first.bias + little)):
        found = compare(network, replace(wide, populations=(wrong, *others)), codes)
        assert found.flips[others[0].name] > 0
        assert {where.split()[0] for where in found.unexplained} == {first.name}


def binary_network(seed: int, steps: int = 6) -> SpikingNetwork:
    """Residual, with weights, biases and thresholds that are multiples of a sixteenth, so that membranes often meet
    thresholds exactly. What reads pixels is 255 times that, for float64 divides codes by it.
    """
    neuron = {"beta": 1.0, "subtract": False}
    conv = {"kernel_size": 3, "stride": 1, "padding": 1, "bias": True}
    layers = (
        Layer("stem", "conv", {"in_channels": 1, "out_channels": 3, **conv}, inputs=(INPUT,)),
        Layer("first", "spike", neuron),
        Layer("branch", "conv", {"in_channels": 3, "out_channels": 3, **conv}, inputs=("first",)),
        Layer("shortcut", "scale", {"learned": True}, inputs=("first",)),
        Layer("sum", "add", inputs=("shortcut", "branch")),
        Layer("second", "spike", neuron),
        Layer("pool", "avg_pool", {"kernel_size": 2}),
        Layer("flat", "flatten"),
        Layer("out", "linear", {"in_features": 12, "out_features": 3, "bias": True}),
    )
    network = SpikingNetwork(LayerGraph((1, 4, 4), layers), steps).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            unit = 255 / 16 if name.startswith(("layers.stem", "layers.first")) else 1 / 16
            low, high = (1, 40) if name.endswith("threshold") else (-16, 20)
            value.copy_(unit * torch.randint(low, high, value.shape, generator=generator))
    return network


@pytest.mark.parametrize("seed", range(6))
def test_short_binary_fractions_stay_exact_ties_and_logits_included(seed: int) -> None:
    network = binary_network(seed)
    codes = 255 * np.random.default_rng(seed).integers(0, 2, (16, 1, 4, 4)).astype(np.uint8)
    wide = map_wide(network)
    currents, spikes = layer_by_layer(network, codes)
    trace = run_reference(wide, codes, state_limit=STATE_LIMIT)
    ties = 0
    for real in fold(network)[:-1]:
        found = trace.populations[real.name].spikes
        assert found is not None
        assert np.array_equal(found, spikes[real.name].bool().flatten(2).transpose(0, 1).numpy())
        entering, fired = currents[real.name], spikes[real.name].bool()
        away, _ = _away_from_threshold(real, entering, fired, torch.zeros_like(fired, dtype=torch.float64), 1.0)
        ties += int((away == 0).sum())
    assert ties > 50
    assert np.array_equal(wide.logits(trace.readouts) * wide.steps, currents["readout"].sum(0).numpy())


@pytest.mark.parametrize("name", [*NETWORKS, "digits-cnn", "wrn-16-4"])
def test_weights_have_24_bits_and_are_the_nearest_at_scales_that_are_powers_of_two(name: str) -> None:
    network = spiking_network(name) if name in NETWORKS else zoo_network(name)
    wide = map_wide(network)
    for real in fold(network):
        population = wide.by_name[real.name]
        mantissa, exponent = np.frexp(population.scale)
        assert mantissa == 0.5, exponent
        if real.threshold is not None:
            assert abs(population.threshold + lies_on_the_grid(real) - real.threshold * population.scale) <= 0.5
        used = []
        for synapse, integer in zip(real.synapses, wide.incoming(real.name), strict=True):
            assert integer.bits == WIDE_BITS
            weight = integer.weight[:, : synapse.weight.shape[1]]
            step = 2.0**integer.exponent
            assert np.abs(weight - synapse.weight * population.scale).max() <= step / 2
            used.append(np.abs(weight / step).max())
        # No bit is left unused, unless the membrane or the code of a constant part needs the room.
        assert max(used) > 2 ** (WIDE_BITS - 3)


def largest_membrane(wide: IntegerNetwork) -> float:
    """In state units, proven by the bounds that bundles are proven by."""
    largest = 0.0
    for name, bounds in synaptic_bounds(wide).items():
        population = wide.by_name[name]
        reached = np.maximum(np.abs(bounds.lower + population.bias), np.abs(bounds.upper + population.bias))
        largest = max(largest, wide.steps * float(reached.max()), population.threshold)
    return largest * 2.0**FRACTION_BITS


@pytest.mark.parametrize("loud", [1.0, 1e8])
@pytest.mark.parametrize("name", ["dense", "residual", "pre-activation"])
def test_membranes_stay_far_from_where_they_would_saturate(name: str, loud: float) -> None:
    """Biases and thresholds that dwarf the weights take a smaller scale; the spikes are the same nevertheless."""
    network = spiking_network(name, 2)
    with torch.no_grad():
        for key, value in network.named_parameters():
            if key.endswith("threshold") or (key.endswith("bias") and "batch_norm" not in key):
                value.mul_(loud)
    wide = map_wide(network)
    assert largest_membrane(wide) <= STATE_LIMIT
    codes = random_images(network.graph.input_shape, 8, 2)
    found = compare(network, wide, codes)
    assert not found.unexplained
    assert not any(found.flips.values())
    finer = [p.scale for p in map_wide(spiking_network(name, 2)).populations]
    coarser = [p.scale for p in wide.populations]
    assert all(here <= there for here, there in zip(coarser, finer, strict=True))
    assert (coarser != finer) == (loud > 1)


def test_a_state_of_that_size_survives_a_leak_in_int64() -> None:
    assert np.iinfo(np.int64).max >= STATE_LIMIT * 4096


def test_several_populations_that_read_pixels_share_their_constant_channel() -> None:
    wide = map_wide(spiking_network("pre-activation"))
    readers = [synapse for synapse in wide.synapses if synapse.source == INPUT]
    assert len(readers) > 1
    assert len(wide.input.constant_codes) == 1
    assert {synapse.weight.shape[1] for synapse in readers} == {wide.input.presented_shape[0]}
    assert all(synapse.weight[:, -1].any() for synapse in readers)


@pytest.mark.parametrize("name", ["plain conv", "dense", "features"])
def test_where_the_bias_holds_the_constant_part_there_is_no_constant_channel(name: str) -> None:
    assert map_wide(spiking_network(name)).input.constant_codes == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_no_numbers_are_refused_by_name(value: float) -> None:
    network = spiking_network()
    with torch.no_grad():
        network.get_parameter("layers.conv1.weight")[0, 0, 0, 0] = value
        network.get_parameter("layers.linear2.bias")[1] = value
    with pytest.raises(RuleViolations, match=r"float network: 2 problem\(s\)") as caught:
        map_wide(network)
    assert [row.object for row in caught.value.violations] == ["neurons1", "readout"]


@pytest.mark.parametrize("value", [1e20, 1e30, -1e30])
@pytest.mark.parametrize(
    ("parameter", "named"),
    [("neurons2.threshold", "neurons2"), ("linear1.bias", "neurons3"), ("linear2.bias", "readout")],
)
def test_what_is_out_of_all_proportion_is_refused_by_name(parameter: str, named: str, value: float) -> None:
    network = spiking_network()
    with torch.no_grad():
        network.get_parameter(f"layers.{parameter}").fill_(abs(value) if "threshold" in parameter else value)
    with pytest.raises(RuleViolations) as caught:
        map_wide(network)
    (row,) = caught.value.violations
    assert (row.object, row.rule, row.limit) == (named, "int64 holds it", "1.1e+15")
    assert row.actual.endswith("state units")
    assert float(row.actual.split()[0]) > STATE_LIMIT
    assert "out of all proportion" in row.remedy


def test_a_constant_part_that_no_code_holds_is_refused() -> None:
    network = spiking_network()
    network.get_buffer("layers.normalize1.mean").fill_(1e12)
    with pytest.raises(RuleViolations) as caught:
        map_wide(network)
    (row,) = caught.value.violations
    assert (row.object, row.rule, row.limit) == ("neurons1", "a constant input channel holds its constant part", "255")
    assert int(row.actual.removeprefix("code ")) > 255
    assert "mean of the normalisation out of all proportion" in row.remedy


@pytest.mark.parametrize("layer", ["linear1", "linear2", "linear3"])
def test_a_silent_layer_is_still_a_network(layer: str) -> None:
    network = spiking_network("dense")
    with torch.no_grad():
        network.get_parameter(f"layers.{layer}.weight").zero_()
    found = compare(network, map_wide(network), random_images((2, 3, 3), 6))
    assert not any(found.flips.values())


def test_mapping_changes_nothing_in_the_float_network_and_is_repeatable() -> None:
    network = spiking_network("residual").train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    first, second = map_wide(network, {"seed": 3}), map_wide(network, {"seed": 3})
    assert same_network(first, second)
    assert first.provenance == {"seed": 3}
    assert map_wide(network).provenance == {}
    assert first.steps == network.steps
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
