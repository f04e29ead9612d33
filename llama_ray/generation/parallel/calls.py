"""What rank 0 asks of the workers: a class for each call, with its arguments and the type of its answer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from numpy.typing import NDArray

from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.quantize import Quantization

Answer = TypeVar("Answer")


class Call(Generic[Answer]):
    """A call of all workers; each returns an `Answer`."""


@dataclass(frozen=True)
class Load(Call[int]):
    """Read this rank's share of a checkpoint; answer with its bytes."""

    directory: Path
    dtype: torch.dtype | None
    device_type: str
    quantization: Quantization | None
    batch_invariant: bool


@dataclass(frozen=True)
class Connect(Call[None]):
    """Meet the other ranks in `directory`."""

    directory: str


@dataclass(frozen=True)
class CountBlocks(Call[int]):
    """Answer with the number of blocks that this rank has memory for; see `kv_cache.count_blocks`."""

    max_num_seqs: int
    max_seq_len: int
    memory_bytes: int | None


@dataclass(frozen=True)
class Reserve(Call[None]):
    """Allocate a cache of `num_blocks` blocks."""

    num_blocks: int


@dataclass(frozen=True)
class Step(Call[None]):
    """Copy blocks, then compute this rank's part of a batch."""

    arrays: tuple[NDArray[Any], ...]
    """The fields of a `StepBatch` in host memory; arrays are smaller and faster to send than tensors."""
    copies: list[tuple[int, int]]
    """(source, target) of blocks."""

    @classmethod
    def of(cls, batch: StepBatch, copies: list[tuple[int, int]]) -> Self:
        """Make the call for a batch in host memory."""
        return cls(tuple(getattr(batch, field.name).numpy() for field in fields(batch)), copies)

    @property
    def batch(self) -> StepBatch:
        """The batch, in host memory."""
        return StepBatch(*map(torch.from_numpy, self.arrays))


@dataclass(frozen=True)
class Failure:
    """Is answered instead when a call raised an error: rank 0 raises `kind(message)`."""

    kind: type[Exception]
    message: str
