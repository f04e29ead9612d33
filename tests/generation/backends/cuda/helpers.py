"""Steps of scattered sequences, and both caches with the same contents."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the CPU build of torch comes without)")

from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.cuda.cache import PagedCache
from llama_ray.generation.backends.kv_cache import TorchCache
from llama_ray.model.config import LlamaConfig
from llama_ray.utils.integers import ceil_div

BLOCK_SIZE = 16


def make_config(heads: int = 4, kv_heads: int = 2, dim: int = 16) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8,
        hidden_size=heads * dim,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=8,
    )


def step(chunks: list[tuple[int, int]], device: torch.device, seed: int = 0) -> StepBatch:
    """Return a step of sequences whose blocks are scattered over 64; the table has one more column than needed."""
    generator = torch.Generator().manual_seed(seed)
    free = (torch.randperm(63, generator=generator) + 1).tolist()
    width = max(ceil_div(context, BLOCK_SIZE) for _, context in chunks) + 1
    table = torch.zeros(len(chunks), width, dtype=torch.int32)
    positions = [torch.arange(context - queries, context) for queries, context in chunks]
    slots = []
    for row, (_, context), at in zip(table, chunks, positions, strict=True):
        count = ceil_div(context, BLOCK_SIZE)
        row[:count] = torch.tensor([free.pop() for _ in range(count)])
        slots.append(row[at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE)
    starts = torch.tensor([0, *(queries for queries, _ in chunks)]).cumsum(0).int()
    batch = (torch.zeros(int(starts[-1]), dtype=torch.long), torch.cat(positions), torch.cat(slots), starts)
    contexts = torch.tensor([context for _, context in chunks], dtype=torch.int32)
    return StepBatch(
        *(t.to(device) for t in (*batch, contexts, table, torch.arange(len(chunks)))),
    )


def filled(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device, *, batch_invariant: bool = False
) -> tuple[PagedCache, TorchCache]:
    """Return both caches with the same random contents, NaN in blocks that no sequence of `step` has."""
    caches = (
        PagedCache(config, 66, dtype, device, BLOCK_SIZE, batch_invariant=batch_invariant),
        TorchCache(config, 66, dtype, device, BLOCK_SIZE),
    )
    generator = torch.Generator().manual_seed(1)
    for layer in range(config.num_layers):
        for name in ("keys", "values"):
            content = torch.randn(getattr(caches[1], name)[0].shape, generator=generator)
            content[0] = content[64:] = torch.nan
            for cache in caches:
                getattr(cache, name)[layer].copy_(content)
    return caches


def inputs(config: LlamaConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(1, heads, tokens, config.head_dim, generator=generator).to(device, dtype)
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    ]
