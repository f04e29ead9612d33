"""Products of one row, as one request decodes: they read the weight once and do nothing else but wait for it.

Between them nothing is launched: the norm before a product, silu(gate) * up after it and the residual sum are part of
it. Each would be a launch that takes as long as reading several megabytes. A program multiplies a few outputs without
tensor cores, whose tiles have at least eight rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_ray.generation.backends.cuda.product import Product


class RowTile(NamedTuple):
    """Launch parameters: outputs of a program, inputs that it loads at a time, and its warps."""

    outputs: int = 4
    step: int = 1024
    warps: int = 4


@triton.jit
def _widened(w, FAST: tl.constexpr):
    """Return int8 numbers as fp32."""
    if FAST:
        # 0x4B000000 + n is 2^23 + n in fp32. A conversion would take four times as long as these bit operations.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 unsigned;
            xor.b32 unsigned, $4, 0x80808080;
            prmt.b32 $0, unsigned, 0x4B000000, 0x7440;
            prmt.b32 $1, unsigned, 0x4B000000, 0x7441;
            prmt.b32 $2, unsigned, 0x4B000000, 0x7442;
            prmt.b32 $3, unsigned, 0x4B000000, 0x7443;
            add.f32 $0, $0, 0fCB000080;
            add.f32 $1, $1, 0fCB000080;
            add.f32 $2, $2, 0fCB000080;
            add.f32 $3, $3, 0fCB000080;
            }
            """,
            "=f,=f,=f,=f,r",
            [w],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return w.to(tl.float32)


@triton.jit
def _multiply_row(
    out,
    x,
    weight,
    scales,
    norm_weight,
    residual,
    eps,
    outputs,
    inputs,
    OUT: tl.constexpr,
    STEP: tl.constexpr,
    QUANTIZED: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FAST: tl.constexpr,
):
    channel = tl.program_id(0) * OUT + tl.arange(0, OUT)
    known = tl.minimum(channel, outputs - 1)
    k = tl.arange(0, STEP)
    factor = 1.0
    if NORM:
        # Each program computes it for itself, from the cache: x is small, and a launch is not.
        squares = tl.zeros([STEP], tl.float32)
        for start in range(0, inputs, STEP):
            part = tl.load(x + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
            squares += part * part
        factor = tl.rsqrt(tl.sum(squares, 0) / inputs + eps)
    rows = weight + known.to(tl.int64)[:, None] * inputs
    up_rows = rows + outputs.to(tl.int64) * inputs
    sums = tl.zeros([OUT, STEP], tl.float32)
    up_sums = tl.zeros([OUT, STEP], tl.float32)
    for start in range(0, inputs, STEP):
        at = start + k
        exists = at < inputs
        value = tl.load(x + at, mask=exists, other=0.0)
        if NORM:
            # Rounded before it is multiplied by the weight, as in `RMSNorm`.
            value = (value.to(tl.float32) * factor).to(value.dtype) * tl.load(
                norm_weight + at, mask=exists, other=0.0
            )
        wide = value.to(tl.float32)[None, :]
        w = tl.load(rows + at[None, :], mask=exists[None, :], other=0, eviction_policy="evict_first")
        sums += _widened(w, FAST) * wide
        if GATED:
            u = tl.load(up_rows + at[None, :], mask=exists[None, :], other=0, eviction_policy="evict_first")
            up_sums += _widened(u, FAST) * wide
    kind = out.dtype.element_ty
    total = tl.sum(sums, 1)
    if QUANTIZED:
        total *= tl.load(scales + known)
    result = total.to(kind)
    if GATED:
        up = tl.sum(up_sums, 1)
        if QUANTIZED:
            up *= tl.load(scales + outputs + known)
        gate = result.to(tl.float32)
        result = (gate / (1.0 + tl.exp(-gate))).to(kind) * up.to(kind)
    if RESIDUAL:
        result = tl.load(residual + known) + result
    tl.store(out + channel, result, mask=channel < outputs)


def multiply_row(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    tile: RowTile | None = None,
) -> Tensor:
    """Return `x` [1, inputs] @ weight.T [1, outputs].

    `weight` is contiguous [outputs, inputs], in the dtype of x, or int8 with `scales` fp32 [outputs]. `norm`, the
    weight and epsilon of an RMSNorm, is applied to x first. `gated` weights hold gate, then up projections; the result
    is silu(gate) * up [1, outputs / 2]. `residual` [1, outputs] is added. Each operation rounds as it does alone.
    """
    tile = tile or row_tile(weight, gated)
    inputs = x.shape[-1]
    outputs = len(weight) // 2 if gated else len(weight)
    out = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    norm_weight, eps = norm or (None, 0.0)
    _multiply_row[(triton.cdiv(outputs, tile.outputs),)](
        out,
        x,
        weight,
        scales,
        norm_weight,
        residual,
        eps,
        outputs,
        inputs,
        OUT=tile.outputs,
        STEP=tile.step,
        QUANTIZED=scales is not None,
        NORM=norm is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        # Triton's interpreter knows no instructions of a GPU.
        FAST=weight.dtype is torch.int8 and x.device.type != "cpu",
        num_warps=tile.warps,
    )
    return out


def row_tile(weight: Tensor, gated: bool) -> RowTile:
    """Return the tile for a weight of `multiply_row`."""
    # Few bytes an output: more of them, so that as many bytes are on their way.
    outputs = 4 if weight.dtype is torch.int8 else 2
    return RowTile(outputs // 2 if gated else outputs, 1024, 4)


class RowProduct(Product):
    """A product that a single row goes through in a way of its own, with what comes before and after it.

    int4 weights and batch-invariant products treat one row as any other.
    """

    def takes_one_row(self, x: Tensor) -> bool:
        """Whether `row` serves x [..., inputs]."""
        return x.shape[:-1].numel() == 1 and not self.batch_invariant and self.weight.dtype is not torch.uint8

    def row(
        self,
        x: Tensor,
        norm: tuple[Tensor, float] | None = None,
        residual: Tensor | None = None,
        *,
        gated: bool = False,
    ) -> Tensor:
        """[1, inputs] -> [1, outputs]; see `multiply_row`."""
        return multiply_row(x, self.weight, self.scales, norm=norm, gated=gated, residual=residual)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return `residual` [..., outputs] plus the product of x [..., inputs]; `residual` may be overwritten."""
        if self.scales is not None or self.batch_invariant:
            total: Tensor = residual + self(x)
            return total
        rows = residual.view(-1, residual.shape[-1])
        rows.addmm_(x.reshape(-1, x.shape[-1]), self.weight.t())
        return residual

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if self.takes_one_row(x):
            return self.row(x.reshape(1, -1)).view(*x.shape[:-1], -1)
        return super().forward(x)
