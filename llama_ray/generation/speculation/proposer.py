"""Drafting tokens ahead, and how many of the draft tokens are accepted.

A step computes draft tokens together with the token before them, and samples at each one as if those before it were
right. Noise is keyed by position, so each sample is the token that would have been sampled without a draft: a draft
token that equals it saves a step, one that differs is dropped, and the output never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llama_ray.generation.sampling.sampler import Sample
from llama_ray.generation.scheduling.step_plan import StepPlan


class Proposer(Protocol):
    """Proposes draft tokens."""

    def propose(self, plan: StepPlan) -> None:
        """Fill `draft` of the chunks with `draft_room`, with at most that many tokens."""

    def check(self, vocab_size: int, max_seq_len: int) -> None:
        """Raise ValueError if this cannot draft for a model with this vocabulary and sequence length."""

    @property
    def block_bytes(self) -> int:
        """Bytes that this needs for each block of the model's cache."""

    def reserve(self, num_blocks: int, max_num_seqs: int, max_seq_len: int) -> None:
        """Allocate a cache of `num_blocks` blocks."""


def accepted(draft: Sequence[int], samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples that count: the first one, and each further one while the draft token before it was sampled.

    `samples[i]` was sampled before `draft[i]`, and the last one after the whole draft.
    """
    taken = [samples[0]]
    for draft_token, following in zip(draft, samples[1:], strict=True):
        if taken[-1].token_id != draft_token:
            break
        taken.append(following)
    return taken
