"""Gradients written by hand, for eager steps on a CPU, where each pass over memory counts.

torch derives them from the plain formulas in layers.py as well, and the compiler fuses what it derives. Eager, every
operation of a formula reads and writes a whole tensor, and keeps it for the backward pass; here few do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def use_fused_backward(x: Tensor) -> bool:
    """Whether these functions are worth calling on `x`, and can be: DTensor shards the plain formulas only."""
    eager = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return eager and not isinstance(x, DTensor)


class Normalize(torch.autograd.Function):
    """`RMSNorm`: x [..., size], weight [size], eps, dtype of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """In fp32: x r weight, where r = 1 / rms(x)."""
        h = x.float()
        r = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        r = r.square_().mul_(1 / h.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        out: Tensor = (h * r).mul_(weight).to(dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With g = d out: d weight = sum g x r;  d x = r weight g - x r^3 mean(x weight g) over the last dimension."""
        x, weight, r = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):  # that of backward()'s caller
            size = x.shape[-1]
            g, h, r = grads[0].float().reshape(-1, size), x.float().reshape(-1, size), r.view(-1, 1)
            w = weight.float()
            product = g * h
            share = torch.mv(product, w).unsqueeze(1).mul_(r**3).mul_(-1 / size)
            grad_weight = torch.mv(product.T, r.squeeze(1))
            grad_x = torch.mul(g, w, out=product).mul_(r).addcmul_(h, share)
            return grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight.dtype), None, None


class Rotate(torch.autograd.Function):
    """`rotate`: x [batch, heads, seq, head_dim], cosines and sines."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Laid out as attention reads it: heads first."""
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, torch.empty(x.shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Turned back; laid out as the projections read it: the heads of a token beside each other."""
        cos, sin = ctx.saved_tensors
        batch, heads, seq, dim = grads[0].shape
        out = torch.empty(batch, seq, heads, dim, dtype=grads[0].dtype).transpose(1, 2)
        return _turn(grads[0], cos, -sin, out), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    first, second = out.chunk(2, dim=-1)
    turned = a * cos
    first.copy_(turned.addcmul_(b, sin, value=-1))
    second.copy_(torch.mul(b, cos, out=turned).addcmul_(a, sin))
    return out
