"""Write a model of any reference for other programs: as a Hugging Face directory, or as a GGUF file."""

from __future__ import annotations

import math
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from llama_ray.exporting.adapter import write_adapter
from llama_ray.exporting.gguf_file import write_gguf_model
from llama_ray.exporting.gguf_tokenizer import tokenizer_metadata
from llama_ray.exporting.hugging_face import check_apart, eos_ids_of, write_directory
from llama_ray.model.adapter_files import is_adapter
from llama_ray.model.saving import MAX_SHARD_BYTES
from llama_ray.model.stored_config import CONFIG_FILE
from llama_ray.model.stored_model import StoredModel
from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import load_shape, load_tokenizer, open_pretrained, resolve
from llama_ray.storage.gguf import Value
from llama_ray.storage.paths import is_uri, model_name
from llama_ray.utils.errors import printable
from llama_ray.utils.fields import check_fields, limits

GGUF = ".gguf"
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_Dtype = Literal["auto", "f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written, and where.

    Args:
        ref: The model: a directory, a training checkpoint, a .gguf file, models:/NAME/VERSION, hf://ORG/NAME, or an
            adapter.
        to: A directory for the Hugging Face layout, or a file that ends in .gguf.
        dtype: Of the weights; auto keeps theirs. q8_0 (8 bits, with a scale for each 32 weights) is for GGUF only.
        max_shard_bytes: Largest file of weights in a directory; a single tensor may be larger.
        merge: Add an adapter to the weights of its base. Without it, the adapter itself is written, in PEFT's layout.
    """

    ref: str
    to: str
    dtype: _Dtype = "auto"
    max_shard_bytes: int = field(default=MAX_SHARD_BYTES, metadata=limits(1, 2**62))
    merge: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if is_uri(self.to):
            raise ValueError(f"to is {printable(self.to)}; it must be on this machine; copy the result there")
        if self.dtype == "q8_0" and not self.is_gguf:
            raise ValueError(
                f"dtype is q8_0; it must be f32, f16 or bf16 for a directory; give --to FILE{GGUF}"
            )
        if Path(self.to).is_dir() if self.is_gguf else Path(self.to).is_file():
            kind = "directory" if self.is_gguf else f"file without {GGUF}"
            raise ValueError(f"to is {printable(self.to)}, which is a {kind} already; give another")

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file is written."""
        return self.to.endswith(GGUF)


def export(config: ExportConfig) -> list[str]:
    """Write the model of `config`, and return in what it will differ elsewhere, a line for each.

    No more than a part of a tensor is in memory. What `to` names is replaced once the new one is complete, and stays as
    it is after an error. Raises CheckpointError or TokenizerError, which are ValueErrors.
    """
    path, to = resolve(config.ref), Path(config.to)
    if path.resolve() == to.resolve():
        raise CheckpointError(f"to is {printable(config.to)}, the model itself; give another place")
    if config.merge and not is_adapter(path):
        raise CheckpointError(f"{printable(config.ref)} is no adapter; leave out --merge")
    if is_adapter(path) and not config.merge:
        if config.is_gguf:
            raise CheckpointError(f"{printable(config.ref)} is an adapter; add --merge, or give --to DIR")
        if (to / CONFIG_FILE).exists():
            raise CheckpointError(
                f"to is {printable(config.to)}, which holds a whole model; give another place"
            )
        write_adapter(to, path, load_shape(path).vocab_size, _DTYPES.get(config.dtype))
        return []
    check_apart(to, [path])
    with ExitStack() as stack:
        model = open_pretrained(path, stack)
        write = _write_gguf if config.is_gguf else _write_directory
        return write(model, path, config)


def _write_directory(model: StoredModel, path: Path, config: ExportConfig) -> list[str]:
    dtype = _DTYPES.get(config.dtype, model.dtype)
    _check_space(Path(config.to), _num_weights(model) * dtype.itemsize)
    tokenizer = load_tokenizer(path, model.config.vocab_size)
    write_directory(model, tokenizer, path, config.to, dtype=dtype, max_shard_bytes=config.max_shard_bytes)
    return [] if tokenizer else ["the model has no tokenizer"]


def _write_gguf(model: StoredModel, path: Path, config: ExportConfig) -> list[str]:
    rows = model.config.vocab_size
    tokenizer = load_tokenizer(path, rows)
    metadata: dict[str, Value] = {}
    notes = ["the model has no tokenizer: llama.cpp as a library takes token ids, its server needs one"]
    if tokenizer is not None:
        metadata, notes = tokenizer_metadata(tokenizer, rows, eos_ids_of(path, None, rows))
    names = {dtype: name for name, dtype in _DTYPES.items()}
    kind = names.get(model.dtype, "f32") if config.dtype == "auto" else config.dtype
    size = _DTYPES[kind].itemsize if kind in _DTYPES else 1
    _check_space(Path(config.to).parent, _num_weights(model) * size)
    Path(config.to).parent.mkdir(parents=True, exist_ok=True)
    write_gguf_model(Path(config.to), model, kind, printable(model_name(config.ref.rstrip("/"))), metadata)
    return notes


def _num_weights(model: StoredModel) -> int:
    return sum(math.prod(tensor.shape) for tensor in model.tensors.values())


def _check_space(directory: Path, needed: int) -> None:
    there = next(
        parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.is_dir()
    )
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(
            f"{printable(str(directory))} has {free / 1e9:.1f} GB of free space; the weights need "
            f"{needed / 1e9:.1f} GB; free some, or give another place"
        )
