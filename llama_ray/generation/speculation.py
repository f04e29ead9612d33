"""Guessing tokens ahead, and how many of the guesses hold.

A step computes the guesses together with the token before them, and samples at each as if the ones before it were
right. Noise belongs to a position, so what is sampled there is what would have been sampled without any guess: a guess
that equals it saves a step, one that does not is dropped, and no token that comes out is ever another.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from llama_ray.generation.sampler import Sample
from llama_ray.generation.sampling import SamplingParams
from llama_ray.generation.scheduler import Plan
from llama_ray.generation.sequence import Sequence


class Proposer(Protocol):
    """Something that guesses."""

    def propose(self, plan: Plan) -> None:
        """Fill `draft` of the chunks that have `draft_room`, with at most so many tokens."""

    def block_bytes(self, block_size: int) -> int:
        """What it wants beside each block of the cache."""

    def reserve(self, num_blocks: int) -> None:
        """Take memory for so many."""


@dataclass(frozen=True, slots=True)
class DraftRow:
    """A sequence as it would be if `draft` came next; see `sampler.Row`."""

    sequence: Sequence
    draft: Many[int]

    @property
    def params(self) -> SamplingParams:
        """Those of the sequence."""
        return self.sequence.params

    @property
    def prompt(self) -> Many[int]:
        """That of the sequence."""
        return self.sequence.prompt

    @property
    def output(self) -> Many[int]:
        """That of the sequence, without the draft."""
        return self.sequence.output

    @property
    def seed(self) -> int:
        """That of the sequence."""
        return self.sequence.seed

    @property
    def index(self) -> int:
        """That of the sequence."""
        return self.sequence.index


def accepted(draft: Many[int], samples: Many[Sample]) -> list[Sample]:
    """Of the samples before each guess and after the last, those that hold: up to the first that no guess foresaw."""
    taken = [samples[0]]
    for guess, following in zip(draft, samples[1:], strict=True):
        if taken[-1].token_id != guess:
            break
        taken.append(following)
    return taken


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again (Saxena 2023, prompt lookup).

    The longest of the last `longest` to `shortest` tokens that occurred before counts, where it did so last.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest is {shortest} and longest is {longest}; 1 <= shortest <= longest must hold"
            )
        self._widths = range(longest, shortest - 1, -1)
        self._seen: WeakKeyDictionary[Sequence, _Seen] = WeakKeyDictionary()

    def propose(self, plan: Plan) -> None:
        """See `Proposer`."""
        for chunk in plan.chunks:
            if chunk.draft_room:
                chunk.draft = self._continuation(chunk.sequence, chunk.draft_room)

    def block_bytes(self, block_size: int) -> int:
        """See `Proposer`."""
        return 0

    def reserve(self, num_blocks: int) -> None:
        """See `Proposer`."""

    def _continuation(self, sequence: Sequence, room: int) -> list[int]:
        tokens = sequence.tokens
        seen = self._seen.setdefault(sequence, _Seen())
        for end in range(seen.length, len(tokens)):
            for width in self._widths:
                if width <= end:
                    seen.ends[tuple(tokens[end - width : end])] = end
        seen.length = len(tokens)
        for width in self._widths:
            end = seen.ends.get(tuple(tokens[-width:]))
            if end is not None:
                return tokens[end : end + room]
        return []


class _Seen:
    """Where each n-gram of a sequence ended last, for those among its first `length` tokens that something follows."""

    def __init__(self) -> None:
        self.length = 1
        self.ends: dict[tuple[int, ...], int] = {}
