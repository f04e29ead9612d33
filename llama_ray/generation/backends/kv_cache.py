"""The cache of keys and values in blocks, attention over it in plain torch, and the number of blocks to allocate."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.huge_pages import Arena
from llama_ray.model.attention.causal import Attend
from llama_ray.model.config import LlamaConfig
from llama_ray.utils.free_memory import free_memory
from llama_ray.utils.integers import ceil_div

GPU_MEMORY_SHARE = 0.9
"""Share of a GPU's memory that weights and cache take by default."""
CPU_CACHE_BYTES = 4 * 2**30
"""Default size of the cache on a CPU, unless `CPU_CACHE_SHARE` of the free memory is less."""
CPU_CACHE_SHARE = 0.5


class KVCache(Protocol):
    """The blocks of one model on one device. Block 0 is scratch space, which no sequence owns."""

    block_size: int

    def attend(self, batch: StepBatch) -> Attend:
        """Return the attention of one step: it writes keys and values to their slots, then attends to each context."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy the keys and values of a block in all layers."""


class TorchCache:
    """A cache in plain torch, for any device. Keys and values: [blocks, block_size, kv_heads, head_dim] per layer."""

    def __init__(
        self,
        config: LlamaConfig,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device | str,
        block_size: int,
    ) -> None:
        self.block_size = block_size
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        on_cpu = torch.device(device).type == "cpu"
        zeros = Arena().zeros if on_cpu else partial(torch.zeros, device=device)
        self.keys = [zeros(shape, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [zeros(shape, dtype=dtype) for _ in range(config.num_layers)]

    @staticmethod
    def block_bytes(config: LlamaConfig, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block, over all layers."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype.itemsize

    def attend(self, batch: StepBatch) -> Attend:
        """See `KVCache`. Steps with prompts attend one sequence at a time, decoding steps all sequences together."""
        spans = list(pairwise(batch.query_start.tolist()))
        contexts = batch.context_len.tolist()
        single = all(end - start == 1 for start, end in spans)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.keys[layer].flatten(0, 1)[batch.slots] = key[0].transpose(0, 1)
            self.values[layer].flatten(0, 1)[batch.slots] = value[0].transpose(0, 1)
            if single:
                return self._decode(layer, query, batch)
            out = torch.empty_like(query)
            for s, ((start, end), context) in enumerate(zip(spans, contexts, strict=True)):
                out[:, :, start:end] = self._extend(
                    layer, query[:, :, start:end], batch.block_table[s], context
                )
            return out

        return attend

    def copy_block(self, source: int, target: int) -> None:
        """See `KVCache`."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]

    def _extend(self, layer: int, query: Tensor, table: Tensor, context: int) -> Tensor:
        """Attend with the last queries [1, heads, n, head_dim] of one sequence that has `context` tokens."""
        blocks = table[: ceil_div(context, self.block_size)].long()
        keys, values = (
            t[blocks].flatten(0, 1)[:context].transpose(0, 1)[None]
            for t in (self.keys[layer], self.values[layer])
        )
        queries, grouped = query.shape[2], query.shape[1] != keys.shape[1]
        if queries == context:
            return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=grouped)
        mask = torch.ones(queries, context, dtype=torch.bool, device=query.device).tril(context - queries)
        return F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=grouped)

    def _decode(self, layer: int, query: Tensor, batch: StepBatch) -> Tensor:
        """Attend with one query of each sequence: [1, heads, sequences, head_dim]."""
        table = batch.block_table.long()
        keys, values = (t[table].flatten(1, 2) for t in (self.keys[layer], self.values[layer]))
        sequences, length, kv_heads, dim = keys.shape
        beyond = torch.arange(length, device=query.device) >= batch.context_len[:, None]
        # Values beyond the context may belong to another sequence, and 0 x NaN would be NaN.
        values = values.masked_fill(beyond[:, :, None, None], 0)
        q = query[0].transpose(0, 1).reshape(sequences, kv_heads, -1, dim)
        scores = (q @ keys.permute(0, 2, 3, 1)).float() * dim**-0.5
        weights = scores.masked_fill(beyond[:, None, None], -math.inf).softmax(-1).to(q.dtype)
        out: Tensor = weights @ values.transpose(1, 2)
        return out.view(sequences, -1, dim).transpose(0, 1)[None]


def count_blocks(
    bytes_per_block: int,
    block_size: int,
    max_num_seqs: int,
    max_seq_len: int,
    device: torch.device,
    memory_bytes: int | None,
    processes: int = 1,
) -> int:
    """Return the number of blocks to allocate, including the scratch block.

    By default (`memory_bytes` None) the cache takes the free part of 90% of a GPU's memory; on a CPU 4 GiB, but at most
    half of the free memory. It is never larger than `max_num_seqs` sequences of `max_seq_len` tokens can fill. On a
    CPU, `processes` processes allocate as much each and share the free memory. Raises ValueError if one such sequence
    does not fit.
    """
    per_sequence = ceil_div(max_seq_len, block_size)
    free = free_bytes(device) // (processes if device.type == "cpu" else 1)
    if memory_bytes is not None:
        room = memory_bytes
        if room > free:
            raise ValueError(
                f"kv_cache_memory_bytes is {_gib(room)}; {_gib(free)} of memory are free on {device}; lower it"
            )
    elif device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        room = free - int((1 - GPU_MEMORY_SHARE) * total)
    else:
        room = min(CPU_CACHE_BYTES, int(CPU_CACHE_SHARE * free))
    blocks = min(room // bytes_per_block, 1 + max_num_seqs * per_sequence)
    if blocks < 1 + per_sequence:
        needed = (1 + per_sequence) * bytes_per_block
        raise ValueError(
            f"max_seq_len is {max_seq_len}; such a sequence takes {_gib(needed)} of KV cache, and there is memory "
            f"for {_gib(max(room, 0))}; lower max_seq_len"
            + ("" if memory_bytes is None else ", or raise kv_cache_memory_bytes")
        )
    return blocks


def free_bytes(device: torch.device) -> int:
    """Return the free memory of `device`; on a CPU, at most what the limit of a container leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB"
