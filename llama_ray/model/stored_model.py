"""A model in open files: its shape, and its weights by name, none of them read yet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llama_ray.model.config import LlamaConfig
from llama_ray.model.gguf.reading import open_gguf
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.sharded_safetensors import StoredTensor
from llama_ray.model.stored_config import load_config
from llama_ray.model.weight_checks import check_tensors
from llama_ray.model.weight_files import open_weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class UnreadTensor(Protocol):
    """A tensor in a file, of which any part can be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that `read` returns."""

    def read(self, region: tuple[slice, ...] | None = None) -> Tensor:
        """Return `region` of the tensor, by default all of it, in host memory; nothing else is read."""


@dataclass(frozen=True)
class StoredModel:
    """A model whose files are open. `tensors` are by the names of Hugging Face's LLaMA, in the order of `Llama`.

    A tied model has no head of its own.
    """

    config: LlamaConfig
    tensors: Mapping[str, UnreadTensor]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding."""
        return self.tensors[EMBEDDING].dtype


def open_model(path: str | Path, stack: ExitStack) -> StoredModel:
    """Open a model saved by `save_model`, by transformers, by a training run or in a GGUF file.

    `stack` closes its files. All names, shapes and file lengths are checked. Raises CheckpointError for a missing,
    truncated or unsafe file, and for missing, surplus or misshapen tensors.
    """
    directory = Path(path)
    if directory.is_file():
        return StoredModel(*open_gguf(directory, stack))
    config = load_config(directory)
    stored = open_weights(directory, stack)
    config = _resolve_tied_head(stored, config)
    parameters = Llama(config, device="meta").named_parameters()
    shapes = {hf_name(name): tuple(parameter.shape) for name, parameter in parameters}
    check_tensors(directory, stored, shapes)
    return StoredModel(config, {name: stored[name] for name in shapes})


def _resolve_tied_head(stored: dict[str, StoredTensor], config: LlamaConfig) -> LlamaConfig:
    """Give the embedding of a tied model its name, and return the config that the stored tensors follow.

    A tied weight may be stored under the name of the head, of the embedding, or of both. As in transformers, a head
    that differs from the embedding is a weight of its own, whatever the config says.
    """
    if not config.tie_embeddings or HEAD not in stored:
        return config
    if EMBEDDING in stored:
        head, embedding = stored[HEAD], stored[EMBEDDING]
        if head.shape != embedding.shape or not torch.equal(head.read(), embedding.read()):
            return replace(config, tie_embeddings=False)
    head = stored.pop(HEAD)
    stored.setdefault(EMBEDDING, head)
    return config
