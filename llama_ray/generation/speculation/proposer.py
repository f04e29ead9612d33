"""Guessing tokens ahead, and how many of the guesses hold.

A step computes the guesses together with the token before them, and samples at each as if the ones before it were
right. Noise belongs to a position, so what is sampled there is what would have been sampled without any guess: a guess
that equals it saves a step, one that does not is dropped, and no token that comes out is ever another.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Protocol

from llama_ray.generation.sampling.sampler import Sample
from llama_ray.generation.scheduling.step_plan import StepPlan


class Proposer(Protocol):
    """Something that guesses."""

    def propose(self, plan: StepPlan) -> None:
        """Fill `draft` of the chunks that have `draft_room`, with at most so many tokens."""

    def check(self, vocab_size: int, max_seq_len: int) -> None:
        """Raise ValueError where it cannot guess for a model of this vocabulary and length."""

    @property
    def block_bytes(self) -> int:
        """What it wants beside each block of the cache."""

    def reserve(self, num_blocks: int, max_num_seqs: int, max_seq_len: int) -> None:
        """Take memory for so many."""


def accepted(draft: Many[int], samples: Many[Sample]) -> list[Sample]:
    """Of the samples before each guess and after the last, those that hold: up to the first that no guess foresaw."""
    taken = [samples[0]]
    for guess, following in zip(draft, samples[1:], strict=True):
        if taken[-1].token_id != guess:
            break
        taken.append(following)
    return taken
