"""Checkpoints of a training in progress: one safetensors file, from which it goes on as if it had never stopped."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hardware.errors import SpikeguardError
from hardware.files import MIB, atomic_path, require_file

FORMAT = "spikeguard.checkpoint/1"
MAX_CHECKPOINT_BYTES = 16 * 1024 * MIB

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave.

    Attributes:
        loss: mean over the training batches.
        clean: accuracy on the validation split.
        robust: accuracy under attack on (at most 1,000 images of) the validation split.
        learning_rate: of its first step.
        seconds: it took; no part of what makes two epochs equal.
    """

    loss: float
    clean: float
    robust: float
    learning_rate: float
    seconds: float = field(default=0.0, compare=False)


@dataclass
class TrainingState:
    """All that training changes; what else an epoch depends on follows from the settings and its number.

    Attributes:
        model: as the optimiser left it.
        optimiser: SGD over parameters of the model.
        average: its running average, if one is kept; this is then what is validated.
        best: state of the best epoch so far.
        best_score: of that epoch.
        history: the epochs done.
    """

    model: nn.Module
    optimiser: torch.optim.SGD
    average: nn.Module | None
    best: Tensors = field(default_factory=dict)
    best_score: float = float("-inf")
    history: list[Epoch] = field(default_factory=list)

    @property
    def judged(self) -> nn.Module:
        """What is validated and kept."""
        return self.model if self.average is None else self.average

    def note(self, epoch: Epoch) -> None:
        """Add a finished epoch; the higher sum of its two accuracies is better, the later epoch on a tie."""
        self.history.append(epoch)
        score = epoch.clean + epoch.robust
        if score >= self.best_score:
            self.best_score, self.best = score, copy.deepcopy(self.judged.state_dict())

    def tensors(self) -> Tensors:
        """Model, average, best state and momentum by name."""
        parts = {
            "model": self.model.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "best": self.best,
            "momentum": {name: entry["momentum_buffer"] for name, entry in self._momenta() if entry},
        }
        return {f"{part}/{name}": value.detach() for part, values in parts.items() for name, value in values.items()}

    def restore(self, tensors: Tensors, best_score: float, history: list[Epoch]) -> None:
        """Go back to a saved state.

        Raises:
            SpikeguardError: if the tensors are not those of this model and optimiser; nothing is changed then.
        """
        self._require_own(tensors)
        device = next(iter(self.model.state_dict().values())).device
        self.model.load_state_dict(_part(tensors, "model"))
        if self.average is not None:
            self.average.load_state_dict(_part(tensors, "average"))
        self.best = {name: value.to(device, copy=True) for name, value in _part(tensors, "best").items()}
        momenta = _part(tensors, "momentum")
        for name, entry in self._momenta():
            if name in momenta:
                entry["momentum_buffer"] = momenta[name].to(device, copy=True)
        self.best_score, self.history = best_score, history

    def _momenta(self) -> list[tuple[str, dict[str, Tensor]]]:
        """The optimiser's entry of each parameter it moves, empty before the first step."""
        moved = {id(parameter) for group in self.optimiser.param_groups for parameter in group["params"]}
        return [
            (name, self.optimiser.state[parameter])
            for name, parameter in self.model.named_parameters()
            if id(parameter) in moved
        ]

    def _require_own(self, tensors: Tensors) -> None:
        state = self.model.state_dict()
        expected = {f"{part}/{name}": value for part in ("model", "best") for name, value in state.items()}
        if self.average is not None:
            expected |= {f"average/{name}": value for name, value in state.items()}
        parameters = dict(self.model.named_parameters())
        optional = {f"momentum/{name}": parameters[name] for name, _ in self._momenta()}
        shapes, own = _shapes(tensors), _shapes(expected | optional)
        wrong = sorted((expected.keys() - shapes.keys()) | {name for name in shapes if shapes[name] != own.get(name)})
        if wrong:
            raise SpikeguardError(f"it was made with another network ({len(wrong)} tensors differ, first {wrong[0]})")


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal["spikeguard.checkpoint/1"]
    key: str
    best_score: float
    history: list[Epoch]


def save_checkpoint(path: Path, key: str, state: TrainingState) -> None:
    """Write the state atomically; a kill leaves either the checkpoint before or this one.

    Args:
        path: of the .safetensors file.
        key: stands for everything the training depends on.
        state: after a whole epoch.
    """
    tensors = {name: value.contiguous() for name, value in state.tensors().items()}
    facts = {
        "format": FORMAT,
        "key": key,
        "best_score": state.best_score,
        "history": [asdict(epoch) for epoch in state.history],
    }
    metadata = {"facts": json.dumps(facts), "sha256": _digest(tensors)}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)


def restore_checkpoint(path: Path, key: str, state: TrainingState) -> None:
    """Bring the state to where a checkpoint left off.

    Raises:
        SpikeguardError: if the file is no checkpoint, is damaged, or has another key; the state stays as it is.
    """
    require_file(path, MAX_CHECKPOINT_BYTES)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            facts = _Facts.model_validate_json(metadata.get("facts", ""))
            if facts.key != key:
                raise SpikeguardError("it was made with other settings, data or code")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ValidationError as error:
        raise SpikeguardError(f"it is not a {FORMAT} file ({error.error_count()} problems in its header)") from error
    except (SafetensorError, OSError) as error:
        raise SpikeguardError(f"it is damaged ({error})") from error
    if metadata.get("sha256") != _digest(tensors):
        raise SpikeguardError("it is damaged (its tensors do not have the checksum they were written with)")
    state.restore(tensors, facts.best_score, facts.history)


def _part(tensors: Mapping[str, Tensor], part: str) -> Tensors:
    return {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (value.dtype, value.shape) for name, value in tensors.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
