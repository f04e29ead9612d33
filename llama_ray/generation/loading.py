"""Loads what an engine needs from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.prepare import prepare
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.parallel.sharded_model import ShardedModel
from llama_ray.generation.speculation.draft_model import DraftModel
from llama_ray.generation.speculation.prompt_lookup import PromptLookup
from llama_ray.generation.speculation.proposer import Proposer
from llama_ray.model.adapter_files import base_of, is_adapter
from llama_ray.model.end_of_text import stored_eos_ids
from llama_ray.pretrained import load_pretrained, load_shape, resolve


@dataclass(frozen=True)
class Loaded:
    """The arguments of `Engine` that a checkpoint and the options give."""

    backend: Backend
    tokenizer: Tokenizer | None
    proposer: Proposer | None
    eos_ids: list[int]
    files: Path
    sharded: ShardedModel | None


def load(
    ref: str | Path, dtype: torch.dtype | None, device: torch.device | str | None, options: EngineOptions
) -> Loaded:
    """See `Engine.from_pretrained`."""
    directory = resolve(ref)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    eos_ids = _stored_eos_ids(directory, load_shape(directory).vocab_size)
    proposer = _load_proposer(options, dtype, device)
    quantization, batch_invariant = options.quantization, options.batch_invariant
    if options.tensor_parallel == 1:
        model, tokenizer = load_pretrained(directory, dtype=dtype, device=device)
        backend = prepare(model, quantization, batch_invariant=batch_invariant)
        return Loaded(backend, tokenizer, proposer, eos_ids, directory, None)
    sharded = ShardedModel(directory, dtype, device, quantization, batch_invariant, options.tensor_parallel)
    return Loaded(sharded.backend, sharded.tokenizer, proposer, eos_ids, directory, sharded)


def _stored_eos_ids(directory: Path, vocab_size: int) -> list[int]:
    """Return `stored_eos_ids`; where an adapter names none, those of its base."""
    found = stored_eos_ids(directory, vocab_size)
    if found or not is_adapter(directory):
        return found
    return _stored_eos_ids(resolve(base_of(directory), weights=False), vocab_size)


def _load_proposer(
    options: EngineOptions, dtype: torch.dtype | None, device: torch.device | str
) -> Proposer | None:
    if options.draft_model is not None:
        draft, _ = load_pretrained(options.draft_model, dtype=dtype, device=device)
        return DraftModel(prepare(draft, options.quantization, batch_invariant=options.batch_invariant))
    return PromptLookup() if options.prompt_lookup else None
