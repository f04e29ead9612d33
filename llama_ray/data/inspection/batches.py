"""What the first batches of a run will hold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.dataset.shards import Span
from llama_ray.data.inspection.terminal import Style, rule
from llama_ray.data.inspection.text import decoded
from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.utils.targets import IGNORE_INDEX

_INDENT = 14


def first_batches(
    loader: Loader, tokenizer: Tokenizer, style: Style, *, steps: int, limit: int
) -> Iterator[str]:
    """Yield the sequences of the first `steps` global batches, with up to `limit` tokens of each document in them.

    `loader` is that of a run whose global batch one rank takes alone.
    """
    names = loader.mixture.names
    for step in range(1, steps + 1):
        first = loader.position
        batches = loader.next_global_batch()
        rows = sum(len(batch.inputs) for batch in batches)
        windows = loader.position - first
        length = batches[0].inputs.shape[1]
        sequences = f"{rows:,} sequence{'s' * (rows > 1)} of {length:,} tokens"
        yield style.title(f"step {step}: {sequences}, windows {first:,} to {loader.position - 1:,}")
        number = 0
        for batch in batches:
            for row in range(len(batch.inputs)):
                name = names[int(batch.sources[row])] if batch.sources is not None else names[0]
                window = first + number * windows // rows
                yield style.border(rule(f"sequence {number}, window {window:,}, {name}"))
                yield from _row(batch, row, tokenizer, style, limit)
                number += 1


def _row(batch: Batch, row: int, tokenizer: Tokenizer, style: Style, limit: int) -> Iterator[str]:
    """Yield the documents of a row, each with the positions of its first and last token."""
    ids = batch.inputs[row].numpy()
    targets = batch.targets[row].numpy()
    starts = np.zeros(len(ids), np.int64) if batch.starts is None else batch.starts[row].numpy()
    # The target of a position is the token after it. Whether the first token is learned is not known here.
    learned = np.append(True, targets[:-1] != IGNORE_INDEX)
    borders = [0, *(np.flatnonzero(np.diff(starts)) + 1).tolist(), len(ids)]
    # Nothing predicts the first token of a document; that is no mask.
    learned[borders[:-1]] = True
    for start, stop in pairwise(borders):
        span = Span(ids[start:stop], np.empty(0, np.int64), learned[start:stop])
        text = decoded(span, tokenizer, style, limit).replace("\n", f"\n{'':<{_INDENT}}")
        more = f" ... and {stop - start - limit:,} tokens" if stop - start > limit else ""
        yield f"{f'{start:>6}-{stop - 1}':<{_INDENT}}{text}{more}"
