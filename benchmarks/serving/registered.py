"""Two versions of a model, with different weights, in a real MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from mlflow import MlflowClient

from benchmarks.serving.model import tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained
from llama_ray.tracking.package import CHECKPOINT_PATH
from llama_ray.tracking.registry import CHAMPION

_SPREAD = 6.0
"""Larger weights than initial ones: attention matters, and the next token depends on the version."""


@dataclass(frozen=True)
class Registered:
    """A model whose alias points to its first version; version i is in `directories[i - 1]`."""

    name: str
    uri: str
    directories: tuple[Path, ...]
    vocab_size: int

    @property
    def ref(self) -> str:
        """The reference that is followed."""
        return f"models:/{self.name}@{CHAMPION}"

    def version(self, number: int) -> str:
        """Return the reference of a version, as answers name it."""
        return f"models:/{self.name}/{number}"

    def move(self, number: int) -> None:
        """Point the alias to a version."""
        MlflowClient(self.uri).set_registered_model_alias(self.name, CHAMPION, str(number))


def register_versions(root: Path, preset: str, uri: str, count: int = 2) -> Registered:
    """Write `count` random models of `preset` below `root`, and register them at `uri`."""
    config = LlamaConfig.preset(preset)
    words, name = tokenizer(config.vocab_size), "swapped"
    client = MlflowClient(uri)
    client.create_registered_model(name)
    directories = []
    for seed in range(count):
        package = root / f"version-{seed + 1}"
        directories.append(package / CHECKPOINT_PATH)
        save_pretrained(_model(config, seed), words, directories[-1])
        client.create_model_version(name, package.as_uri(), tags={"validation_loss": "2.0"})
    registered = Registered(name, uri, tuple(directories), config.vocab_size)
    registered.move(1)
    return registered


def _model(config: LlamaConfig, seed: int) -> Llama:
    model = Llama(config, seed=seed, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(_SPREAD)
    return model.bfloat16()
