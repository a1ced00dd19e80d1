from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.conversion import calibrate, convert, estimate_batch_norm, kth_percentile
from pipeline.models.spiking import RateNetwork, SpikingNetwork
from pipeline.neurons import MIN_THRESHOLD, Leaky
from tests.pipeline.samples import random_images, rate_network

PERCENTILE, CALIBRATION_STEPS, KAPPA = 97.0, 12, 0.3


def batches(count: int = 3, samples: int = 8) -> list[Tensor]:
    return [torch.from_numpy(random_images((1, 8, 8), samples, seed)).float() / 255 for seed in range(count)]


def calibrated(network: SpikingNetwork, images: list[Tensor], scale: float = KAPPA) -> SpikingNetwork:
    calibrate(network, images, percentile=PERCENTILE, calibration_steps=CALIBRATION_STEPS, scale=scale)
    return network


def thresholds(network: SpikingNetwork) -> list[float]:
    return [neuron.threshold.item() for _, neuron in network.neurons()]


def test_the_snn_has_the_weights_and_affine_of_the_ann_and_zero_biases() -> None:
    ann = rate_network()
    snn = convert(ann, 8)
    before, after = ann.state_dict(), snn.state_dict()
    copied = [key for key in before if "running_" not in key]
    assert copied
    assert all(torch.equal(after[key], before[key]) for key in copied)
    gained = set(after) - set(before)
    assert {key for key in gained if key.endswith("bias")} == {
        "layers.conv1.bias",
        "layers.conv2.bias",
        "layers.linear1.bias",
        "layers.linear2.bias",
    }
    assert all(not after[key].any() for key in gained if key.endswith("bias"))
    assert snn.steps == 8
    assert not any(isinstance(module, nn.ReLU) for module in snn.modules())


def test_biases_the_ann_has_are_kept() -> None:
    ann = rate_network("wide kernel")
    assert torch.equal(convert(ann, 4).state_dict()["layers.conv1.bias"], ann.state_dict()["layers.conv1.bias"])


def test_running_statistics_are_not_carried_over() -> None:
    after = convert(rate_network(), 8).state_dict()
    assert not after["layers.batch_norm1.running_mean"].any()
    assert torch.equal(after["layers.batch_norm1.running_var"], torch.ones(4))


def test_the_callers_network_is_untouched() -> None:
    ann = rate_network()
    before = copy.deepcopy(ann.state_dict())
    snn = calibrated(convert(ann, 4), batches())
    with torch.no_grad():
        for parameter in snn.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in ann.state_dict().items())
    assert not any(module.training for module in ann.modules())


@pytest.mark.parametrize("percentile", [0.1, 50.0, 97.0, 99.7, 100.0])
@pytest.mark.parametrize("size", [1, 2, 37, 1000])
def test_the_percentile_is_the_kth_smallest_value(percentile: float, size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    k = 1 + round(percentile / 100 * (size - 1))
    assert kth_percentile(values, percentile) == np.sort(values.numpy())[k - 1]


def restated_thresholds(ann: RateNetwork, images: list[Tensor]) -> list[float]:
    """The method's calibration for the network "conv": every layer by hand, batch norm from the mini-batch."""
    state = ann.state_dict()

    def norm(values: Tensor, name: str) -> Tensor:
        mean = values.mean((0, 1, 3, 4), keepdim=True)
        variance = values.var((0, 1, 3, 4), unbiased=False, keepdim=True)
        weight, bias = (state[f"layers.{name}.{kind}"].view(1, 1, -1, 1, 1) for kind in ("weight", "bias"))
        normalised: Tensor = (values - mean) / (variance + 1e-5).sqrt() * weight + bias
        return normalised

    def each_step(values: Tensor, layer: nn.Module) -> Tensor:
        return torch.stack([layer(step) for step in values])

    def spikes(current: Tensor, threshold: float) -> Tensor:
        v, fired = torch.zeros_like(current[0]), []
        for step in current:
            u = v + step
            fired.append((u >= threshold).float())
            v = torch.where(u >= threshold, 0.0, u)
        return torch.stack(fired)

    def percentile(current: Tensor) -> float:
        flat = np.sort(current.numpy().ravel())
        return float(flat[round(PERCENTILE / 100 * (len(flat) - 1))])

    found = []
    pool = nn.AvgPool2d(2)
    layers = ann.layers
    inputs = [torch.stack([(batch - 0.3) / 0.4] * CALIBRATION_STEPS) for batch in images]
    currents = [norm(each_step(x, layers["conv1"]), "batch_norm1") for x in inputs]
    found.append(max(map(percentile, currents)))
    pooled = [each_step(spikes(current, found[-1]), pool) for current in currents]
    currents = [norm(each_step(x, layers["conv2"]), "batch_norm2") for x in pooled]
    found.append(max(map(percentile, currents)))
    flat = [each_step(spikes(current, found[-1]), pool).flatten(2) for current in currents]
    currents = [each_step(x, layers["linear1"]) for x in flat]
    found.append(max(map(percentile, currents)))
    return found


@torch.no_grad()
def test_thresholds_are_set_front_to_back_from_the_spikes_of_unscaled_layers() -> None:
    ann = rate_network()
    expected = restated_thresholds(ann, batches())
    assert min(expected) > MIN_THRESHOLD / KAPPA
    found = thresholds(calibrated(convert(ann, 4), batches()))
    np.testing.assert_allclose(found, KAPPA * np.array(expected), rtol=1e-4)


def test_kappa_scales_every_threshold_at_the_end() -> None:
    unscaled = thresholds(calibrated(convert(rate_network(), 4), batches(), 1.0))
    scaled = thresholds(calibrated(convert(rate_network(), 4), batches(), 0.5))
    np.testing.assert_allclose(scaled, 0.5 * np.array(unscaled), rtol=1e-6)
    floored = thresholds(calibrated(convert(rate_network(), 4), batches(), 1e-6))
    np.testing.assert_allclose(floored, MIN_THRESHOLD, rtol=1e-6)


def test_calibration_leaves_steps_mode_and_momentum_as_they_were() -> None:
    snn = calibrated(convert(rate_network(), 4), batches())
    assert snn.steps == 4
    assert not any(module.training for module in snn.modules())
    norms = [module for module in snn.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.momentum for norm in norms] == [0.1, 0.1]


@torch.no_grad()
def test_batch_norm_is_re_estimated_from_what_the_snn_sees() -> None:
    """Averages over the mini-batches of each one's statistics over batch, space and time."""
    snn = calibrated(convert(rate_network(), 4), batches())
    seen: list[Tensor] = []
    snn.layers["batch_norm2"].register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    estimate_batch_norm(snn, batches())
    means = torch.stack([values.mean((0, 2, 3)) for values in seen])
    variances = torch.stack([values.var((0, 2, 3)) for values in seen])
    norm = snn.layers["batch_norm2"]
    assert all(len(values) == 4 * 8 for values in seen)
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    torch.testing.assert_close(norm.running_var, variances.mean(0))


def test_the_converted_network_answers_much_like_the_ann() -> None:
    """With many steps, and thresholds at the largest activation, rates approach the ReLUs' activations."""
    ann = rate_network()
    snn = convert(ann, 400)
    with torch.no_grad():
        estimate = batches(1, 64)
        calibrate(snn, estimate, percentile=100.0, calibration_steps=20, scale=1.0)
        state = snn.state_dict()
        for key, value in ann.state_dict().items():
            if "running_" in key:
                state[key] = value
        snn.load_state_dict(state)
        images = batches(1, 64)[0]
        correlation = np.corrcoef(snn(images).flatten(), ann(images).flatten())[0, 1]
    assert isinstance(snn.layers["neurons1"], Leaky)
    assert correlation > 0.5
