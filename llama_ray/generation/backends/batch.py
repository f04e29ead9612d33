"""The input of one forward pass of the engine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepBatch:
    """The tokens of all sequences of one step, concatenated: S sequences, T tokens, R rows to compute logits for."""

    tokens: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    slots: Tensor
    """int64 [T]: block * block_size + offset, where the token's key and value are written."""
    query_start: Tensor
    """int32 [S + 1]: sequence s has the rows from query_start[s] up to, not including, query_start[s + 1]."""
    context_len: Tensor
    """int32 [S]: context length after this step; the last row of sequence s has the position context_len[s] - 1."""
    block_table: Tensor
    """int32 [S, blocks of the longest context]; entries beyond a sequence's context are 0."""
    logit_rows: Tensor
    """int64 [R]: row numbers; a row may occur several times."""

    def to(self, device: torch.device) -> Self:
        """Copy a step from host memory to `device`."""
        return type(self)(*(to_device(getattr(self, field.name), device) for field in fields(self)))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from host memory without waiting for the device's earlier work."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
