"""Attention over blocks of keys and values, for any mix of prompt chunks and decoding sequences in one launch.

A program computes a tile: adjacent queries of one sequence, with all query heads of one key-value head, so that each
loaded key serves them all. It goes through the keys in order of position, always in the same steps, with a running
maximum and sum in fp32 (Milakov and Gimelshein 2018, arXiv:1805.02867).

A few decoding sequences alone would leave most processors idle, so several programs share a long context
(flash-decoding, Dao et al. 2023): each attends to an equal part, and the one that finishes last joins the parts, always
in the same order. Without this split, and for tiles of one shape, the result of a query depends on its sequence alone:
neither on the other sequences nor on how its prompt was cut into chunks.

torch's varlen_attn reads pages too, but its FlashAttention-2 requires pages of a multiple of 256 tokens, which is too
coarse for a prefix cache.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from llama_ray.generation.backends.cuda.attention_kernels import attend_kernel, decode_kernel
from llama_ray.generation.backends.cuda.tiles import MOST_SPLITS, ROWS, AttentionTile

_LOG2_E = 1.4426950408889634
"""Scales scores so that exp2 computes the softmax."""
_JOINED = 8192
"""Numbers that a program loads at a time when it joins the parts of a context."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    tile: AttentionTile,
    *,
    splits: int = 1,
    arrived: Tensor | None = None,
) -> Tensor:
    """Attend with each query of a step to the context up to its own position; return [tokens, heads, head_dim].

    `query` is [tokens, heads, head_dim], contiguous in its last dimension; `keys` and `values` of one layer are
    [blocks, block_size, kv_heads, head_dim]; the others are as in `StepBatch`. If each sequence has one query, up to
    MOST_SPLITS programs can share its context: `splits`. They count in `arrived`, int32 with at least sequences *
    kv_heads zeros, and leave zeros. In tiles of 16 rows without splits, a prompt token's result is the same as if it
    had been decoded.
    """
    tokens, heads, dim = query.shape
    _, block_size, kv_heads, _ = keys.shape
    sequences = len(context_len)
    group = heads // kv_heads
    out = torch.empty(tokens, heads, dim, dtype=query.dtype, device=query.device)
    strides = (
        block_table.stride(0),
        out.stride(0),
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
    )
    scale = dim**-0.5 * _LOG2_E
    rows = max(tile.rows, triton.next_power_of_2(group))
    dim_padded = max(16, triton.next_power_of_2(dim))
    shape = {
        "GROUP": group,
        "DIM": dim,
        "DIM_PADDED": dim_padded,
        "BLOCK_SIZE": block_size,
        "ROWS": rows,
        "KEYS": tile.keys,
        "PRECISION": "ieee" if query.dtype is torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    # Each sequence has at least one query.
    if tokens > sequences:
        tiles = tokens // (rows // group) + sequences
        arguments = (
            out,
            query,
            keys,
            values,
            query_start,
            context_len,
            block_table,
            sequences,
            *strides,
            scale,
        )
        attend_kernel[(tiles, kv_heads)](*arguments, UNMASKED=tile.rows > ROWS, **shape)
        return out
    sums, largest, total = (
        _parts(sequences * heads * splits, dim, query.device) if splits > 1 else (None,) * 3
    )
    group_padded = triton.next_power_of_2(group)
    decode_kernel[(sequences, kv_heads, splits)](
        out,
        query,
        keys,
        values,
        context_len,
        block_table,
        sums,
        largest,
        total,
        arrived if splits > 1 else None,
        splits,
        *strides,
        scale,
        GROUP_PADDED=group_padded,
        SPLIT=splits > 1,
        MOST_PARTS=MOST_SPLITS,
        TOGETHER=max(1, min(MOST_SPLITS, _JOINED // (group_padded * dim_padded))),
        **shape,
    )
    return out


def _parts(number: int, dim: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return memory for a query head's sums, maximum and total over each of `number` parts."""
    sums, marks = torch.empty(number, dim, device=device), torch.empty(2, number, device=device)
    return sums, *marks
