"""Attention over blocks of keys and values, for any mix of prompt chunks and decoding sequences in one launch.

A program computes a tile: adjacent queries of one sequence, with all query heads of one key-value head, so that each
loaded key serves them all. It goes through the keys in order of position, always in the same steps, with a running
maximum and sum in fp32 (Milakov and Gimelshein 2018, arXiv:1805.02867). For tiles of one height, the result of a query
depends on its sequence alone: neither on the other sequences nor on how its prompt was cut into chunks.

torch's varlen_attn reads pages too, but its FlashAttention-2 requires pages of a multiple of 256 tokens, which is too
coarse for a prefix cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows (queries x heads of a group) of the smallest tile: the least that tensor cores compute."""
PROMPT_ROWS = 64
"""Rows of a tile in steps with prompts."""
KEYS = 32
"""Keys that a program loads at a time."""

_LOG2_E = 1.4426950408889634
"""Scales scores so that exp2 computes the softmax."""


@triton.jit(do_not_specialize=["sequences", "table_stride"])
def _attend(
    out,
    query,
    keys,
    values,
    query_start,
    context_len,
    block_table,
    sequences,
    table_stride,
    out_stride,
    query_stride_token,
    query_stride_head,
    block_stride,
    slot_stride,
    head_stride,
    scale,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DECODE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    QUERIES: tl.constexpr = ROWS // GROUP
    if DECODE:
        sequence = tile
        first = tile * 0
    else:
        # The tiles of sequence s begin at query_start[s] // QUERIES + s, which leaves at least as many as it needs; the
        # host need not know the number for each sequence. Search the last sequence that begins at or before this tile.
        low = tile * 0
        high = sequences - 1
        while low < high:
            middle = (low + high + 1) // 2
            begin = tl.load(query_start + middle) // QUERIES + middle
            if begin <= tile:
                low = middle
            else:
                high = middle - 1
        sequence = low
        first = (tile - tl.load(query_start + sequence) // QUERIES - sequence) * QUERIES
    start = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - start
    if first >= length:
        return

    row = tl.arange(0, ROWS)
    local = first + row // GROUP
    valid = (row // GROUP < QUERIES) & (local < length)
    token = (start + local).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    d = tl.arange(0, DIM_PADDED)
    q = tl.load(
        query + token[:, None] * query_stride_token + head[:, None] * query_stride_head + d[None, :],
        mask=valid[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    context = tl.load(context_len + sequence)
    position = context - length + local
    end = tl.minimum(context, context - length + first + QUERIES)
    table = block_table + sequence.to(tl.int64) * table_stride

    total = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    for begin in range(0, end, KEYS):
        at = begin + tl.arange(0, KEYS)
        exists = at < end
        block = tl.load(table + at // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        offset = block * block_stride + (at % BLOCK_SIZE) * slot_stride + kv_head * head_stride
        # Positions beyond the end may belong to another sequence; load zeros there, because 0 x NaN would be NaN.
        mask = exists[:, None] & (d < DIM)[None, :]
        k = tl.load(keys + offset[:, None] + d[None, :], mask=mask, other=0.0)
        v = tl.load(values + offset[:, None] + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(at[None, :] <= position[:, None], scores, float("-inf"))
        # Every query sees key 0, which is in the first step, so the maximum is finite from there on.
        above = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - above)
        weights = tl.exp2(scores - above[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = above
    sums = sums / total[:, None]
    tl.store(
        out + token[:, None] * out_stride + (head * DIM)[:, None] + d[None, :],
        sums.to(out.dtype.element_ty),
        mask=valid[:, None] & (d < DIM)[None, :],
    )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_table: Tensor,
    prompt_rows: int = PROMPT_ROWS,
) -> Tensor:
    """Attend with each query of a step to the context up to its own position; return [tokens, heads, head_dim].

    `query` is [tokens, heads, head_dim], contiguous in its last dimension; `keys` and `values` of one layer are
    [blocks, block_size, kv_heads, head_dim]; the others are as in `StepBatch`. `prompt_rows` is the number of rows of a
    tile in steps with prompts; with ROWS, a prompt token's result is the same as if it had been decoded.
    """
    tokens, heads, dim = query.shape
    _, block_size, kv_heads, _ = keys.shape
    sequences = len(context_len)
    group = heads // kv_heads
    # Each sequence has at least one query.
    decode = tokens == sequences
    rows = max(ROWS if decode else prompt_rows, triton.next_power_of_2(group))
    tiles = sequences if decode else tokens // (rows // group) + sequences
    out = torch.empty(tokens, heads, dim, dtype=query.dtype, device=query.device)
    _attend[(tiles, kv_heads)](
        out,
        query,
        keys,
        values,
        query_start,
        context_len,
        block_table,
        sequences,
        block_table.stride(0),
        out.stride(0),
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        dim**-0.5 * _LOG2_E,
        GROUP=group,
        DIM=dim,
        DIM_PADDED=max(16, triton.next_power_of_2(dim)),
        BLOCK_SIZE=block_size,
        ROWS=rows,
        KEYS=KEYS,
        DECODE=decode,
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32",
        num_warps=4,
        num_stages=3,
    )
    return out
