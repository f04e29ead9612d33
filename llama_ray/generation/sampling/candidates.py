"""The most probable tokens of each row, in an order that leaves nothing open."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

TopCandidates = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Logits fp32 [rows, vocab_size] and a width up to vocab_size -> values fp32 and token ids int64, both [rows, width].

Each row holds its `width` largest logits, the largest first and equal ones by ascending token id, so that a row's
outcome is the same whoever computes it. Where fewer logits are above -inf, the rest of the values are -inf, and the
ids beside them any of the vocabulary. A row that holds NaN comes out with any values and any ids of the vocabulary.
"""

_CHUNK = 32  # rows: what is in work at once fits the processor's cache
_BLOCKS_PER_CANDIDATE = 8
_LEAST = torch.finfo(torch.float32).min


def torch_top_candidates(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`TopCandidates` in plain torch. On CUDA nothing waits for the device."""
    if logits.device.type != "cpu":
        return _by_keys(logits, width)
    if width == logits.shape[-1]:
        values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
        return values, ids
    parts = [_by_threshold(chunk, width) for chunk in torch.split(logits, _CHUNK)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])


def _by_keys(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Sorts by one integer a token that orders by logit and then by id, so that no two are equal."""
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0, which it equals
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, negative floats run backwards
    vocab_size = logits.shape[-1]
    keys = (ascending.long() << 32) + torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    ids = keys.topk(width).indices
    return logits.gather(-1, ids), ids


def _by_threshold(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Finds a number that at least `width` logits reach, and sorts those that do.

    The number is the `width`th largest of the maxima of short blocks. It is hardly ever far below the `width`th
    largest logit, and costs one pass and a small `topk`; `topk` of whole rows would be slower, and picks any of
    several equal logits. All that reach it are in the blocks whose maximum does, so only those are looked through.
    """
    rows, vocab_size = logits.shape
    size = _block_size(vocab_size, width)
    if vocab_size % size:
        logits = torch.nn.functional.pad(logits, (0, -vocab_size % size), value=-torch.inf)
    blocks = logits.view(rows, -1, size)
    largest = blocks.amax(-1)
    least = largest.topk(width, sorted=False).values.amin(-1, keepdim=True).clamp_min(_LEAST)
    # NumPy finds the few that are set several times faster than torch.
    found = np.flatnonzero(largest.numpy() >= least.numpy())
    row_of_block = found // largest.shape[1]
    inside = blocks.view(-1, size)[torch.from_numpy(found)].numpy()
    place = np.flatnonzero(inside >= least.numpy()[row_of_block])
    block = place // size  # rows ascend, and ids in each row
    row = row_of_block[block]
    id = (found[block] - row * largest.shape[1]) * size + place % size

    count = np.bincount(row, minlength=rows)
    column = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    values = np.full((rows, max(width, int(count.max(initial=0)))), -np.inf, dtype=np.float32)
    ids = np.zeros(values.shape, dtype=np.int64)
    values[row, column] = inside.reshape(-1)[place]
    ids[row, column] = id
    top, order = torch.from_numpy(values).sort(dim=-1, descending=True, stable=True)
    return top[:, :width], torch.from_numpy(ids).gather(-1, order[:, :width])


def _block_size(vocab_size: int, width: int) -> int:
    """The largest power of two up to 64 that leaves enough blocks to find `width` candidates in."""
    size = 64
    while size > 1 and vocab_size < size * width * _BLOCKS_PER_CANDIDATE:
        size //= 2
    return size
