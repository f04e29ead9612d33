"""Turn a step plan into tensors, run one forward pass, and return logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_ray.generation.adapters.active import ActiveAdapters
from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.kv_cache import KVCache
from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.generation.scheduling.step_plan import Chunk, StepPlan
from llama_ray.model.llama import Llama
from llama_ray.utils.integers import ceil_div


class RunnerError(RuntimeError):
    """The runner cannot compute any further step; the message gives the cause."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one sequence to compute, beginning at position `start`, with the sequence's cache `blocks`."""

    start: int
    tokens: list[int]
    blocks: list[int]
    rows: list[int]
    """Indices of the tokens to return logits for; an index may occur several times."""


@dataclass(frozen=True)
class StepLogits:
    """The logits of one step."""

    next: Tensor
    """[rows, vocab_size], for the next tokens, in the order of the chunks: one row for each complete chunk, each of its
    forks and each of its draft tokens."""
    prompt: Tensor
    """[reported, vocab_size], for prompt tokens whose probability was requested."""
    reported: list[tuple[SequenceState, int]]
    """For each row of `prompt`: the sequence, and which token the row predicts, as `PromptReport.next` counts them."""


class Runner:
    """Runs a model on a cache of keys and values, with the adapters of sequences that have one."""

    def __init__(self, model: Llama, cache: KVCache, adapters: ActiveAdapters | None = None) -> None:
        self.model, self.cache, self.adapters = model, cache, adapters or ActiveAdapters()
        self.device = model.embed_tokens.weight.device

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepLogits:
        """Copy blocks and compute chunks as planned."""
        for source, target in plan.copies:
            self.cache.copy_block(source, target)
        spans = [_span(chunk) for chunk in plan.chunks]
        rows, reported = _reported(plan.chunks)
        adapters = [
            (chunk.sequence.adapter, len(span.tokens)) for chunk, span in zip(plan.chunks, spans, strict=True)
        ]
        with self.adapters.rows(adapters):
            logits = self.forward(self.batch(spans, rows))
        split = len(logits) - len(reported)
        return StepLogits(logits[:split], logits[split:], reported)

    def forward(self, batch: StepBatch) -> Tensor:
        """Return the logits [R, vocab_size] for a batch in host memory; write its keys and values to the cache."""
        batch = batch.to(self.device)
        hidden = self.model.hidden(batch.tokens[None], batch.positions, self.cache.attend(batch))
        return self.model.head(hidden[0, batch.logit_rows])

    def batch(self, spans: list[Span], more_rows: Sequence[int] = ()) -> StepBatch:
        """Concatenate spans, in host memory.

        `logit_rows` are the rows of each span, in order, followed by `more_rows` of the whole batch.
        """
        if not more_rows and all(span.rows == [0] and len(span.tokens) == 1 for span in spans):
            return self._decoding(spans)
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
        return StepBatch(
            tokens=_tensor(tokens, np.int64),
            positions=_tensor(positions, np.int64),
            slots=_tensor(slots, np.int64),
            query_start=_tensor(query_start, np.int32),
            context_len=_tensor(contexts, np.int32),
            block_table=_table(spans, contexts, size),
            logit_rows=_tensor([*rows, *more_rows], np.int64),
        )

    def _decoding(self, spans: list[Span]) -> StepBatch:
        """Return what `batch` does, for one token of each span."""
        size = self.cache.block_size
        starts = [span.start for span in spans]
        slots = [
            span.blocks[start // size] * size + start % size
            for span, start in zip(spans, starts, strict=True)
        ]
        contexts = [start + 1 for start in starts]
        count = len(spans)
        return StepBatch(
            tokens=_tensor([span.tokens[0] for span in spans], np.int64),
            positions=_tensor(starts, np.int64),
            slots=_tensor(slots, np.int64),
            query_start=torch.arange(count + 1, dtype=torch.int32),
            context_len=_tensor(contexts, np.int32),
            block_table=_table(spans, contexts, size),
            logit_rows=torch.arange(count),
        )


def _table(spans: list[Span], contexts: list[int], block_size: int) -> Tensor:
    """Return the blocks of each span's context, int32 [spans, blocks of the longest]."""
    widths = [ceil_div(end, block_size) for end in contexts]
    table = np.zeros((len(spans), max(widths)), dtype=np.int32)
    for row, span, width in zip(table, spans, widths, strict=True):
        row[:width] = span.blocks[:width]
    return torch.from_numpy(table)


def _tensor(values: list[int], dtype: type[np.signedinteger[Any]]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=dtype))


def _span(chunk: Chunk) -> Span:
    sequence = chunk.sequence
    start, length = sequence.computed, chunk.length
    rows = [length - 1] * (1 + len(chunk.forks)) if chunk.complete else []
    rows += range(length, length + len(chunk.draft))
    return Span(start, [*sequence.tokens[start : start + length], *chunk.draft], sequence.blocks, rows)


def _reported(chunks: list[Chunk]) -> tuple[list[int], list[tuple[SequenceState, int]]]:
    """Return the rows whose logits predict a token to report, and those tokens."""
    rows: list[int] = []
    predicted: list[tuple[SequenceState, int]] = []
    start = 0
    for chunk in chunks:
        sequence = chunk.sequence
        if not sequence.prompt_report.complete:
            # After a preemption the first tokens are reported already.
            last = len(sequence.prompt) - 1
            end = sequence.computed + chunk.length
            # The logits of the prompt's last token predict whatever may follow it.
            end = end if end <= last else last + len(sequence.params.prompt_logprobs_next)
            # After a preemption the first tokens are reported already.
            positions = range(max(sequence.computed + 1, sequence.prompt_report.next), end + 1)
            rows += [start + min(position - 1, last) - sequence.computed for position in positions]
            predicted += [(sequence, position) for position in positions]
        start += chunk.length + len(chunk.draft)
    return rows, predicted
