"""Matrix products with plain, int8 or int4 weights; on request with the same bits for any number of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from llama_ray.generation.backends.cuda.product_kernels import multiply_kernel, widen_kernel
from llama_ray.generation.backends.cuda.tiles import (
    SMALLEST_OUTPUTS,
    WIDEN_ROWS,
    ProductTile,
    invariant_tile,
    processors,
    product_tile,
)
from llama_ray.generation.backends.quantize import GROUP_SIZE, Quantization, quantize

_UNIT = 2 * GROUP_SIZE
"""Inputs of two groups, whose int4 values share GROUP_SIZE bytes: the first group is in the low halves."""
_WIDENED = 32
"""Outputs that a program of `widen` converts."""


def multiply(
    x: Tensor, weight: Tensor, scales: Tensor | None, tile: ProductTile, arrived: Tensor | None = None
) -> Tensor:
    """Return `x` [rows, inputs] @ weight.T [rows, outputs], rounded once from fp32 sums.

    `weight` is [outputs, inputs] in the dtype of x; int8 with `scales` fp32 [outputs]; or uint8 from `pack` with
    `scales` [groups, outputs]. Inputs are summed in an order that depends on the tile alone, so for one tile a row's
    result does not depend on the other rows. If the tile is split, its programs count in `arrived`, int32 with a zero
    for each tile of the product, and leave zeros.
    """
    rows, inputs = x.shape
    outputs = len(weight)
    bits = {torch.int8: 8, torch.uint8: 4}.get(weight.dtype, 16)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    grid = triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs), tile.splits
    parts = None
    if tile.splits > 1:
        parts = torch.empty(*grid, tile.rows, tile.outputs, device=x.device)
    multiply_kernel[grid](
        out,
        x,
        weight,
        scales,
        parts,
        arrived if tile.splits > 1 else None,
        rows,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        BITS=bits,
        OUT=tile.outputs,
        ROWS=tile.rows,
        STEP=_UNIT if bits == 4 else tile.step,
        SPLITS=tile.splits,
        EVEN=inputs % tile.step == 0,
        # Triton's interpreter knows no instructions of a GPU.
        FAST=x.dtype is torch.bfloat16 and x.device.type != "cpu",
        PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def widen(weight: Tensor, scales: Tensor | None, inputs: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers that a quantised weight of `multiply` represents, rounded to `dtype` [outputs, inputs]."""
    outputs = len(weight)
    out = torch.empty(outputs, inputs, dtype=dtype, device=weight.device)
    widen_kernel[(triton.cdiv(inputs, _UNIT), triton.cdiv(outputs, _WIDENED))](
        out,
        weight,
        scales,
        outputs,
        inputs,
        weight.stride(0),
        BITS=8 if weight.dtype is torch.int8 else 4,
        OUT=_WIDENED,
        STEP=_UNIT,
        num_warps=4,
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
        self._processors = processors(weight.device)
        arrived = torch.zeros(
            triton.cdiv(len(weight), SMALLEST_OUTPUTS), dtype=torch.int32, device=weight.device
        )
        self.arrived: Tensor
        self.register_buffer("arrived", arrived, persistent=False)
        # An existing parameter is kept, because a tied head shares it with the embedding.
        is_parameter = isinstance(weight, nn.Parameter)
        self.weight = weight if is_parameter else nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if self.scales is None and not self.batch_invariant:
            return F.linear(x, self.weight)
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            # A step in which no prompt ends needs no logits.
            return x.new_empty(*x.shape[:-1], len(self.weight))
        if self.batch_invariant:
            tile = invariant_tile(self.weight, x.dtype)
        elif len(rows) >= WIDEN_ROWS:
            # Without scales a product is invariant, or cuBLAS computes it.
            return F.linear(x, widen(self.weight, self.scales, x.shape[-1], x.dtype))
        else:
            tile = product_tile(self.weight, len(rows), x.dtype, self._processors)
        return multiply(rows, self.weight, self.scales, tile, self.arrived).view(*x.shape[:-1], -1)
