"""The Triton kernels of `attend`: one for tiles of prompts, one for a query of each sequence."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend_to(
    q,
    position,
    largest,
    total,
    sums,
    begin,
    end,
    table,
    keys,
    values,
    block_stride,
    slot_stride,
    scale,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add keys `begin` to `end` - 1 to the running maxima, totals and sums of `q`.

    `begin` is a multiple of KEYS. Without MASKED `end` is one too, and all rows see all of the keys.
    """
    d = tl.arange(0, DIM_PADDED)
    key = tl.arange(0, KEYS)
    block = tl.load(table + (begin + key) // BLOCK_SIZE, mask=begin + key < end, other=0)
    for first in range(begin, end, KEYS):
        at = first + key
        offset = block.to(tl.int64) * block_stride + (at % BLOCK_SIZE) * slot_stride
        mask = (d < DIM)[None, :]
        if MASKED:
            # Positions beyond the end may belong to another sequence; load zeros there, because 0 x NaN would be NaN.
            mask = mask & (at < end)[:, None]
        k = tl.load(keys + offset[:, None] + d[None, :], mask=mask, other=0.0)
        v = tl.load(values + offset[:, None] + d[None, :], mask=mask, other=0.0)
        # The blocks of the next step are known before its keys are asked for.
        block = tl.load(table + (at + KEYS) // BLOCK_SIZE, mask=at + KEYS < end, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            scores = tl.where(at[None, :] <= position[:, None], scores, float("-inf"))
        # Every row sees the first key that it is given, so the maximum is finite from the first step on.
        above = tl.maximum(largest, tl.max(scores, 1) * scale)
        shrink = tl.exp2(largest - above)
        weights = tl.exp2(scores * scale - above[:, None])
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(v.dtype), v, sums, input_precision=PRECISION)
        largest = above
    return largest, total, sums


@triton.jit
def _join(
    out,
    part_sums,
    part_largest,
    part_total,
    parts,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Write the result of a sequence's query heads [GROUP, DIM], given `parts` parts of its context."""
    row = tl.arange(0, GROUP_PADDED)
    d = tl.arange(0, DIM_PADDED)
    # Other processors wrote the parts: read them from the L2 cache, which all share.
    all_parts = tl.arange(0, MOST_PARTS)
    at_all = all_parts[:, None] * GROUP + row[None, :]
    exist = (all_parts < parts)[:, None] & (row < GROUP)[None, :]
    all_largest = tl.load(part_largest + at_all, mask=exist, other=float("-inf"), cache_modifier=".cg")
    largest = tl.where(row < GROUP, tl.max(all_largest, 0), 0.0)
    all_totals = tl.load(part_total + at_all, mask=exist, other=0.0, cache_modifier=".cg")
    total = tl.sum(all_totals * tl.exp2(all_largest - largest[None, :]), 0)
    sums = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    for first in range(0, parts, TOGETHER):
        part = first + tl.arange(0, TOGETHER)
        at = part[:, None] * GROUP + row[None, :]
        known = (part < parts)[:, None] & (row < GROUP)[None, :]
        maxima = tl.load(part_largest + at, mask=known, other=float("-inf"), cache_modifier=".cg")
        some = tl.load(
            part_sums + (at * DIM)[:, :, None] + d[None, None, :],
            mask=known[:, :, None] & (d < DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        sums += tl.sum(some * tl.exp2(maxima - largest[None, :])[:, :, None], 0)
    sums = sums / tl.where(row < GROUP, total, 1.0)[:, None]
    tl.store(
        out + (row * DIM)[:, None] + d[None, :],
        sums.to(out.dtype.element_ty),
        mask=(row < GROUP)[:, None] & (d < DIM)[None, :],
    )


_UNALIGNED = ["query_start", "context_len", "block_table", "part_largest", "part_total"]
"""Arguments that may be parts of tensors: their alignment makes no difference, so there is one kernel for any."""


@triton.jit(do_not_specialize=["splits", "table_stride"], do_not_specialize_on_alignment=_UNALIGNED)
def decode_kernel(
    out,
    query,
    keys,
    values,
    context_len,
    block_table,
    part_sums,
    part_largest,
    part_total,
    arrived,
    splits,
    table_stride,
    out_stride,
    query_stride_token,
    query_stride_head,
    block_stride,
    slot_stride,
    head_stride,
    scale,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one part of the context of one sequence, which has one query, for one key-value head."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_len + sequence)
    # The parts are equal multiples of KEYS, so a short context has fewer of them.
    length = tl.cdiv(tl.cdiv(context, splits), KEYS) * KEYS
    parts = tl.cdiv(context, length)
    if split >= parts:
        return

    row = tl.arange(0, ROWS)
    valid = row < GROUP
    head = kv_head * GROUP + row
    d = tl.arange(0, DIM_PADDED)
    token = sequence.to(tl.int64)
    q = tl.load(
        query + token * query_stride_token + (head * query_stride_head)[:, None] + d[None, :],
        mask=valid[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    largest, total, sums = _attend_to(
        q,
        tl.full([ROWS], 0, tl.int32) + (context - 1),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, DIM_PADDED], tl.float32),
        split * length,
        tl.minimum(context, (split + 1) * length),
        block_table + token * table_stride,
        keys + kv_head * head_stride,
        values + kv_head * head_stride,
        block_stride,
        slot_stride,
        scale,
        DIM,
        DIM_PADDED,
        BLOCK_SIZE,
        KEYS,
        True,
        PRECISION,
    )
    mask = valid[:, None] & (d < DIM)[None, :]
    if parts == 1:
        sums = sums / total[:, None]
        target = out + token * out_stride + (head * DIM)[:, None] + d[None, :]
        tl.store(target, sums.to(out.dtype.element_ty), mask=mask)
    elif SPLIT:
        unit = token * tl.num_programs(1) + kv_head
        at = (unit * splits + split) * GROUP + row
        tl.store(part_sums + (at * DIM)[:, None] + d[None, :], sums, mask=mask)
        tl.store(part_largest + at, largest, mask=valid)
        tl.store(part_total + at, total, mask=valid)
        # The barrier orders the stores of all threads before the addition, which orders them before what the program
        # that arrives last loads.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + unit, 1, sem="acq_rel")
        if before == parts - 1:
            tl.debug_barrier()
            # The next step counts from 0 again.
            tl.store(arrived + unit, 0)
            begin = unit * splits * GROUP
            _join(
                out + token * out_stride + kv_head * (GROUP * DIM),
                part_sums + begin * DIM,
                part_largest + begin,
                part_total + begin,
                parts,
                GROUP,
                GROUP_PADDED,
                DIM,
                DIM_PADDED,
                MOST_PARTS,
                TOGETHER,
            )


@triton.jit(do_not_specialize=["sequences", "table_stride"], do_not_specialize_on_alignment=_UNALIGNED)
def attend_kernel(
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
    UNMASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a tile of adjacent queries of one sequence for one key-value head."""
    # The last tiles of a prompt see most keys. They begin first, so that only short ones are left to wait for.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    QUERIES: tl.constexpr = ROWS // GROUP
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
    start = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - start
    first = (tile - start // QUERIES - sequence) * QUERIES
    if first >= length:
        return

    row = tl.arange(0, ROWS)
    local = first + row // GROUP
    valid = (row // GROUP < QUERIES) & (local < length)
    token = (start + local).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    d = tl.arange(0, DIM_PADDED)
    q = tl.load(
        query + token[:, None] * query_stride_token + (head * query_stride_head)[:, None] + d[None, :],
        mask=valid[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    context = tl.load(context_len + sequence)
    before = context - length + first
    position = context - length + local
    end = tl.minimum(context, before + QUERIES)
    # All rows see the keys up to the position of the first row.
    seen_by_all = (before + 1) // KEYS * KEYS if UNMASKED else 0
    table = block_table + sequence.to(tl.int64) * table_stride
    keys += kv_head * head_stride
    values += kv_head * head_stride

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    for masked in tl.static_range(0 if UNMASKED else 1, 2):
        largest, total, sums = _attend_to(
            q,
            position,
            largest,
            total,
            sums,
            seen_by_all if masked else 0,
            end if masked else seen_by_all,
            table,
            keys,
            values,
            block_stride,
            slot_stride,
            scale,
            DIM,
            DIM_PADDED,
            BLOCK_SIZE,
            KEYS,
            masked == 1,
            PRECISION,
        )
    sums = sums / total[:, None]
    tl.store(
        out + token[:, None] * out_stride + (head * DIM)[:, None] + d[None, :],
        sums.to(out.dtype.element_ty),
        mask=valid[:, None] & (d < DIM)[None, :],
    )
