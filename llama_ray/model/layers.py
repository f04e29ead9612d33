"""The layers of a LLaMA: RMSNorm, rotary embedding, attention, SwiGLU, and the block that joins them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ray.model import eager_autograd
from llama_ray.model.attention.causal import Attend, causal_attention
from llama_ray.model.config import LlamaConfig, RopeScaling


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], in the dtype that the projections which read it compute in."""
        dtype = self._result_dtype(x)
        if not eager_autograd.use_fused_backward(x):
            h = x.float()
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
            return (h.to(x.dtype) * self.weight).to(dtype)
        # The same function, with a backward pass that is faster on a CPU.
        return eager_autograd.rms_norm(x, self.weight, self.eps, dtype)

    def _result_dtype(self, x: Tensor) -> torch.dtype:
        kind = x.device.type
        # One cast here instead of one in each projection.
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return torch.promote_types(x.dtype, self.weight.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians a token that each pair is rotated by: theta^(-2i / head_dim) (Su et al. 2021, arXiv:2104.09864).

    fp32 [head_dim / 2]; `scaling` as `RopeScaling` defines it.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # Full turns within the context that the model was first trained for.
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


class RotaryEmbedding(nn.Module):
    """Cosines and sines of all positions below `max_seq_len`, in fp32 whatever the model's dtype."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.max_seq_len, config.head_dim // 2)
        self.register_buffer("cos", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty(shape, dtype=torch.float32), persistent=False)

    def fill_tables(self) -> None:
        """Compute both tables; call it again when a model built on the meta device has been materialized."""
        c = self.config
        with torch.device("cpu"):
            frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
            angles = torch.outer(torch.arange(c.max_seq_len).float(), frequencies)
        device = self.cos.device
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(bfloat16) casts buffers too, and positions above 256 would then share angles.
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [seq] -> cosines and sines [seq, head_dim / 2]; [batch, seq] -> [batch, 1, seq, head_dim / 2]."""
        cos, sin = self.cos[positions], self.sin[positions]
        return (cos, sin) if positions.dim() == 1 else (cos.unsqueeze(1), sin.unsqueeze(1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + head_dim/2}) of [batch, heads, seq, head_dim] by its position's angle, in fp32.

    Pairs join the two halves, as in Hugging Face checkpoints, not neighbours as in the paper.
    """
    if not eager_autograd.use_fused_backward(x):
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    # The same function, with a backward pass that is faster on a CPU.
    return eager_autograd.rotate(x, cos, sin)


class Attention(nn.Module):
    """Multi-head or grouped-query attention with rotary queries and keys, no biases."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        hidden, kv = config.hidden_size, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, hidden, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend | None = None) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]; without `attend`, by `causal_attention`."""
        # The projections determine the number of heads: under tensor parallelism each rank has a part of them.
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        # In training nothing reads the layer's number: torch.compile would compile each layer for its own.
        out = causal_attention(q, k, v) if attend is None else attend(self.layer, q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), no biases."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each with a norm before it and a residual connection around it."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend | None = None) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]
