"""Batches of random tokens, with or without documents."""

from __future__ import annotations

from dataclasses import replace

import torch

from llama_ray.data.dataset.batch import Batch
from llama_ray.utils.targets import IGNORE_INDEX


def random_batch(vocab_size: int, batch_size: int, seq_len: int, documents: int = 0) -> Batch:
    """Return rows of an endless text whose documents have this mean length; 0: of one that never ends.

    A document ends at each position with the same chance, so lengths are spread as those of real text are: most are
    short and a few are long. The last token of a document has no target.
    """
    tokens = torch.randint(vocab_size, (batch_size, seq_len + 1))
    # Of a single row, contiguous parts would share memory.
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].clone())
    if not documents:
        return batch
    begins = torch.rand(batch_size, seq_len + 1) < 1 / documents
    batch.targets[begins[:, 1:]] = IGNORE_INDEX
    starts = torch.where(begins[:, :-1], torch.arange(seq_len), 0).cummax(1).values
    return replace(batch, starts=starts.int())
