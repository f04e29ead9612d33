"""Causal attention, and the interface of any other."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Attention of queries to keys and values: within documents in training, to those of a cache in generation.

    Called once a layer, with `query` [batch, num_heads, seq, head_dim] and `key` and `value`
    [batch, num_kv_heads, seq, head_dim], queries and keys rotated. Returns a tensor of `query`'s shape.
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...  # noqa: D102


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Let each position attend to itself and to earlier positions of its sequence; shapes as in `Attend`."""
    short = query.shape[2] <= SHORT_SEQUENCE and query.requires_grad
    if short and query.device.type == "cpu" and query.dtype is torch.bfloat16:
        return blockwise_attention(query, key, value)
    return flash_attention(query, key, value)


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention by torch's kernel, which never stores the scores."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


SHORT_SEQUENCE = 1024
"""Up to this many tokens, bf16 training on a CPU uses `blockwise_attention`."""

_QUERY_BLOCK = 128


def blockwise_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention by matrix products: each block of queries with the keys up to the block's end.

    In bf16 on a CPU, forward and backward together take half the time of torch's kernel. The memory for scores is
    seq^2 / 2 a head. Scores are rounded to bf16 before the softmax, which computes in fp32.
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
