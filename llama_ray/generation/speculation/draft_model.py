"""Draft tokens from a smaller model of the same vocabulary (Leviathan et al. 2022, arXiv:2211.17192)."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.prepare import as_backend
from llama_ray.generation.backends.runner import Runner, Span
from llama_ray.generation.sampling.row import DraftRow
from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.generation.scheduling.step_plan import Chunk, StepPlan
from llama_ray.model.llama import Llama

_CATCH_UP_TOKENS = 256
"""Tokens of text without draft keys and values that one step computes."""


@dataclass(slots=True)
class _Draft:
    """The last draft of a sequence, which had `length` tokens then."""

    length: int
    tokens: list[int]


class DraftModel:
    """Samples draft tokens with the noise that the large model will use, so that similar logits give the same token.

    Its keys and values are in a cache of its own, under the block numbers of the large model's. It reads a prompt in
    chunks when its sequence starts to generate, and drafts once it has caught up.
    """

    def __init__(self, model: Llama | Backend) -> None:
        self._backend = as_backend(model)
        self._runner: Runner | None = None
        self._sampler = self._backend.make_sampler()
        self._drafts: WeakKeyDictionary[SequenceState, _Draft] = WeakKeyDictionary()

    def check(self, vocab_size: int, max_seq_len: int) -> None:
        """See `Proposer`."""
        config = self._backend.model.config
        if config.vocab_size != vocab_size:
            raise ValueError(
                f"the draft model's vocab_size is {config.vocab_size}, the model's {vocab_size}; give one that was "
                "trained with the same tokenizer"
            )
        if config.max_seq_len < max_seq_len:
            raise ValueError(
                f"the draft model's max_seq_len is {config.max_seq_len}, below the engine's {max_seq_len}; give "
                f"max_seq_len {config.max_seq_len}, or another draft model"
            )

    @property
    def block_bytes(self) -> int:
        """See `Proposer`."""
        return self._backend.block_bytes

    def reserve(self, num_blocks: int, max_num_seqs: int, max_seq_len: int) -> None:
        """See `Proposer`."""
        self._runner = self._backend.make_runner(num_blocks, max_num_seqs, max_seq_len)

    @torch.inference_mode()
    def propose(self, plan: StepPlan) -> None:
        """See `Proposer`."""
        assert self._runner is not None, "reserve comes first"
        for source, target in plan.copies:
            self._runner.cache.copy_block(source, target)
        drafting = self._catch_up([chunk for chunk in plan.chunks if chunk.draft_room])
        for chunk in drafting:
            self._drafts[chunk.sequence] = _Draft(len(chunk.sequence.tokens), chunk.draft)
        while drafting:
            spans = [self._span(chunk) for chunk in drafting]
            logits = self._runner.forward(self._runner.batch(spans))
            rows = [DraftRow(chunk.sequence, list(chunk.draft)) for chunk in drafting]
            longer: list[Chunk] = []
            for chunk, span, sample in zip(drafting, spans, self._sampler.sample(logits, rows), strict=True):
                chunk.sequence.draft_computed = span.start + len(span.tokens)
                if sample.token_id is None:
                    continue
                chunk.draft.append(sample.token_id)
                if len(chunk.draft) < chunk.draft_room:
                    longer.append(chunk)
            drafting = longer

    def _catch_up(self, chunks: list[Chunk]) -> list[Chunk]:
        """Compute text that the draft's cache lacks; return the chunks for which little enough is left to draft now."""
        budget = _CATCH_UP_TOKENS
        near: list[Chunk] = []
        behind: list[Span] = []
        for chunk in chunks:
            sequence = chunk.sequence
            self._roll_back(sequence)
            start, missing = sequence.draft_computed, len(sequence.tokens) - sequence.draft_computed
            if missing <= budget:
                near.append(chunk)
                budget -= missing
            elif budget > 0:
                tokens = sequence.tokens[start : start + budget]
                behind.append(Span(start, tokens, sequence.blocks, []))
                sequence.draft_computed += len(tokens)
                budget = 0
        if behind:
            assert self._runner is not None
            self._runner.forward(self._runner.batch(behind))
        return near

    def _roll_back(self, sequence: SequenceState) -> None:
        """Set `draft_computed` back to the last draft token that was accepted."""
        draft = self._drafts.pop(sequence, None)
        # Otherwise the cache holds none of the draft, such as after preemption.
        if draft is None or sequence.draft_computed <= draft.length:
            return
        accepted = 0
        for draft_token, token in zip(draft.tokens, sequence.tokens[draft.length :], strict=False):
            if draft_token != token:
                break
            accepted += 1
        sequence.draft_computed = min(sequence.draft_computed, draft.length + accepted)

    def _span(self, chunk: Chunk) -> Span:
        sequence = chunk.sequence
        tokens = [*sequence.tokens, *chunk.draft]
        start = sequence.draft_computed
        return Span(start, tokens[start:], sequence.blocks, [len(tokens) - start - 1])
