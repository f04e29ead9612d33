"""Guesses by a smaller model of the same vocabulary (Leviathan et al. 2022, arXiv:2211.17192)."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from llama_ray.generation.backend import Backend
from llama_ray.generation.prepare import as_backend
from llama_ray.generation.runner import Runner, Span
from llama_ray.generation.sampling.row import DraftRow
from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.generation.scheduling.step_plan import Chunk, StepPlan
from llama_ray.model.llama import Llama

_CATCH_UP_TOKENS = 256


class DraftModel:
    """Samples its guesses with the noise that the large model will use, so that equal opinions give equal tokens.

    It keeps keys and values of its own under the same block numbers. It reads prompts when their sequence begins to
    generate, in chunks, and guesses nothing for those that it has not caught up with.
    """

    def __init__(self, model: Llama | Backend) -> None:
        self._backend = as_backend(model)
        self._runner: Runner | None = None
        self._sampler = self._backend.make_sampler()
        self._guessed: WeakKeyDictionary[SequenceState, tuple[int, list[int]]] = WeakKeyDictionary()

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
        guessing = self._caught_up([c for c in plan.chunks if c.draft_room])
        known = {id(c): len(c.sequence.tokens) for c in guessing}
        while guessing:
            spans = [self._span(c) for c in guessing]
            logits = self._runner.forward(self._runner.batch(spans))
            samples = self._sampler.sample(logits, [DraftRow(c.sequence, list(c.draft)) for c in guessing])
            for chunk, span, one in zip(guessing, spans, samples, strict=True):
                chunk.sequence.draft_computed = span.start + len(span.tokens)
                if one.token_id is not None:
                    chunk.draft.append(one.token_id)
                self._guessed[chunk.sequence] = (known[id(chunk)], chunk.draft)
            guessing = [
                c
                for c, one in zip(guessing, samples, strict=True)
                if one.token_id is not None and len(c.draft) < c.draft_room
            ]

    def _caught_up(self, chunks: list[Chunk]) -> list[Chunk]:
        """Bring the cache nearer to the sequences' ends; those that a last short pass will bring there."""
        budget = _CATCH_UP_TOKENS
        near: list[Chunk] = []
        behind: list[Span] = []
        for chunk in chunks:
            sequence = chunk.sequence
            self._keep_what_held(sequence)
            start, missing = sequence.draft_computed, len(sequence.tokens) - sequence.draft_computed
            if missing <= min(budget, _CATCH_UP_TOKENS):
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

    def _keep_what_held(self, sequence: SequenceState) -> None:
        """Of the last guesses, those that came true are in the cache already, the others never were."""
        length, draft = self._guessed.pop(sequence, (0, []))
        if sequence.draft_computed <= length:  # it lost its blocks since
            return
        right = 0
        for guess, token in zip(draft, sequence.tokens[length:], strict=False):
            if guess != token:
                break
            right += 1
        sequence.draft_computed = min(sequence.draft_computed, length + right)

    def _span(self, chunk: Chunk) -> Span:
        sequence = chunk.sequence
        tokens = [*sequence.tokens, *chunk.draft]
        start = sequence.draft_computed
        return Span(start, tokens[start:], sequence.blocks, [len(tokens) - start - 1])
