"""Write the Hugging Face LLaMA layout, a part of a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from llama_ray.model.adapter_files import is_adapter
from llama_ray.model.config_files import config_files, to_text
from llama_ray.model.hf_config import EosIds
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.safetensors_writing import tensor_bytes, write_safetensors
from llama_ray.model.stored_config import CONFIG_FILE
from llama_ray.model.stored_model import StoredModel, UnreadTensor
from llama_ray.model.weight_files import INDEX, RANK_FILES, SINGLE, CheckpointError, weight_file_names
from llama_ray.storage.replacement import Replacement

MAX_SHARD_BYTES = 4 * 1024**3
"""Another file of weights begins beyond this size."""


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in memory, on any device, as if it were in a file."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that `read` returns."""
        return self.value.dtype

    def read(self, region: tuple[slice, ...] | None = None) -> Tensor:
        """Return `region` of the tensor, by default all of it, in host memory."""
        return (self.value if region is None else self.value[region]).cpu()


def save_model(
    model: Llama,
    directory: str | Path,
    *,
    bos_id: int | None = None,
    eos_id: EosIds = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    beside: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Write `model` in its dtype; see `save_stored`."""
    tensors = {hf_name(name): HeldTensor(p.detach()) for name, p in model.named_parameters()}
    save_stored(
        StoredModel(model.config, tensors),
        directory,
        bos_id=bos_id,
        eos_id=eos_id,
        max_shard_bytes=max_shard_bytes,
        beside=beside,
    )


def save_stored(
    model: StoredModel,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    bos_id: int | None = None,
    eos_id: EosIds = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    beside: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Write `config.json`, `generation_config.json` and `model*.safetensors`, which transformers reads unchanged.

    `dtype` None keeps that of the embedding. A part of a tensor is in memory at a time. `beside` are further files by
    name, which come with them, or go where they are None. Weights that `directory` holds are replaced once the new ones
    are complete; in the moment of the change it lacks `config.json`, so a directory that holds one is whole. Raises
    CheckpointError for the directory of a training checkpoint, whose weights belong to its optimizer, and for a weight
    beyond the range of `dtype`.
    """
    directory, dtype = Path(directory), dtype or model.dtype
    if is_adapter(directory):
        raise CheckpointError(
            f"{directory} holds an adapter; give another directory to save a whole model to"
        )
    if training := next(directory.glob(RANK_FILES), None):
        raise CheckpointError(
            f"{directory} is a checkpoint of a training run ({training.name}); give another directory to save to"
        )
    shards = list(_split(model.tensors, dtype, max_shard_bytes))
    with Replacement(directory, marker=CONFIG_FILE) as new:
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(shard, file)
            write_safetensors(new.path(file), shard, dtype)
        if len(shards) > 1:
            total = sum(tensor_bytes(tensor, dtype) for tensor in model.tensors.values())
            new.write(INDEX, to_text({"metadata": {"total_size": total}, "weight_map": weight_map}))
        texts = {**config_files(model.config, dtype, bos_id=bos_id, eos_id=eos_id), **beside}
        for name, text in texts.items():
            if text is not None:
                new.write(name, text)
        gone = [name for name, text in beside.items() if text is None]
        new.commit(superseded=[*weight_file_names(directory), *gone])


def _split(
    tensors: Mapping[str, UnreadTensor], dtype: torch.dtype, max_bytes: int
) -> Iterator[dict[str, UnreadTensor]]:
    """Yield the tensors of each file."""
    shard: dict[str, UnreadTensor] = {}
    size = 0
    for name, tensor in tensors.items():
        added = tensor_bytes(tensor, dtype)
        if shard and size + added > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += added
    yield shard
