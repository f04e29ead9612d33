"""What happens between matrix products, a pass over memory each: norm, rotation with the write to the cache, SwiGLU.

Programs work on a row or a part of one, and never look at another: results don't depend on how many rows there are.
Compiling the blocks with inductor would fuse a little more (the residual sums), but takes a minute before the first
token and may reduce differently for other numbers of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 1024


@triton.jit
def _rms_norm(out, x, weight, x_stride, eps, SIZE: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    there = at < SIZE
    value = tl.load(x + row * x_stride + at, mask=there, other=0.0)
    h = value.to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, 0) / SIZE + eps)
    # Rounded before the product with the weight, as the model does.
    h = h.to(value.dtype) * tl.load(weight + at, mask=there, other=0.0)
    tl.store(out + row * SIZE + at, h, mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows [..., size], contiguous in the last dimension; sums in fp32."""
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
    there = at < HALF
    source = qkv + token * qkv_stride + head * DIM
    a = tl.load(source + at, mask=there)
    b = tl.load(source + HALF + at, mask=there)
    slot = tl.load(slots + token)
    if head >= HEADS + KV_HEADS:
        target = values + slot * slot_stride + (head - HEADS - KV_HEADS) * DIM
        tl.store(target + at, a, mask=there)
        tl.store(target + HALF + at, b, mask=there)
    else:
        c = tl.load(cos + token * HALF + at, mask=there)
        s = tl.load(sin + token * HALF + at, mask=there)
        first = (a.to(tl.float32) * c - b.to(tl.float32) * s).to(a.dtype)
        second = (b.to(tl.float32) * c + a.to(tl.float32) * s).to(a.dtype)
        if head < HEADS:
            target = query + token * (HEADS * DIM) + head * DIM
        else:
            target = keys + slot * slot_stride + (head - HEADS) * DIM
        tl.store(target + at, first, mask=there)
        tl.store(target + HALF + at, second, mask=there)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Turn queries and keys by their positions' angles; keys and values go to their slots of the cache.

    `qkv` [tokens, (heads + 2 kv_heads) * head_dim], `cos` and `sin` fp32 [tokens, head_dim / 2], `slots` int64
    [tokens], `keys` and `values` of a layer, contiguous [blocks, block_size, kv_heads, head_dim]. Returns the queries
    [tokens, heads, head_dim].
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
    there = at < SIZE
    gate = tl.load(gate_up + row * (2 * SIZE) + at, mask=there, other=0.0)
    up = tl.load(gate_up + row * (2 * SIZE) + SIZE + at, mask=there, other=0.0)
    g = gate.to(tl.float32)
    tl.store(out + row * SIZE + at, (g / (1.0 + tl.exp(-g))).to(gate.dtype) * up, mask=there)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of rows [..., 2 * size], contiguous -> [..., size]."""
    size = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    grid = (gate_up.numel() // (2 * size), triton.cdiv(size, _ELEMENTS))
    _swiglu[grid](out, gate_up, SIZE=size, ELEMENTS=_ELEMENTS, num_warps=4)
    return out
