"""What one forward pass of the engine works on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepBatch:
    """All tokens of one step, laid end to end: S sequences, T tokens, R rows whose logits are wanted."""

    tokens: Tensor
    """int64 [T]"""
    positions: Tensor
    """int64 [T]"""
    slots: Tensor
    """int64 [T]: block * block_size + offset, where the token's key and value go."""
    query_start: Tensor
    """int32 [S + 1]: sequence s has the rows query_start[s] to query_start[s + 1]."""
    context_len: Tensor
    """int32 [S]: positions that exist once this step's tokens are written; the last row of s is the last of them."""
    block_table: Tensor
    """int32 [S, most blocks of any sequence]; entries beyond a sequence's context are 0."""
    logit_rows: Tensor
    """int64 [R]: row numbers; a row may be named several times."""

    def to(self, device: torch.device) -> Self:
        """The same step on `device`, for one on the host."""
        return type(self)(*(to_device(getattr(self, field.name), device) for field in fields(self)))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for what the device does before."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
