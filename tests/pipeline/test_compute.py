from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from torch import nn

from hardware.errors import SpikeguardError
from pipeline.compute import CPU, Compute, choose_device, deterministic


def test_a_gpu_is_taken_only_if_there_is_one_and_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(name).type for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(SpikeguardError, match=r"compute\.device"):
        choose_device("cuda")


def test_bfloat16_rounds_products_and_returns_float32() -> None:
    torch.manual_seed(0)
    model, images = nn.Linear(64, 3), torch.rand(5, 64)
    assert CPU.cast(model) is model
    cast = Compute(torch.device("cpu"), "bfloat16").cast(model)
    logits = cast(images)
    expected = nn.functional.linear(images.bfloat16(), model.weight.bfloat16(), model.bias.bfloat16()).float()
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, model(images))
    assert next(cast.parameters()) is model.weight


def test_modes_and_options_reach_the_model_itself() -> None:
    class Optioned(nn.Module):
        def forward(self, images: torch.Tensor, surrogate: float = 1.0) -> torch.Tensor:
            return images * surrogate

    model = Optioned()
    cast = Compute(torch.device("cpu"), "bfloat16").cast(model)
    cast.eval()
    assert not model.training
    cast.train()
    assert model.training
    assert float(cast(torch.ones(1), surrogate=3.0)) == 3


def test_determinism_is_asked_for_and_taken_back_even_after_an_error() -> None:
    @deterministic()
    def work() -> None:
        assert torch.are_deterministic_algorithms_enabled()
        raise ValueError("inside")

    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError, match="inside"):
        work()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone has it")
def test_freed_memory_is_kept_for_what_comes_next() -> None:
    """In a process of its own, for it cannot be undone."""
    pages = """
import resource, torch
from pipeline.compute import use_cpu
use_cpu(1)
def faults():
    torch.zeros(2**25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
settled = [faults() for _ in range(20)][-1]
print(faults() - settled, torch.get_num_threads())
"""
    told = subprocess.run([sys.executable, "-c", pages], capture_output=True, text=True, check=True)
    again, threads = map(int, told.stdout.split())
    assert again < 100  # of the 32,768 pages of 128 MiB
    assert threads == 1
