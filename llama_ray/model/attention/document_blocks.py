"""Attention within documents on a CPU, by matrix products of the blocks that matter.

A row of a batch holds documents one after the other. A block of queries is multiplied by the keys from where the
document of its first query begins, not from the row's beginning: what lies before is of other documents. So rows of
many short documents take far less time than rows without borders.

How many keys a block takes differs from batch to batch. Therefore both directions are operators of their own, which
torch.compile does not look into: one compiled graph serves all batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ray.utils.torch_private import softmax_backward

_QUERIES = 128
"""Queries of a block."""

_KEYS = 64
"""Blocks take keys from a multiple of this: oneDNN compiles code for each new shape, and keeps that of 1024."""


@torch.library.custom_op("llama_ray::document_attention", mutates_args=())
def document_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """Let each position attend to itself and to the earlier ones of its document.

    `query` is [batch, num_heads, seq, head_dim], `key` and `value` are [batch, num_kv_heads, seq, head_dim], `starts`
    is int32 [batch, seq] as in `Batch`. Returns a tensor of `query`'s shape, stored as [batch, seq, num_heads,
    head_dim].

    Only the inputs are kept for the backward pass: computing scores again takes less time than storing and reading
    them. Scores are rounded to `query`'s dtype before the softmax, which computes in fp32.
    """
    out = _empty_like(query)
    query, key, value = (x.contiguous() for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(starts, query.dtype):
            p = _probabilities(block.queries(query, key), block.keys(key), block)
            block.write(out, torch.bmm(p, block.keys(value)))
    return out


@document_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    return _empty_like(query)


@torch.library.custom_op("llama_ray::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by `query`, `key` and `value`, given that by the output of `document_attention`.

    With P the probabilities, O = P V and S = scale Q K^T: d V = P^T d O, d P = d O V^T, d S = P (d P - sum(P d P)),
    d Q = scale d S K, d K = scale d S^T Q. Gradients of keys and values add up in fp32.
    """
    grad_query, grad_key, grad_value = (_empty_like(x) for x in (query, key, value))
    grad, query, key, value = (x.contiguous() for x in (grad, query, key, value))
    sum_key, sum_value = (torch.zeros(x.shape[1:], dtype=torch.float32) for x in (key, value))
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(starts, query.dtype):
            q, k, v = block.queries(query, key), block.keys(key), block.keys(value)
            p, g = _probabilities(q, k, block), block.queries(grad, key)
            own = slice(block.first_key, block.end)
            sum_value[:, own] += torch.bmm(p.transpose(1, 2), g)
            grad_s = softmax_backward(torch.bmm(g, v.transpose(1, 2)), p)
            grad_s *= query.shape[-1] ** -0.5
            block.write(grad_query, torch.bmm(grad_s, k))
            sum_key[:, own] += torch.bmm(grad_s.transpose(1, 2), q)
            if block.end == query.shape[2]:
                grad_key[block.row], grad_value[block.row] = sum_key, sum_value
                sum_key.zero_()
                sum_value.zero_()
    return grad_query, grad_key, grad_value


@document_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(query), _empty_like(key), _empty_like(value)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *document_attention_backward(grad, *ctx.saved_tensors), None


document_attention.register_autograd(_differentiate, setup_context=_keep_inputs)


@dataclass(frozen=True)
class _Block:
    """Queries `start` to `end` of a row."""

    row: int
    start: int
    end: int
    document: int
    """Where the document of the first query begins."""
    length: int
    """Queries of that document."""
    mask: Tensor
    """[queries, queries]: 0 where a query sees a position of the block itself, else minus infinity."""

    @property
    def first_key(self) -> int:
        """The first key that the queries are multiplied by."""
        return self.document // _KEYS * _KEYS

    def keys(self, x: Tensor) -> Tensor:
        """Return the block's part of the keys or values `x` [batch, num_kv_heads, seq, head_dim]."""
        return x[self.row, :, self.first_key : self.end]

    def queries(self, x: Tensor, key: Tensor) -> Tensor:
        """Return the block's part of `x` [batch, num_heads, seq, head_dim] as [num_kv_heads, queries, head_dim].

        Heads that share keys are joined, so that grouped-query attention repeats no keys.
        """
        return x[self.row, :, self.start : self.end].reshape(key.shape[1], -1, key.shape[3])

    def write(self, out: Tensor, product: Tensor) -> None:
        """Write a product in the form of `queries` to its place in `out` [batch, num_heads, seq, head_dim]."""
        part = out[self.row, :, self.start : self.end]
        part.copy_(product.view(part.shape))


def _blocks(starts: Tensor, dtype: torch.dtype) -> Iterator[_Block]:
    """Divide the rows of a batch into blocks."""
    batch, seq = starts.shape
    count = -(-seq // _QUERIES)
    begin = F.pad(starts, (0, count * _QUERIES - seq), value=seq).view(batch, count, _QUERIES)
    documents = begin[..., 0].tolist()
    lengths = (begin == begin[..., :1]).sum(-1).tolist()
    positions = torch.arange(count * _QUERIES, dtype=starts.dtype).view(count, _QUERIES)
    query, key = positions[..., None], positions[:, None]
    hidden = (key < begin[..., None]) | (key > query)
    masks = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
    for row in range(batch):
        for i in range(count):
            start, end = i * _QUERIES, min((i + 1) * _QUERIES, seq)
            mask = masks[row, i, : end - start, : end - start]
            yield _Block(row, start, end, documents[row][i], lengths[row][i], mask)


def _probabilities(queries: Tensor, keys: Tensor, block: _Block) -> Tensor:
    """Return the softmax of a block's scores, [num_kv_heads, queries, keys]."""
    # With beta=0 the first argument is not read; `alpha` saves a pass over the scores.
    nothing = queries.new_empty(1)
    scores = torch.baddbmm(nothing, queries, keys.transpose(1, 2), beta=0, alpha=queries.shape[-1] ** -0.5)
    by_query = scores.view(-1, block.end - block.start, keys.shape[1])
    before = block.start - block.first_key
    by_query[..., before:] += block.mask
    if before:
        # Keys before the block are of the first query's document, or of an earlier one.
        by_query[:, block.length :, :before] = -math.inf
        by_query[..., : block.document - block.first_key] = -math.inf
    return scores.softmax(-1)


def _empty_like(x: Tensor) -> Tensor:
    """Return memory for [batch, heads, seq, head_dim], stored as the projections write and read it."""
    batch, heads, seq, dim = x.shape
    return x.new_empty(batch, seq, heads, dim).transpose(1, 2)
