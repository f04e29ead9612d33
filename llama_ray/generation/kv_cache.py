"""Keys and values of the sequences that run, and how queries look at them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from llama_ray.model.config import LlamaConfig
from llama_ray.model.layers import Attend, causal_attention

# Attention reads so many positions more than it must, at most: on CPU a matrix product of a size not seen before
# costs 1 to 4 ms of preparation in bf16, and each decoding step would bring one.
_LENGTH_STEP = 64


class KVCache:
    """One contiguous row ("slot") of `max_seq_len` positions for each sequence that can run at once.

    Per layer, keys and values are each [slots, num_kv_heads, max_seq_len, head_dim] in the model's dtype. Raises
    ValueError where that is more than the memory that is free.
    """

    def __init__(
        self,
        config: LlamaConfig,
        slots: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (slots, config.num_kv_heads, max_seq_len, config.head_dim)
        self.nbytes = 2 * config.num_layers * math.prod(shape) * dtype.itemsize
        self.max_seq_len = max_seq_len
        free = free_bytes(torch.device(device))
        if self.nbytes > free:
            raise ValueError(
                f"the KV cache of max_batch_size {slots} x max_seq_len {max_seq_len} takes {_gib(self.nbytes)}, but "
                f"{_gib(free)} of memory are free on {device}; lower one of them"
            )
        # Zeros, because masked positions still enter a product with weight 0, and 0 x NaN is NaN. On CPU they
        # cost nothing until written: the system hands out zeroed pages when they are first touched.
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def prefill(self, slots: Sequence[int], lengths: Sequence[int]) -> Attend:
        """Attention for whole prompts laid end to end in one row: tokens [1, sum(lengths)].

        Each prompt attends to itself alone, causally, and its keys and values go to its slot.
        """

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = torch.empty_like(query)
            start = 0
            for slot, length in zip(slots, lengths, strict=True):
                span = slice(start, start + length)
                q, k, v = query[:, :, span], key[:, :, span], value[:, :, span]
                self._keys[layer][slot, :, :length] = k[0]
                self._values[layer][slot, :, :length] = v[0]
                out[:, :, span] = causal_attention(layer, q, k, v)
                start += length
            return out

        return attend

    def decode(self, slots: Sequence[int], positions: Sequence[int]) -> Attend:
        """Attention for one new token of each sequence: tokens [len(slots), 1], in ascending order of slots.

        The token at `positions[i]` is written to its slot and attends to positions 0 .. positions[i] there. Two
        matrix products rather than torch's fused attention: as fast for fp32 and 2 to 5 times as fast for bf16 on
        CPU. They read the cache in place, so they run over all slots up to the last one in use; the rows of slots
        that are free in between are computed in vain and dropped.
        """
        device = self._keys[0].device
        rows = slots[-1] + 1
        dense = rows == len(slots)
        length = min(-(-(max(positions) + 1) // _LENGTH_STEP) * _LENGTH_STEP, self.max_seq_len)
        slot = torch.tensor(slots, device=device)
        position = torch.tensor(positions, device=device)
        last = torch.zeros(rows, dtype=torch.int64, device=device).index_copy(0, slot, position)
        hidden = torch.arange(length, device=device) > last[:, None]
        mask = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -math.inf)[:, None, None]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[slot, :, position] = key[:, :, 0]
            values[slot, :, position] = value[:, :, 0]
            # The query heads that share a key-value head become the rows of one product: [rows, kv_heads, group, D].
            q = query.view(len(slots), key.shape[1], -1, query.shape[-1])
            if not dense:
                q = q.new_zeros(rows, *q.shape[1:]).index_copy(0, slot, q)
            scores = (q @ keys[:rows, :, :length].transpose(-1, -2)).float() * query.shape[-1] ** -0.5
            weights = (scores + mask).softmax(-1).to(q.dtype)
            out: Tensor = weights @ values[:rows, :, :length]
            return (out if dense else out[slot]).view_as(query)

        return attend

    def clear(self, slot: int) -> None:
        """Make a slot's content zeros; needed after NaN or infinity got into it."""
        for tensor in (*self._keys, *self._values):
            tensor[slot] = 0


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
