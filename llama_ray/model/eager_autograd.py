"""RMSNorm and rotary embedding with hand-written gradients, for eager training on a CPU.

They compute what the formulas in layers.py do. Eagerly, each operation of a formula reads and writes a whole tensor and
saves it for the backward pass; here there are few. Under torch.compile the formulas are fused anyway.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def use_fused_backward(x: Tensor) -> bool:
    """Whether the hand-written backward is valid and faster for `x`; DTensor can shard only the formulas."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    # Its import takes half a second; where nobody has imported it, no tensor is one.
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is None or not isinstance(x, tensor.DTensor)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """[..., size] -> `RMSNorm` of it with `weight` [size], cast to `dtype`."""
    return _RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-any-return, no-untyped-call]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[batch, heads, seq, head_dim] -> `llama_ray.model.layers.rotate` of it."""
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Compute x r weight in fp32, where r = 1 / rms(x)."""
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
        # backward() may have been called under autocast.
        with torch.autocast("cpu", enabled=False):
            size = x.shape[-1]
            g, h, r = grads[0].float().reshape(-1, size), x.float().reshape(-1, size), r.view(-1, 1)
            w = weight.float()
            product = g * h
            # - r^3 mean(x weight g), one number a row.
            correction = torch.mv(product, w).unsqueeze(1).mul_(r**3).mul_(-1 / size)
            grad_weight = None
            if ctx.needs_input_grad[1]:
                grad_weight = torch.mv(product.T, r.squeeze(1)).to(weight.dtype)
            grad_x = torch.mul(g, w, out=product).mul_(r).addcmul_(h, correction)
            return grad_x.view(x.shape).to(x.dtype), grad_weight, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate; stored as [batch, heads, seq, head_dim], which attention reads."""
        ctx.save_for_backward(cos, sin)
        return _rotate_into(x.new_empty(x.shape), x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate back; stored as [batch, seq, heads, head_dim], which the projections read."""
        cos, sin = ctx.saved_tensors
        batch, heads, seq, dim = grads[0].shape
        out = grads[0].new_empty(batch, seq, heads, dim).transpose(1, 2)
        return _rotate_into(out, grads[0], cos, -sin), None, None


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    first, second = out.chunk(2, dim=-1)
    rotated = a * cos
    first.copy_(rotated.addcmul_(b, sin, value=-1))
    second.copy_(torch.mul(b, cos, out=rotated).addcmul_(a, sin))
    return out
