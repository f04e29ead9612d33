"""Matrix products in float8: twice the rate of bf16 on GPUs since Ada and Hopper.

Each factor is divided by one scale, so that its largest magnitude becomes the largest number of the format, and
rounded: inputs and weights to e4m3, gradients to e5m2, which has less precision and more range (Micikevicius et al.
2022, arXiv:2209.05433). Scales are computed from the values at hand, not from earlier steps. Sums are fp32, results
bf16. Weights and optimizer state stay fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llama_ray.model.llama import Llama
from llama_ray.training.config import TrainConfig
from llama_ray.utils.torch_private import scaled_mm

MULTIPLE = 16
"""The kernels take only factors whose sizes are multiples of this."""
MIN_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with float8 units: L4, L40S, RTX 40; the H100 has 9.0."""

_FORWARD, _GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST = 1e-12
"""Stands for the largest magnitude of a factor of zeros."""


def check_float8(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError if the run's precision is fp8 and `device` or the layout cannot compute in it."""
    if config.precision != "fp8":
        return
    if device.type != "cuda":
        raise ValueError(
            f"precision is fp8; it needs a GPU, and this run trains on a {device.type}; use bf16"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"precision is fp8; {name} has no float8 units (H100, H200 and L4 do); use bf16")


def use_float8(model: Llama, tokens: int) -> None:
    """Compute all products of the blocks in float8, in place, for micro-batches of `tokens` tokens a worker.

    Raises ValueError if the number of tokens or a size of the model is not a multiple of `MULTIPLE`.
    """
    sizes = {"batch_size x seq_len": tokens}
    for block in model.layers:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                sizes |= {f"inputs of {name}": module.in_features, f"outputs of {name}": module.out_features}
                # Its parameters stay as they are, and so do their names.
                module.__class__ = Float8Linear
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise ValueError(
                f"{name} is {size}; with precision fp8 it must be a multiple of {MULTIPLE}; use bf16"
            )


class Float8Linear(nn.Linear):
    """A Linear without bias that computes in float8."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], bf16."""
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = _Product.apply(rows, self.weight)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """[rows, inputs], [outputs, inputs] -> [rows, outputs]."""
        ctx.save_for_backward(x, weight)
        # Both factors must be contiguous along the dimension that is summed over.
        return _multiply(_rounded(x, _FORWARD), _rounded(weight, _FORWARD), fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """D x = g weight;  d weight = g.T x."""
        x, weight = ctx.saved_tensors
        grad = _rounded(grads[0], _GRADIENT)
        grad_x = _multiply(grad, _transposed(_rounded(weight, _FORWARD)), fast=False)
        grad_weight = _multiply(_transposed(grad), _transposed(_rounded(x, _FORWARD)), fast=False)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


_Rounded = tuple[Tensor, Tensor]
"""A float8 matrix, and the fp32 scale to multiply it by."""


def _rounded(x: Tensor, dtype: torch.dtype) -> _Rounded:
    limit = torch.finfo(dtype).max
    largest = x.abs().amax().float().clamp(min=_SMALLEST)
    # Rounding of the quotient may exceed the limit by one unit.
    values = (x.float() * (limit / largest)).clamp(-limit, limit).to(dtype)
    return values, largest / limit


def _transposed(factor: _Rounded) -> _Rounded:
    values, scale = factor
    return values.t().contiguous(), scale


def _multiply(left: _Rounded, right: _Rounded, *, fast: bool) -> Tensor:
    """[rows, n], [columns, n] -> left @ right.T, bf16 [rows, columns]; `fast` adds up some sums in fewer bits."""
    return scaled_mm(left[0], right[0].t(), left[1], right[1], torch.bfloat16, fast)
