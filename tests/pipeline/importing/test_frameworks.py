"""Networks as they ran in the framework that wrote the file: the same spikes in the network read from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nir
import norse.torch as norse
import numpy as np
import pytest
import snntorch
import torch
from norse.torch.utils.export_nir import to_nir as export_norse
from snntorch.export_nir import export_to_nir as export_snntorch
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.nir_exchange import export_to_nir as export_spikingjelly
from torch import Tensor, nn

from hardware.formats.nir_graph import read_nir_graph
from pipeline.importing.conventions import conventions_of
from pipeline.importing.networks import network_of
from pipeline.models.spiking import SpikingNetwork

SAMPLES, STEPS, FLIPS = 4, 8, 1


def imported(path: Path, written_by: str, *assumed: str) -> SpikingNetwork:
    file = read_nir_graph(path)
    return network_of(file, conventions_of(file, written_by, (f"steps={STEPS}", *assumed)))


def stronger(network: nn.Module, factor: float) -> None:
    """Weights so large that neurons spike."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data *= factor


def require_same_spikes(network: SpikingNetwork, images: Tensor, expected: Sequence[Tensor]) -> None:
    """Spikes ``(samples, steps, …)`` of every layer, but for what float32 rounds at a threshold.

    Neurons that stand for a bias come after those of the file.
    """
    logits, recorded = network.record(images)
    for found, spikes in zip(recorded.values(), expected, strict=True):
        flat = spikes.flatten(2)
        assert 0.01 < float(flat.mean()) < 0.9
        assert int((found.spikes[..., : flat.shape[2]] != flat.bool()).sum()) <= FLIPS
    counts = expected[-1].flatten(2).sum(1)
    assert float((STEPS * logits - counts).abs().sum()) <= FLIPS + 1e-3


def run(network: Sequence[nn.Module], inputs: Tensor, neurons: Sequence[int]) -> list[Tensor]:
    """Outputs ``(samples, steps, …)`` of some modules that keep their own state, one step after the other."""
    history: dict[int, list[Tensor]] = {index: [] for index in neurons}
    with torch.no_grad():
        for step in range(STEPS):
            value = inputs[:, step]
            for index, module in enumerate(network):
                value = module(value)
                value = value[0] if isinstance(value, tuple) else value
                if index in history:
                    history[index].append(value)
    return [torch.stack(values, 1) for values in history.values()]


SPIKINGJELLY: dict[str, Callable[[], nn.Module]] = {
    "IF": lambda: neuron.IFNode(v_threshold=0.8),
    "LIF": lambda: neuron.LIFNode(tau=1.5, v_threshold=0.5, v_reset=0.2),
    "PLIF": lambda: neuron.ParametricLIFNode(init_tau=2.5, v_threshold=0.6, decay_input=False),
    "CubaLIF": lambda: neuron.CUBALIFNode(c_decay=0.5, v_decay=0.75),
}


@pytest.mark.parametrize("kind", SPIKINGJELLY)
def test_spikingjelly(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    make = SPIKINGJELLY[kind]
    network = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1), make(), layer.AvgPool2d(2),
        layer.Conv2d(4, 6, 3, bias=False), make(), layer.Flatten(), layer.Linear(24, 5), make(),
    )  # fmt: skip
    stronger(network, 2.5)
    export_spikingjelly(network, torch.rand(1, 2, 8, 8), save_path=tmp_path / "m.nir")
    inputs = (torch.rand(SAMPLES, STEPS, 2, 8, 8) < 0.3).float()
    functional.reset_net(network)
    spikes = run(network, inputs, [1, 4, 7])
    read = imported(tmp_path / "m.nir", "spikingjelly", "input=spikes")
    require_same_spikes(read, inputs, spikes)


def leaky(shape: tuple[int, ...], reset: str, **options: Any) -> nn.Module:
    beta, threshold = torch.full(shape, 0.8), torch.full(shape, 0.7)
    neurons = {"reset_mechanism": reset, "reset_delay": False, "init_hidden": True, **options}
    return snntorch.Leaky(beta=beta, threshold=threshold, **neurons)


def synaptic(shape: tuple[int, ...], reset: str, **options: Any) -> nn.Module:
    alpha, beta, threshold = (torch.full(shape, value) for value in (0.6, 0.9, 1.0))
    neurons = {"reset_mechanism": reset, "reset_delay": False, "init_hidden": True, **options}
    return snntorch.Synaptic(alpha=alpha, beta=beta, threshold=threshold, **neurons)


@pytest.mark.parametrize(("make", "reset"), [(leaky, "zero"), (leaky, "subtract"), (synaptic, "zero")])
def test_snntorch(make: Callable[..., nn.Module], reset: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), make((3, 8, 8), reset), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(48, 5), make((5,), reset, output=True),
    )  # fmt: skip
    stronger(network, 3)
    nir.write(str(tmp_path / "m.nir"), export_snntorch(network, torch.rand(1, 1, 8, 8), ignore_dims=[0]))
    images = torch.rand(SAMPLES, 1, 8, 8)
    for module in network:
        if isinstance(module, snntorch.SpikingNeuron):
            module.reset_mem()
    spikes = run(network, images[:, None].expand(-1, STEPS, -1, -1, -1), [1, 5])
    read = imported(tmp_path / "m.nir", "snntorch", "input=pixels", f"reset={reset}")
    require_same_spikes(read, images, spikes)


def full(size: int, value: float) -> Tensor:
    return torch.full((size,), float(value))


def lif_cell(size: int) -> nn.Module:
    rates = {"tau_syn_inv": full(size, 200), "tau_mem_inv": full(size, 100)}
    return norse.LIFCell(norse.LIFParameters(**rates, v_leak=full(size, 0), v_th=full(size, 0.3)))


def box_cell(size: int) -> nn.Module:
    values = {"tau_mem_inv": full(size, 150), "v_leak": full(size, 0), "v_th": full(size, 0.2)}
    return norse.LIFBoxCell(norse.LIFBoxParameters(**values))


def iaf_cell(size: int) -> nn.Module:
    return norse.IAFCell(norse.IAFParameters(v_th=full(size, 1)))


def li_cell(size: int) -> nn.Module:
    return norse.LIBoxCell(norse.LIBoxParameters(tau_mem_inv=full(size, 150), v_leak=full(size, 0)))


@pytest.mark.parametrize("last", [True, False], ids=["spikes", "membranes"])
@pytest.mark.parametrize("make", [lif_cell, box_cell, iaf_cell])
def test_norse(make: Callable[[int], nn.Module], last: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = norse.SequentialState(nn.Linear(20, 15), make(15), nn.Linear(15, 6), make(6) if last else li_cell(6))
    stronger(network, 4)
    nir.write(str(tmp_path / "m.nir"), export_norse(network, torch.rand(1, 20)))
    inputs = (torch.rand(SAMPLES, STEPS, 20) < 0.4).float()
    outputs, state = [], None
    with torch.no_grad():
        for step in range(STEPS):
            output, state = network(inputs[:, step], state)
            outputs.append(output)
    read = imported(tmp_path / "m.nir", "norse", "input=spikes")
    if last:
        assert 0.02 < float(torch.stack(outputs).mean()) < 0.9
        assert float((STEPS * read(inputs) - torch.stack(outputs).sum(0)).abs().sum()) <= FLIPS + 1e-3
    else:
        torch.testing.assert_close(read(inputs), outputs[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("kind", ["IF", "LIF"])
def test_sinabs(kind: str, reset: str, tmp_path: Path) -> None:
    """What its writer writes (vectors of float32, time constants in steps), and its neurons' formula, stated here."""
    rng = np.random.default_rng(4)
    first, second = (
        nir.Affine(rng.normal(size=shape).astype(np.float32), rng.normal(size=shape[0]).astype(np.float32) / 4)
        for shape in ((15, 20), (6, 15))
    )

    def neurons(size: int) -> Any:
        ones = np.ones(size, np.float32)
        return nir.IF(ones, ones) if kind == "IF" else nir.LIF(7 * ones, ones, 0 * ones, ones / 4)

    graph = nir.NIRGraph.from_list(
        nir.Input(np.array([20])), first, neurons(15), second, neurons(6), nir.Output(np.array([6]))
    )
    nir.write(str(tmp_path / "m.nir"), graph)
    kept, threshold = (np.exp(-1 / 7), 0.25) if kind == "LIF" else (1.0, 1.0)
    inputs = (rng.random((SAMPLES, STEPS, 20)) < 0.4).astype(np.float32)
    value, expected = inputs.astype(np.float64), []
    for weights in (first, second):
        current = (value @ weights.weight.T + weights.bias) * (1 - kept if kind == "LIF" else 1)
        membrane, spikes = np.zeros_like(current[:, 0]), np.zeros_like(current)
        for step in range(STEPS):
            membrane = kept * membrane + current[:, step]
            spikes[:, step] = membrane >= threshold
            membrane -= spikes[:, step] * (membrane if reset == "zero" else threshold)
        value = spikes
        expected.append(torch.from_numpy(spikes))
    read = imported(tmp_path / "m.nir", "sinabs", "input=spikes", f"reset={reset}")
    require_same_spikes(read, torch.from_numpy(inputs), expected)
