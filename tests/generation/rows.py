"""A sequence as the sampler sees it, without an engine around it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama_ray.generation.sampling.constraints import Constraint
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.penalties import TokenCounts
from llama_ray.generation.sampling.sampler import Sample, Sampler


@dataclass
class Row:
    params: SamplingParams
    prompt: list[int] = field(default_factory=lambda: [0])
    output: list[int] = field(default_factory=list)
    seed: int = 0
    index: int = 0
    draft: tuple[int, ...] = ()
    end_ids: Collection[int] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        self.counts = TokenCounts.of(self.params, self.prompt)
        for token in self.output:
            self._take(token)

    def push(self, token: int) -> None:
        self.output.append(token)
        self._take(token)

    def _take(self, token: int) -> None:
        if self.counts is not None:
            self.counts.push(token)
        if self.constraint is not None and token not in self.end_ids:
            self.constraint.push(token)


def sample(logits: Tensor, rows: list[Row], sampler: Sampler | None = None) -> list[Sample]:
    """One call, on a copy of the logits."""
    return (sampler or Sampler()).sample(logits.clone(), rows)


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def logits_after(row: Row, vocab_size: int, scale: float = 3.0) -> Tensor:
    """A stand-in for a model: logits [vocab_size] that follow from all of a row's tokens and from nothing else."""
    seed = 0
    for token in (*row.prompt, *row.output, *row.draft):
        seed = (seed * 1_000_003 + token + 1) % 2**61
    return random_logits(vocab_size, seed=seed, scale=scale)
