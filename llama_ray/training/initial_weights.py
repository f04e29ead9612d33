"""Begin a run with the weights of another model: what must fit, and how each worker reads its share of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama_ray.data.tokenizing.same_ids import first_difference
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.grown_vocabulary import with_vocabulary
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.model.stored_model import StoredModel
from llama_ray.pretrained import load_shape, load_tokenizer, open_pretrained
from llama_ray.training.checkpointing.state import plain_parameters
from llama_ray.training.config import TrainConfig
from llama_ray.utils.errors import printable
from llama_ray.utils.torch_private import shard_offsets

POSITIONS = ("max_seq_len", "rope_theta", "rope_scaling")
"""Fields of the shape that no tensor has: how positions are counted. Another context may be trained with others."""


def starting_shape(stored: LlamaConfig, given: Mapping[str, Any], ref: str) -> LlamaConfig:
    """Return the shape `stored` of the model `ref` with the fields `given`, of which those of positions may be others.

    Raises ValueError for a field that the weights contradict; `vocab_size` is left to `check_initial_weights`.
    """
    shape = replace(stored, **given)
    _check_shape(shape, stored, ref)
    return shape


def position_changes(stored: LlamaConfig, shape: LlamaConfig, ref: str) -> Iterator[str]:
    """Yield a line for each setting of positions in `shape` that differs from what the weights of `ref` know."""
    for name in POSITIONS:
        ours, theirs = getattr(shape, name), getattr(stored, name)
        if ours != theirs:
            unknown = name == "max_seq_len" and ours > theirs
            meaning = f"; positions from {theirs} on are new to the model" if unknown else ""
            yield f"{name} is {ours}, and {theirs} in {printable(ref)}{meaning}"


def check_initial_weights(model: LlamaConfig, config: TrainConfig, tokenizer: Tokenizer, data: str) -> None:
    """Raise ValueError unless a run of `model` on `data`, with their `tokenizer`, can begin with `config.init_from`.

    The shapes must be the same, and so must be the ids that tokens have. With `config.resize_vocab` both may have more
    tokens at the end.
    """
    ref = str(config.init_from)
    stored = load_shape(ref)
    _check_shape(model, stored, ref)
    if model.vocab_size < stored.vocab_size or (
        model.vocab_size > stored.vocab_size and not config.resize_vocab
    ):
        raise ValueError(
            f"vocab_size is {model.vocab_size}; it must be {stored.vocab_size} as in {printable(ref)}; leave it out, "
            "or let the vocabulary grow with --resize_vocab"
        )
    known = load_tokenizer(ref)
    if known is not None and (difference := first_difference(known, tokenizer)):
        raise ValueError(
            f"{data} was made with another tokenizer than that of {printable(ref)} ({difference}); prepare the data "
            f"with --tokenizer {printable(ref)}"
        )


@torch.no_grad()
def read_initial_weights(model: Llama, ref: str) -> None:
    """Fill `model`, which may be sharded, with the weights of `ref`; see `fill`. Every worker must call it."""
    with ExitStack() as stack:
        stored = with_vocabulary(open_pretrained(ref, stack), model.config.vocab_size)
        fill(((hf_name(name), parameter) for name, parameter in plain_parameters(model)), stored)


@torch.no_grad()
def fill(parameters: Iterable[tuple[str, Tensor]], stored: StoredModel) -> None:
    """Copy the tensors of `stored` into `parameters`, by their Hugging Face names, one after the other.

    Of a sharded one only this worker's part is read. The values are cast to the dtype that a parameter has.
    """
    for name, parameter in parameters:
        tensor = stored.tensors[name]
        if not isinstance(parameter, DTensor):
            parameter.copy_(tensor.read())
            continue
        local = parameter.to_local()
        # With fewer rows than workers, the last workers hold none.
        if local.numel():
            starts = shard_offsets(parameter)
            local.copy_(tensor.read(tuple(slice(a, a + n) for a, n in zip(starts, local.shape, strict=True))))


def _check_shape(shape: LlamaConfig, stored: LlamaConfig, ref: str) -> None:
    """Raise ValueError for the first field that differs, but for positions and the size of the vocabulary."""
    for name in (field.name for field in fields(LlamaConfig)):
        ours, theirs = getattr(shape, name), getattr(stored, name)
        if ours != theirs and name not in (*POSITIONS, "vocab_size"):
            raise ValueError(
                f"{name} is {ours}; it must be {theirs} as in {printable(ref)}; leave it out, since the shape comes "
                "with the weights, or begin with others"
            )
