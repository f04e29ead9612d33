"""What one step of the engine computes, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepBatch:
    """All tokens of one step, laid end to end.

    `query_start[s]` .. `query_start[s + 1]` are the rows of sequence `s`; they are its last tokens, and
    `context_len[s]` counts all of its tokens, these included.
    """

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]: block * block_size + offset where the token's key and value go
    query_start: Tensor  # int32 [S + 1]
    context_len: Tensor  # int32 [S]
    block_table: Tensor  # int32 [S, most blocks of any sequence]; unused entries 0
    logit_rows: Tensor  # int64 [R]: rows whose logits are wanted
