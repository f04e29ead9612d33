"""The operations between matrix products, one pass over memory each: norm, rotation and write to the cache, SwiGLU.

A program works on one row or a part of it, so results do not depend on the number of rows. Compiling the blocks with
inductor would fuse a little more (the residual sums), but takes a minute before the first token and may reduce in
another order for other numbers of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 1024
"""Values that one program of `_swiglu` computes."""


@triton.jit
def _rms_norm(out, x, weight, x_stride, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    valid = at < SIZE
    value = tl.load(x + row * x_stride + at, mask=valid, other=0.0)
    h = value.to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, 0) / SIZE + eps)
    # The norm is rounded before it is multiplied by the weight, as in `RMSNorm`.
    h = h.to(value.dtype) * tl.load(weight + at, mask=valid, other=0.0)
    tl.store(out + row * SIZE + at, h, mask=valid)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm of rows [..., size], contiguous in the last dimension; sums are fp32."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    padded = triton.next_power_of_2(size)
    _rms_norm[(len(rows),)](
        out, rows, weight, rows.stride(0), eps, SIZE=size, PADDED=padded, num_warps=8 if padded > 2048 else 4
    )
    return out.view(x.shape)


@triton.jit
def _rotate_and_store(
    query,
    keys,
    values,
    qkv,
    cos,
    sin,
    slots,
    qkv_stride,
    slot_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    at = tl.arange(0, HALF_PADDED)
    valid = at < HALF
    source = qkv + token * qkv_stride + head * DIM
    a = tl.load(source + at, mask=valid)
    b = tl.load(source + HALF + at, mask=valid)
    slot = tl.load(slots + token)
    if head >= HEADS + KV_HEADS:
        target = values + slot * slot_stride + (head - HEADS - KV_HEADS) * DIM
        tl.store(target + at, a, mask=valid)
        tl.store(target + HALF + at, b, mask=valid)
    else:
        c = tl.load(cos + token * HALF + at, mask=valid)
        s = tl.load(sin + token * HALF + at, mask=valid)
        first = (a.to(tl.float32) * c - b.to(tl.float32) * s).to(a.dtype)
        second = (b.to(tl.float32) * c + a.to(tl.float32) * s).to(a.dtype)
        if head < HEADS:
            target = query + token * (HEADS * DIM) + head * DIM
        else:
            target = keys + slot * slot_stride + (head - HEADS) * DIM
        tl.store(target + at, first, mask=valid)
        tl.store(target + HALF + at, second, mask=valid)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Rotate queries and keys by their positions' angles; write keys and values to their slots of the cache.

    `qkv` is [tokens, (heads + 2 kv_heads) * head_dim], `cos` and `sin` are fp32 [tokens, head_dim / 2], `slots` are
    int64 [tokens]; `keys` and `values` of one layer are contiguous [blocks, block_size, kv_heads, head_dim]. Returns
    the queries [tokens, heads, head_dim].
    """
    tokens, width = qkv.shape
    kv_heads, dim = keys.shape[2:]
    heads = width // dim - 2 * kv_heads
    query = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    _rotate_and_store[(tokens, heads + 2 * kv_heads)](
        query,
        keys,
        values,
        qkv,
        cos,
        sin,
        slots,
        qkv.stride(0),
        keys.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        HALF_PADDED=triton.next_power_of_2(dim // 2),
        num_warps=1,
    )
    return query


@triton.jit
def _swiglu(out, gate_up, SIZE: tl.constexpr, ELEMENTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    valid = at < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + at, mask=valid, other=0.0)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + at, mask=valid, other=0.0)
    g = gate.to(tl.float32)
    tl.store(out + row * SIZE + at, (g / (1.0 + tl.exp(-g))).to(gate.dtype) * up, mask=valid)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [..., size] of contiguous rows [..., 2 * size]: a gate, then an up projection."""
    size = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    grid = (gate_up.numel() // (2 * size), triton.cdiv(size, _ELEMENTS))
    _swiglu[grid](out, gate_up, SIZE=size, ELEMENTS=_ELEMENTS, num_warps=4)
    return out
