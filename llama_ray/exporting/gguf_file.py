"""Write a model and its tokenizer as one GGUF file, a part of a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama_ray.exporting.gguf_blocks import FILE_TYPES, encode, format_for
from llama_ray.model.config import LlamaConfig
from llama_ray.model.gguf.blocks import F32, FORMATS
from llama_ray.model.gguf.metadata import to_metadata
from llama_ray.model.gguf.names import ROPE_FACTORS, gguf_name, in_pairs, is_key, is_query
from llama_ray.model.gguf.rope import rope_factors
from llama_ray.model.parts import parts
from llama_ray.model.saving import HeldTensor
from llama_ray.model.stored_model import StoredModel, UnreadTensor
from llama_ray.storage.gguf import Value
from llama_ray.storage.gguf_writing import NewTensor, write_gguf


def write_gguf_model(
    file: Path, model: StoredModel, kind: str, name: str, tokenizer: Mapping[str, Value]
) -> None:
    """Replace `file` by `model`, its matrices in `kind` ("f32", "f16", "bf16" or "q8_0"), with metadata of `tokenizer`.

    `name` is what the file calls the model. Raises CheckpointError for a weight beyond the range of `kind`.
    """
    number, file_type = FILE_TYPES[kind]
    metadata: dict[str, Value] = {
        "general.name": name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **to_metadata(model.config),
        **(tokenizer or {"tokenizer.ggml.model": "none"}),
    }
    tensors = {
        gguf_name(name): _new(
            name, tensor, format_for(tensor.shape, number), _rows_together(name, model.config)
        )
        for name, tensor in model.tensors.items()
    }
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.rope_type == "llama3":
        tensors[ROPE_FACTORS] = _new(ROPE_FACTORS, HeldTensor(rope_factors(model.config)), F32, 0)
    write_gguf(file, metadata, tensors)


def _rows_together(name: str, config: LlamaConfig) -> int:
    """Return the rows of a head where they get another order; 0 where they do not."""
    return config.head_dim if is_query(name) or is_key(name) else 0


def _new(name: str, tensor: UnreadTensor, number: int, head: int) -> NewTensor:
    kind = FORMATS[number]

    def content() -> Iterator[memoryview]:
        for part in parts(name, tensor, torch.float32, multiple=max(1, head)):
            yield encode(name, _in_pairs(part, head) if head else part, number)

    size = math.prod(tensor.shape) // kind.values * kind.size
    return NewTensor(tensor.shape, number, size, content)


def _in_pairs(rows: Tensor, head: int) -> Tensor:
    return in_pairs(rows, len(rows) // head)
