"""Read and write the Hugging Face LLaMA layout: config.json and safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama_ray.model.config import LlamaConfig
from llama_ray.model.hf_config import to_hf
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.stored_config import CONFIG_FILE
from llama_ray.model.stored_model import StoredModel, open_model
from llama_ray.model.weight_files import (
    INDEX,
    RANK_FILES,
    SINGLE,
    CheckpointError,
    weight_file_names,
)
from llama_ray.storage.atomic import write_text
from llama_ray.storage.replacement import Replacement

MAX_SHARD_BYTES = 4 * 1024**3
"""`save_model` starts another file beyond this size."""

WeightSlicer = Callable[[str, tuple[int, ...]], tuple[slice, ...]]
"""The name and shape of a parameter -> the slice of it, in each dimension, that this process keeps."""


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    slicer: WeightSlicer | None = None,
) -> Llama:
    """Read a model saved by `save_model`, by transformers or by a training run, in one file or many.

    `dtype` None keeps the dtype of the stored embedding. With `slicer` only the chosen slice of each tensor is read,
    and the model's weights have the size of their slices. All names, shapes and file lengths are checked before the
    weights are allocated; tensors are then copied one at a time, so that the model is never in memory twice.
    Raises CheckpointError for a missing, truncated or unsafe file, and for missing, surplus or misshapen tensors.
    """
    with ExitStack() as stack:
        return read_model(open_model(directory, stack), dtype, device, slicer)


def read_model(
    stored: StoredModel,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    slicer: WeightSlicer | None = None,
) -> Llama:
    """Do what `load_model` does, with a model that is open."""
    # The memory that is given, not the device that new tensors happen to be made on.
    with torch.device("cpu"):
        model = Llama(stored.config, device="meta")
        slices: dict[str, tuple[slice, ...]] = {}
        if slicer is not None:
            slices = {n: slicer(n, tuple(p.shape)) for n, p in model.named_parameters()}
            for name, kept in slices.items():
                _slice_parameter(model, name, kept)
            model.tie_weights()
        model.to(dtype or stored.dtype)
        model.materialize(device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(stored.tensors[hf_name(name)].read(slices.get(name)))
    return model


def save_model(
    model: Llama,
    directory: str | Path,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    beside: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Write `config.json`, `generation_config.json` and `model*.safetensors`, which transformers reads unchanged.

    Weights keep the model's dtype. `beside` are further files by name, which come with them, or go where they are None.
    Weights that `directory` holds are replaced once the new ones are complete; in the moment of the change it lacks
    `config.json`, so a directory that holds one is whole. Raises CheckpointError for the directory of a training
    checkpoint, whose weights belong to its optimizer.
    """
    directory = Path(directory)
    if training := next(directory.glob(RANK_FILES), None):
        raise CheckpointError(
            f"{directory} is a checkpoint of a training run ({training.name}); give another directory to save to"
        )
    tensors = {hf_name(n): p.detach() for n, p in model.named_parameters()}
    shards = list(_split(tensors, max_shard_bytes))
    with Replacement(directory, marker=CONFIG_FILE) as new:
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            save_file(
                {n: tensors[n].cpu().contiguous() for n in names}, new.path(file), metadata={"format": "pt"}
            )
        if len(shards) > 1:
            total = sum(t.nbytes for t in tensors.values())
            new.write(INDEX, to_text({"metadata": {"total_size": total}, "weight_map": weight_map}))
        dtype = model.embed_tokens.weight.dtype
        texts = {**config_files(model.config, dtype, bos_id=bos_id, eos_id=eos_id), **beside}
        for name, text in texts.items():
            if text is not None:
                new.write(name, text)
        gone = [name for name, text in beside.items() if text is None]
        new.commit(superseded=[*weight_file_names(directory), *gone])


def config_files(
    config: LlamaConfig, dtype: torch.dtype, *, bos_id: int | None = None, eos_id: int | None = None
) -> dict[str, str]:
    """Return the texts of `generation_config.json` and `config.json`, by name, for weights of `dtype`."""
    generation = {"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": True}
    name = str(dtype).removeprefix("torch.")
    return {
        "generation_config.json": to_text({k: v for k, v in generation.items() if v is not None}),
        CONFIG_FILE: to_text(to_hf(config, dtype=name, bos_id=bos_id, eos_id=eos_id)),
    }


def save_config(
    config: LlamaConfig,
    dtype: torch.dtype,
    directory: Path,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> None:
    """Write `generation_config.json`, then `config.json`, for weights of `dtype`."""
    for name, text in config_files(config, dtype, bos_id=bos_id, eos_id=eos_id).items():
        write_text(directory / name, text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically: readers see the old file or the new one, also after a crash."""
    write_text(path, to_text(content))


def to_text(content: dict[str, Any]) -> str:
    """Return `content` as the text of a JSON file."""
    return f"{json.dumps(content, indent=2)}\n"


def _split(tensors: dict[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard


def _slice_parameter(model: Llama, name: str, kept: tuple[slice, ...]) -> None:
    """Replace a parameter on the meta device by one of the slice's shape."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = module.get_parameter(attribute)[kept]
    module.register_parameter(attribute, torch.nn.Parameter(weight.detach().clone()))
    if isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = weight.shape
