"""The most probable tokens of each row, in a total order: by logit, then by token id."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

TopCandidates = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(logits fp32 [rows, vocab_size], width up to vocab_size) -> (values fp32, token ids int64), both [rows, width].

Each row lists its `width` largest logits, largest first and equal ones by ascending token id, so that all
implementations agree. If fewer logits are above -inf, the remaining values are -inf and their ids arbitrary ids of the
vocabulary. A row that holds NaN yields arbitrary values and arbitrary ids of the vocabulary.
"""

# Rows that are worked on at once, so that they fit the CPU's cache.
_CHUNK_ROWS = 32
_BLOCKS_PER_CANDIDATE = 8
_LOWEST_FINITE = torch.finfo(torch.float32).min


def torch_top_candidates(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`TopCandidates` in plain torch. On CUDA it does not synchronise with the device."""
    if logits.device.type != "cpu":
        return top_candidates_by_keys(logits, width)
    if width == logits.shape[-1]:
        values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
        return values, ids
    parts = [_by_threshold(chunk, width) for chunk in torch.split(logits, _CHUNK_ROWS)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([values for values, _ in parts]), torch.cat([ids for _, ids in parts])


def top_candidates_by_keys(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`TopCandidates` for GPUs, by integers that order by logit and then by id.

    Only the `width` blocks with the largest maxima are searched: a token outside of them has the maxima of `width`
    blocks before it.
    """
    vocab_size = logits.shape[-1]
    size = block_size(vocab_size, width)
    if vocab_size % size:
        logits = torch.nn.functional.pad(logits, (0, -vocab_size % size), value=-torch.inf)
    blocks = logits.view(len(logits), -1, size)
    chosen = _order(blocks.amax(-1)).topk(width, sorted=False).indices.unsqueeze(-1)
    values = blocks.gather(1, chosen.expand(-1, -1, size)).flatten(1)
    ids = (chosen * size + torch.arange(size, device=logits.device)).flatten(1)
    top = _order(values, ids).topk(width).indices
    # What is beyond the vocabulary is -inf.
    return values.gather(-1, top), ids.gather(-1, top).clamp(max=vocab_size - 1)


def _order(values: Tensor, ids: Tensor | None = None) -> Tensor:
    """Return int64 keys that are larger for larger fp32 values and, among equal ones, for smaller ids or positions."""
    bits = (values + 0.0).view(torch.int32)  # Adding 0 turns -0 into 0, which it equals.
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # The bits of negative floats order backwards.
    if ids is None:
        ids = torch.arange(values.shape[-1], device=values.device)
    return (ascending.long() << 32) + (0x7FFFFFFF - ids)


def _by_threshold(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Find a threshold that at least `width` logits reach, and sort the logits that reach it.

    The threshold is the `width`th largest of the maxima of short blocks. It is rarely far below the `width`th largest
    logit, and costs one pass and a small `topk`; `topk` of whole rows is slower and breaks ties arbitrarily. Logits
    that reach it are only in blocks whose maximum reaches it, so only those blocks are searched.
    """
    rows, vocab_size = logits.shape
    size = block_size(vocab_size, width)
    if vocab_size % size:
        logits = torch.nn.functional.pad(logits, (0, -vocab_size % size), value=-torch.inf)
    blocks = logits.view(rows, -1, size)
    maxima = blocks.amax(-1)
    threshold = maxima.topk(width, sorted=False).values.amin(-1, keepdim=True).clamp_min(_LOWEST_FINITE)
    # NumPy finds the few true elements several times faster than torch.
    found = np.flatnonzero(maxima.numpy() >= threshold.numpy())
    row_of_block = found // maxima.shape[1]
    logits_found = blocks.view(-1, size)[torch.from_numpy(found)].numpy()
    flat = np.flatnonzero(logits_found >= threshold.numpy()[row_of_block])
    block = flat // size
    # Rows ascend, and so do the ids within a row.
    row = row_of_block[block]
    token = (found[block] - row * maxima.shape[1]) * size + flat % size

    count = np.bincount(row, minlength=rows)
    column = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    values = np.full((rows, max(width, int(count.max(initial=0)))), -np.inf, dtype=np.float32)
    ids = np.zeros(values.shape, dtype=np.int64)
    values[row, column] = logits_found.reshape(-1)[flat]
    ids[row, column] = token
    top, order = torch.from_numpy(values).sort(dim=-1, descending=True, stable=True)
    return top[:, :width], torch.from_numpy(ids).gather(-1, order[:, :width])


def block_size(vocab_size: int, width: int) -> int:
    """Return the largest power of two up to 64 that leaves `_BLOCKS_PER_CANDIDATE` blocks for each candidate."""
    size = 64
    while size > 1 and vocab_size < size * width * _BLOCKS_PER_CANDIDATE:
        size //= 2
    return size
