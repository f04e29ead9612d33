"""A plan -> tensors -> one forward pass -> logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_ray.generation.batch import StepBatch
from llama_ray.generation.kv_cache import KVCache
from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.generation.scheduling.step_plan import Chunk, StepPlan
from llama_ray.model.llama import Llama
from llama_ray.utils.integers import ceil_div


class RunnerError(RuntimeError):
    """The runner cannot go on, whatever it is given to run; the message gives the cause."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one sequence to compute, from position `start` on, in its `blocks`."""

    start: int
    tokens: list[int]
    blocks: list[int]
    rows: list[int]
    """Which of the tokens to give logits for, counted from 0; one may be named several times."""


@dataclass(frozen=True)
class StepLogits:
    """What a step's forward pass says."""

    next: Tensor
    """[rows, vocab_size], in the order of the chunks: one row for a complete one, one for each of its forks, one for
    each token of its draft."""
    prompt: Tensor
    """[reported, vocab_size]: for prompt tokens whose probability is asked for."""
    reported: list[tuple[SequenceState, int]]
    """Whose token, and which of its prompt, each row of `prompt` is about."""


class Runner:
    """A model and the cache that it reads and fills."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.device = model.embed_tokens.weight.device

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepLogits:
        """Copy the blocks that the plan says, then compute its chunks."""
        for source, target in plan.copies:
            self.cache.copy_block(source, target)
        spans = [_span(chunk) for chunk in plan.chunks]
        rows, reported = _reported(plan.chunks)
        logits = self.forward(self.batch(spans, rows))
        split = len(logits) - len(reported)
        return StepLogits(logits[:split], logits[split:], reported)

    def forward(self, batch: StepBatch) -> Tensor:
        """Logits [R, vocab_size] of the rows that a batch on the host asks for; keys and values go to the cache."""
        batch = batch.to(self.device)
        hidden = self.model.hidden(batch.tokens[None], batch.positions, self.cache.attend(batch))
        return self.model.head(hidden[0, batch.logit_rows])

    def batch(self, spans: list[Span], more_rows: Sequence[int] = ()) -> StepBatch:
        """All spans, end to end, on the host; logits for the rows of each, in order, then for `more_rows` of it all."""
        # Plain lists: for the few numbers of a decoding step they take a third of the time of array operations.
        size = self.cache.block_size
        tokens, positions, slots = list[int](), list[int](), list[int]()
        rows, query_start, contexts = list[int](), [0], list[int]()
        for span in spans:
            rows += [len(tokens) + row for row in span.rows]
            tokens += span.tokens
            end = span.start + len(span.tokens)
            positions += range(span.start, end)
            slots += [span.blocks[p // size] * size + p % size for p in range(span.start, end)]
            query_start.append(len(tokens))
            contexts.append(end)
        widths = [ceil_div(end, size) for end in contexts]
        table = np.zeros((len(spans), max(widths)), dtype=np.int32)
        for row, span, width in zip(table, spans, widths, strict=True):
            row[:width] = span.blocks[:width]
        return StepBatch(
            tokens=_tensor(tokens, np.int64),
            positions=_tensor(positions, np.int64),
            slots=_tensor(slots, np.int64),
            query_start=_tensor(query_start, np.int32),
            context_len=_tensor(contexts, np.int32),
            block_table=torch.from_numpy(table),
            logit_rows=_tensor([*rows, *more_rows], np.int64),
        )


def _tensor(values: list[int], dtype: type[np.signedinteger[Any]]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=dtype))


def _span(chunk: Chunk) -> Span:
    sequence = chunk.sequence
    start, length = sequence.computed, chunk.length
    rows = [length - 1] * (1 + len(chunk.forks)) if chunk.complete else []
    rows += range(length, length + len(chunk.draft))
    return Span(start, [*sequence.tokens[start : start + length], *chunk.draft], sequence.blocks, rows)


def _reported(chunks: list[Chunk]) -> tuple[list[int], list[tuple[SequenceState, int]]]:
    """The rows that tell the probability of a prompt token for those who asked, and which token that is."""
    rows: list[int] = []
    about: list[tuple[SequenceState, int]] = []
    start = 0
    for chunk in chunks:
        sequence = chunk.sequence
        if sequence.params.prompt_logprobs is not None and not sequence.output:
            first = sequence.computed
            known = min(chunk.length, len(sequence.prompt) - 1 - first)
            rows += range(start, start + known)
            about += [(sequence, first + i + 1) for i in range(known)]
        start += chunk.length + len(chunk.draft)
    return rows, about
