"""What evaluations ask of a model, whether it is an engine here, engines of a cluster, or an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.sampling.params import SamplingParams

Report = Callable[[int, int], None]
"""Takes what is done and what there is to do, in requests."""


def no_report(done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How probable are `tokens` from position `start` on, each after all that are before it? `start` is at least 1."""

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Scored:
    """The natural log-probability of each token from `Scoring.start` on, and whether it is the most probable one."""

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """How does the text go on after `tokens`?"""

    tokens: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


class Scorer(Protocol):
    """A model that answers. Raises EvaluationError for a request that it cannot answer."""

    model: str
    """The reference of the model, fixed."""
    tokenizer: Tokenizer

    @property
    def max_seq_len(self) -> int:
        """The longest input in tokens; a `Scoring` may have one token more, whose successor nobody asks for."""

    def score(self, requests: Sequence[Scoring], report: Report = no_report) -> list[Scored]:
        """Return the answer to each request."""

    def generate(self, requests: Sequence[Generation], report: Report = no_report) -> list[str]:
        """Return the text that follows each prompt."""
