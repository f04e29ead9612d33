"""The paged cache of a CUDA device."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.cuda.attention import attend
from llama_ray.generation.backends.cuda.elementwise import rotate_and_store
from llama_ray.generation.backends.cuda.tiles import (
    PROGRAMS_PER_PROCESSOR,
    decode_tile,
    processors,
    prompt_tile,
    splits,
)
from llama_ray.model.config import LlamaConfig


class PagedCache:
    """A `KVCache` for Triton kernels. Keys and values: [blocks, block_size, kv_heads, head_dim] per layer.

    A step never waits for the device, so it can be captured in a CUDA graph. With `batch_invariant` prompt tokens are
    computed in the same tiles as decoded ones, which reads more memory, and each context by one program, which leaves
    most processors idle where a few sequences with long contexts are decoded.
    """

    def __init__(
        self,
        config: LlamaConfig,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device | str,
        block_size: int,
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.block_size = block_size
        self.decode_tile = decode_tile(config.head_dim, dtype)
        self.prompt_tile = self.decode_tile if batch_invariant else prompt_tile(config.head_dim, dtype)
        self.processors = processors(torch.device(device))
        self.arrived: Tensor | None = None
        if not batch_invariant:
            programs = PROGRAMS_PER_PROCESSOR * self.processors
            self.arrived = torch.zeros(programs, dtype=torch.int32, device=device)
        shape = (2, config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self._blocks = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = self._blocks.unbind(0)

    def attend(self, batch: StepBatch) -> PagedAttend:
        """See `KVCache`."""
        return PagedAttend(self, batch)

    def copy_block(self, source: int, target: int) -> None:
        """See `KVCache`."""
        self._blocks[:, :, target] = self._blocks[:, :, source]


class PagedAttend:
    """Attention for one step: of what `Attend` takes, or of joined projections that are not rotated yet."""

    def __init__(self, cache: PagedCache, batch: StepBatch) -> None:
        self._cache, self._batch = cache, batch

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attend`; the batch size is 1."""
        cache, slots = self._cache, self._batch.slots
        cache.keys[layer].flatten(0, 1)[slots] = key[0].transpose(0, 1)
        cache.values[layer].flatten(0, 1)[slots] = value[0].transpose(0, 1)
        return self._attend(layer, query[0].transpose(0, 1)).transpose(0, 1)[None]

    def projected(self, layer: int, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate, write to the cache and attend, given joined queries, keys and values.

        `qkv` is [tokens, (heads + 2 kv_heads) * head_dim], not rotated yet. Returns [tokens, heads, head_dim].
        """
        cache = self._cache
        query = rotate_and_store(qkv, *rope, self._batch.slots, cache.keys[layer], cache.values[layer])
        return self._attend(layer, query)

    def _attend(self, layer: int, query: Tensor) -> Tensor:
        cache, batch = self._cache, self._batch
        sequences, width = batch.block_table.shape
        decode = len(query) == sequences
        parts = 1
        if decode and cache.arrived is not None:
            # The width of the table, not the contexts, because a graph is recorded once for all contexts.
            parts = splits(sequences * cache.keys.shape[3], width * cache.block_size, cache.processors)
        return attend(
            query,
            cache.keys[layer],
            cache.values[layer],
            batch.query_start,
            batch.context_len,
            batch.block_table,
            cache.decode_tile if decode else cache.prompt_tile,
            splits=parts,
            arrived=cache.arrived,
        )
