"""The parts of a LLaMA block: RMSNorm, rotary embedding, attention, SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ray.model import eager_autograd
from llama_ray.model.config import LlamaConfig, RopeScaling


class Attend(Protocol):
    """How queries look at keys and values: over the sequence itself in training, over a cache in generation.

    Called once a layer with `query` [batch, num_heads, seq, head_dim] and `key`, `value`
    [batch, num_kv_heads, seq, head_dim], rotary embedding already applied; returns the shape of `query`.
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...  # noqa: D102


def causal_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each position attends to itself and to those before it in the same sequence; see `Attend`."""
    short = query.shape[2] <= SHORT_SEQUENCE and query.requires_grad
    if short and query.device.type == "cpu" and query.dtype is torch.bfloat16:
        return blockwise_attention(layer, query, key, value)
    return flash_attention(layer, query, key, value)


def flash_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention by torch's kernel: scores never reach memory."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


SHORT_SEQUENCE = 1024
"""Tokens up to which training in bf16 on a CPU keeps its attention scores; see `blockwise_attention`."""

_QUERY_BLOCK = 128


def blockwise_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention by matrix products, a block of queries at a time over the keys up to its end.

    On a CPU, forward and backward take half the time of torch's kernel in bf16, and memory for half of seq^2 scores
    a head. Scores are rounded to bf16 before the softmax, which itself computes in fp32.
    """
    batch, heads, seq, dim = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (x.reshape(batch * heads, seq, dim) for x in (query, key, value))
    outputs = []
    for start in range(0, seq, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, seq)
        mask = q.new_full((end - start, end), -math.inf).triu(start + 1)
        scores = torch.baddbmm(mask, q[:, start:end], k[:, :end].transpose(1, 2), alpha=dim**-0.5)
        outputs.append(torch.bmm(scores.softmax(-1), v[:, :end]))
    return torch.cat(outputs, 1).view(batch, heads, seq, dim)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with `size` last -> the same shape, in the dtype that matrix products compute in.

        Under autocast that saves each of the projections that read the result a cast of its own.
        """
        kind = x.device.type
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if eager_autograd.use_fused_backward(x):
            return eager_autograd.Normalize.apply(x, self.weight, self.eps, dtype)  # type: ignore[no-any-return, no-untyped-call]
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h.to(x.dtype) * self.weight).to(dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angles a position turns each pair by, fp32 [head_dim / 2]: theta^(-2i/d) (Su et al. 2021, arXiv:2104.09864)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position up to `max_seq_len`, kept in fp32 whatever the model's dtype."""

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
        # .to(bfloat16) on the whole model casts buffers too; positions above 256 would then share angles.
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [seq] or [batch, seq] -> cosines and sines [(batch, 1,) seq, head_dim / 2]."""
        cos, sin = self.cos[positions], self.sin[positions]
        return (cos, sin) if positions.dim() == 1 else (cos.unsqueeze(1), sin.unsqueeze(1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) of [batch, heads, seq, head_dim] by their position's angles, in fp32.

    Halves are paired, not neighbours: the layout that Hugging Face checkpoints are permuted to.
    """
    if eager_autograd.use_fused_backward(x):
        return eager_autograd.Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        # The number of heads is read off the projection: under tensor parallelism each rank holds a share.
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(self.layer, rotate(q, *rope), rotate(k, *rope), v)
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
    """One layer: a norm before each of attention and SwiGLU, a residual around each."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]
