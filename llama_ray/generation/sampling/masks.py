"""Masks of allowed tokens, applied to logits."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class TokenMasks:
    """Applies masks of allowed tokens to the rows of a batch."""

    def __init__(self) -> None:
        self._additive: dict[torch.device, Tensor] = {}

    def apply(self, logits: Tensor, rows: Tensor, allowed: Tensor) -> None:
        """Set logits fp32 [_, vocab_size] of `rows` to -inf, in place, where the bit in `allowed` is 0.

        `allowed` holds bits by token id, least significant first, uint8 [rows, bytes], on the logits' device.
        """
        device = logits.device
        if device not in self._additive:
            # For each value of a byte, what to add to the eight logits that it stands for.
            bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
            table = torch.zeros(256, 8).masked_fill_(torch.from_numpy(bits) == 0, -torch.inf)
            self._additive[device] = table.to(device)
        addends = torch.nn.functional.embedding(allowed.int(), self._additive[device])
        logits[rows] += addends.view(len(rows), -1)[:, : logits.shape[-1]]


def forbid_tokens(allowed: NDArray[np.uint8], tokens: Collection[int]) -> None:
    """Clear the bits of `tokens` in one row's mask, uint8 [bytes], in place, unless that would clear all of it."""
    kept = allowed.copy()
    for token in tokens:
        kept[token // 8] &= ~np.uint8(1 << token % 8)
    if kept.any():
        allowed[:] = kept
