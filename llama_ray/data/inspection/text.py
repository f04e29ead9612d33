"""Token ids as text in which the borders of documents and what is not learned can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from llama_ray.data.dataset.files import DatasetFiles, Place
from llama_ray.data.dataset.shards import Span
from llama_ray.data.inspection.terminal import Style, rule, shown
from llama_ray.data.tokenizing.tokenizer import Tokenizer


def decoded(span: Span, tokenizer: Tokenizer, style: Style, limit: int) -> str:
    """Return the text of the first `limit` tokens of a span, special tokens included."""
    ids = span.tokens[:limit]
    learned = np.ones(len(ids), np.bool_) if span.learned is None else span.learned[:limit]
    text = ""
    for start, stop in pairwise([0, *changes(learned), len(ids)]):
        part = shown(tokenizer.decode(ids[start:stop].tolist(), skip_special=False))
        text += part if start == stop or learned[start] else style.untrained(part)
    return text


def changes(values: npt.NDArray[np.bool_]) -> list[int]:
    """Return where a value differs from the one before it."""
    found: list[int] = (np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()
    return found


def samples(
    files: DatasetFiles, tokenizer: Tokenizer, style: Style, *, split: str, number: int, seed: int, limit: int
) -> Iterator[str]:
    """Yield `number` documents of a split, chosen by `seed`, with up to `limit` tokens of each."""
    shards = files.info.splits[split]
    ends = np.cumsum([shard.documents for shard in shards], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    random = np.random.Generator(np.random.PCG64(seed))
    chosen = random.choice(total, min(number, total), replace=False, shuffle=False)
    for document in sorted(chosen.tolist()):
        shard = int(ends.searchsorted(document, side="right"))
        starts = files.starts(split, shard)
        place = document - (int(ends[shard - 1]) if shard else 0)
        start = int(starts[place])
        stop = int(starts[place + 1]) if place + 1 < len(starts) else shards[shard].tokens
        [span] = files.read(
            split, [Place(shard, start, stop if files.info.row_tokens else min(stop, start + limit))]
        )
        stop -= _padding(span) if files.info.row_tokens else 0
        name = f"{split}: document {document + 1:,} of {total:,}, {stop - start:,} tokens, {shards[shard].source}"
        yield style.border(rule(name))
        yield decoded(span, tokenizer, style, min(limit, stop - start))
        if stop - start > limit:
            yield f"... and {stop - start - limit:,} tokens"


def _padding(span: Span) -> int:
    """Return how many equal tokens, none of which is learned, a document of rows ends with, but for the first."""
    same = span.tokens == span.tokens[-1]
    if span.learned is not None:
        same &= ~span.learned
    return max(int(np.argmin(same[::-1])) - 1, 0)
