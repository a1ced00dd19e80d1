"""Where and how precisely a network is trained, and the same result each time."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hardware.errors import SpikeguardError

# Of mallopt(3), and its largest value.
M_TRIM_THRESHOLD, M_MMAP_MAX, MOST = -1, -4, 2**31 - 1

DeviceName = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Compute:
    """A device and a precision.

    Attributes:
        device: where the model and its data are while it is trained.
        precision: of convolutions and matrix products (torch autocast); parameters, their gradients and losses are
            float32 always.
    """

    device: torch.device
    precision: Precision = "float32"

    def cast(self, model: nn.Module) -> nn.Module:
        """The model with its forward pass in this precision and float32 logits; it shares modules and parameters."""
        return model if self.precision == "float32" else _Autocast(model, self.device.type)


CPU = Compute(torch.device("cpu"))


def choose_device(name: DeviceName) -> torch.device:
    """The device a configuration names; "auto" is the GPU if there is one.

    Raises:
        SpikeguardError: if a GPU is asked for and torch finds none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SpikeguardError("torch finds no CUDA device; set compute.device to auto or cpu, or install a CUDA torch")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


class _Autocast(nn.Module):
    def __init__(self, model: nn.Module, device_type: str) -> None:
        super().__init__()
        self.model = model
        self.device_type = device_type

    def forward(self, images: Tensor, **options: Any) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16):
            logits: Tensor = self.model(images, **options)
        return logits.float()


def use_cpu(threads: int) -> None:
    """Let torch use as many threads, and the C library of Linux keep the memory that is freed for what comes next.

    The activity of a layer is tens of MiB; mapped anew at every step, its page faults take an eighth of the time of an
    attack step or more (measured).
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, MOST)


@contextmanager
def deterministic() -> Iterator[None]:
    """Only algorithms that give the same result each time; an operation that has none is an error of torch."""
    # cuBLAS looks for it when it is first used; without it its sums depend on what else the GPU does.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic  # torch gives its attribute no type
    before, filling = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # It would write NaN into every fresh tensor, to expose code that reads what it has not written.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filling
