"""A plan -> tensors -> one forward pass -> logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_ray.generation.batch import StepBatch
from llama_ray.generation.kv_cache import KVCache
from llama_ray.generation.scheduler import Chunk, Plan
from llama_ray.generation.sequence import Sequence
from llama_ray.model.llama import Llama


class RunnerError(RuntimeError):
    """The runner cannot go on, whatever it is given to run; the message gives the cause."""


@dataclass(frozen=True)
class StepLogits:
    """What a step's forward pass says."""

    next: Tensor
    """[rows, vocab_size], in the order of the chunks: one row for a complete one, one for each of its forks, one for
    each token of its draft."""
    prompt: Tensor
    """[reported, vocab_size]: for prompt tokens whose probability is asked for."""
    reported: list[tuple[Sequence, int]]
    """Whose token, and which of its prompt, each row of `prompt` is about."""


class Runner:
    """A model and the cache that it reads and fills."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.device = model.embed_tokens.weight.device

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepLogits:
        """Copy the blocks that the plan says, then compute its chunks."""
        for source, target in plan.copies:
            self.cache.copy_block(source, target)
        rows, reported = _reported(plan.chunks)
        logits = self.forward(self.batch(plan.chunks, rows))
        split = len(logits) - len(reported)
        return StepLogits(logits[:split], logits[split:], reported)

    def forward(self, batch: StepBatch) -> Tensor:
        """Logits [R, vocab_size] of the rows that the batch asks for; keys and values go to the cache."""
        hidden = self.model.hidden(batch.tokens[None], batch.positions, self.cache.attend(batch))
        return self.model.head(hidden[0, batch.logit_rows])

    def batch(self, chunks: list[Chunk], reported: list[int]) -> StepBatch:
        """The tokens of all chunks, end to end."""
        tokens: list[int] = []
        rows: list[int] = []
        starts, lengths, contexts, widths = [], [], [], []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.computed
            tokens += (
                sequence.tokens[start : start + chunk.length]
                if chunk.length > 1
                else (sequence.tokens[start],)
            )
            last = len(tokens) - 1
            if chunk.complete:
                rows += [last] * (1 + len(chunk.forks))
                tokens += chunk.draft
                rows += range(last + 1, len(tokens))
            length = chunk.length + len(chunk.draft)
            starts.append(start)
            lengths.append(length)
            contexts.append(start + length)
            widths.append(-(-(start + length) // self.cache.block_size))
        table = np.zeros((len(chunks), max(widths)), dtype=np.int32)
        for row, chunk, width in zip(table, chunks, widths, strict=True):
            row[:width] = chunk.sequence.blocks[:width]
        query_start = np.zeros(len(chunks) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_start[1:])
        within = np.arange(len(tokens)) - np.repeat(query_start[:-1], lengths)
        positions = within + np.repeat(np.array(starts), lengths)
        blocks = table[np.repeat(np.arange(len(chunks)), lengths), positions // self.cache.block_size]
        slots = blocks.astype(np.int64) * self.cache.block_size + positions % self.cache.block_size
        return StepBatch(
            tokens=self._put(np.array(tokens, dtype=np.int64)),
            positions=self._put(positions),
            slots=self._put(slots),
            query_start=self._put(query_start),
            context_len=self._put(np.array(contexts, dtype=np.int32)),
            block_table=self._put(table),
            logit_rows=self._put(np.array(rows + reported, dtype=np.int64)),
        )

    def _put(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)


def _reported(chunks: list[Chunk]) -> tuple[list[int], list[tuple[Sequence, int]]]:
    """The rows that tell the probability of a prompt token for those who asked, and which token that is."""
    rows: list[int] = []
    about: list[tuple[Sequence, int]] = []
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
