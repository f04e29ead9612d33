"""Matrix products with plain, int8 or int4 weights; on request with the same bits for any number of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from llama_ray.generation.backends.cuda.tiles import INVARIANT_ROWS, ProductTile, product_tile
from llama_ray.generation.backends.quantize import GROUP_SIZE, Quantization, quantize

_UNIT = 2 * GROUP_SIZE
"""Inputs of two groups, whose int4 values share GROUP_SIZE bytes: the first group is in the low halves."""


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    out,
    x,
    weight,
    scales,
    rows,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    BITS: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Weights are the left factor: tensor cores need 16 rows of it, but only 8 columns of the right factor.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * OUT + tl.arange(0, OUT)
    x_rows = x + tl.minimum(row, rows - 1).to(tl.int64)[None, :] * x_stride
    known = tl.minimum(channel, outputs - 1)
    weights = weight + known.to(tl.int64)[:, None] * weight_stride
    sums = tl.zeros([OUT, ROWS], tl.float32)
    if BITS == 4:
        HALF: tl.constexpr = STEP // 2
        k = tl.arange(0, HALF)
        for start in range(0, inputs, STEP):
            packed = tl.load(weights + (start // 2 + k)[None, :])
            if EVEN:
                first = tl.load(x_rows + (start + k)[:, None])
                second = tl.load(x_rows + (start + HALF + k)[:, None])
            else:
                first = tl.load(x_rows + (start + k)[:, None], mask=(start + k < inputs)[:, None], other=0.0)
                at = start + HALF + k
                second = tl.load(x_rows + at[:, None], mask=(at < inputs)[:, None], other=0.0)
            group = scales + (start // HALF) * outputs + known
            low = ((packed & 15).to(tl.int8) - 8).to(first.dtype)
            high = ((packed >> 4).to(tl.int8) - 8).to(first.dtype)
            product = tl.dot(low, first, input_precision=PRECISION)
            sums += product * tl.load(group).to(tl.float32)[:, None]
            product = tl.dot(high, second, input_precision=PRECISION)
            sums += product * tl.load(group + outputs).to(tl.float32)[:, None]
    else:
        k = tl.arange(0, STEP)
        for start in range(0, inputs, STEP):
            if EVEN:
                w = tl.load(weights + (start + k)[None, :])
                part = tl.load(x_rows + (start + k)[:, None])
            else:
                exists = start + k < inputs
                w = tl.load(weights + (start + k)[None, :], mask=exists[None, :], other=0)
                part = tl.load(x_rows + (start + k)[:, None], mask=exists[:, None], other=0.0)
            sums = tl.dot(w.to(part.dtype), part, sums, input_precision=PRECISION)
        if BITS == 8:
            sums *= tl.load(scales + known)[:, None]
    tl.store(
        out + row.to(tl.int64)[None, :] * outputs + channel[:, None],
        sums.to(out.dtype.element_ty),
        mask=(row < rows)[None, :] & (channel < outputs)[:, None],
    )


def multiply(x: Tensor, weight: Tensor, scales: Tensor | None, tile: ProductTile) -> Tensor:
    """Return `x` [rows, inputs] @ weight.T [rows, outputs], rounded once from fp32 sums.

    `weight` is [outputs, inputs] in the dtype of x; int8 with `scales` fp32 [outputs]; or uint8 from `pack` with
    `scales` [groups, outputs]. Inputs are summed in an order that depends on the tile alone, so for one tile a row's
    result does not depend on the other rows.
    """
    rows, inputs = x.shape
    outputs = len(weight)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    _multiply[(triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs))](
        out,
        x,
        weight,
        scales,
        rows,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        BITS={torch.int8: 8, torch.uint8: 4}.get(weight.dtype, 16),
        OUT=tile.outputs,
        ROWS=tile.rows,
        STEP=tile.step,
        EVEN=inputs % tile.step == 0,
        PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def pack(values: Tensor) -> Tensor:
    """Pack int4 values, int8 [outputs, inputs], in uint8 [outputs, inputs / 2]; pad inputs to a multiple of 128.

    Each 64 bytes hold 128 inputs of a channel, 8 added to each: input i is in the low half of byte i, input 64 + i in
    the high half.
    """
    padded = F.pad(values, (0, -values.shape[1] % _UNIT)) + 8
    low, high = padded.to(torch.uint8).unflatten(1, (-1, 2, GROUP_SIZE)).unbind(2)
    return torch.bitwise_or(low, high << 4).flatten(1)


class Product(nn.Module):
    """x @ weight.T, in place of a Linear without bias, or of several that are joined by their outputs."""

    def __init__(self, weight: Tensor, quantization: Quantization | None, batch_invariant: bool) -> None:
        super().__init__()
        self.batch_invariant = batch_invariant
        scales: Tensor | None = None
        if quantization is not None:
            rounded = quantize(weight, quantization)
            if quantization == "int8":
                weight, scales = rounded.values, rounded.scales.squeeze(1)
            else:
                weight, scales = (
                    pack(rounded.values),
                    F.pad(rounded.scales.T, (0, 0, 0, len(rounded.scales.T) % 2)),
                )
            scales = nn.Parameter(scales.contiguous(), requires_grad=False)
        self.scales = scales
        # An existing parameter is kept, because a tied head shares it with the embedding.
        is_parameter = isinstance(weight, nn.Parameter)
        self.weight = weight if is_parameter else nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if self.scales is None and not self.batch_invariant:
            return F.linear(x, self.weight)
        rows = x.reshape(-1, x.shape[-1])
        tile = product_tile(self.weight, INVARIANT_ROWS if self.batch_invariant else len(rows), x.dtype)
        return multiply(rows, self.weight, self.scales, tile).view(*x.shape[:-1], -1)
