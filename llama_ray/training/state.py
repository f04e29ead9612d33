"""What a run needs to go on where it stopped, on disk.

A checkpoint is a Hugging Face model directory (fp32 weights, `config.json`, the tokenizer's files) with two files
more: `optimizer.safetensors` and `training.json`, which is written last. So every checkpoint can be generated from,
and nothing in it is a pickle.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.model.checkpoint import CheckpointError, load_model, write_json
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained

_PROGRESS = "training.json"
_OPTIMIZER = "optimizer.safetensors"
_SEPARATOR = "|"  # cannot be part of a parameter's name


@dataclass
class Progress:
    """How far a run is. The learning rate is a function of the step, and nothing in training draws random numbers."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Targets trained on, by all workers."""
    validation_loss: float | None = None
    """The last one measured, nats per token."""
    loader: dict[str, int] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    """Of the MLflow run that the steps were logged to."""


def save_state(
    directory: Path,
    *,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer | None,
    progress: Progress,
) -> None:
    """Write a checkpoint; a directory without `training.json` is not one."""
    save_pretrained(model, tokenizer, directory)
    save_file(_optimizer_tensors(model, optimizer), directory / _OPTIMIZER)
    write_json(directory / _PROGRESS, asdict(progress))


def load_progress(directory: str | Path) -> Progress:
    """Read how far the run of a checkpoint was. Raises CheckpointError where there is none."""
    path = Path(directory) / _PROGRESS
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is no training checkpoint (no {_PROGRESS}); name a step_* directory of a run"
        )
    return Progress(**json.loads(path.read_text()))


def load_state(directory: Path, model: Llama, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill `model` and `optimizer`, which have the right shape already, from a checkpoint.

    Raises CheckpointError where a file is damaged or missing.
    """
    progress = load_progress(directory)
    stored = load_model(directory)
    model.load_state_dict(stored.state_dict())
    try:
        tensors = load_file(directory / _OPTIMIZER)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{directory / _OPTIMIZER} is damaged ({e}); resume from an earlier checkpoint"
        ) from e
    for name, parameter in model.named_parameters():
        state: dict[str, Tensor] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensor = tensors[f"{key}{_SEPARATOR}{name}"]
            state[key] = tensor.to(parameter.device)
        optimizer.state[parameter] = state
    return progress


def _optimizer_tensors(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}{_SEPARATOR}{name}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
