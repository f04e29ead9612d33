"""Writes the examples of one split of a part as rows of a shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llama_ray.data.conversations.examples import Example
from llama_ray.data.conversations.rows import pack
from llama_ray.data.dataset.shards import ShardWriter
from llama_ray.data.report.statistics import Document, Statistics

_PACKED_TOKENS = 4 * 1024 * 1024
"""Examples are packed when there are so many tokens: few rows are left with room, little memory."""


class Encoded(NamedTuple):
    """What a record became: its id, its text for people, and its examples.

    Each of the `units` is one or more examples that follow each other in one row.
    """

    id: str
    text: str
    units: Sequence[Sequence[Example]]

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return sum(len(example.ids) for unit in self.units for example in unit)


class RowWriter:
    """Packs examples into rows of `row_tokens`, filled up with `padding`, and gives them to a shard."""

    def __init__(self, shard: ShardWriter, source: str, row_tokens: int, padding: int) -> None:
        self.statistics = Statistics()
        self.compared_tokens = 0
        self._shard, self._source = shard, source
        self._row_tokens, self._padding = row_tokens, padding
        self._waiting: list[Sequence[Example]] = []
        self._tokens = 0

    def add(self, encoded: Encoded) -> None:
        """Append the examples of a record, none of whose units is longer than a row."""
        self.statistics.add(self._source, [Document(encoded.id, encoded.text, encoded.tokens)])
        self._waiting += encoded.units
        self._tokens += encoded.tokens
        if self._tokens >= _PACKED_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what waits; call it at the end."""
        sizes = [sum(len(example.ids) for example in unit) for unit in self._waiting]
        rows = pack(sizes, self._row_tokens)
        tokens = np.full((len(rows), self._row_tokens), self._padding, np.uint32)
        learned = np.zeros((len(rows), self._row_tokens), np.bool_)
        lengths: list[int] = []
        for row, numbers in enumerate(rows):
            examples = [example for number in numbers for example in self._waiting[number]]
            end = sum(len(example.ids) for example in examples)
            tokens[row, :end] = np.concatenate([example.ids for example in examples])
            learned[row, :end] = np.concatenate([example.learned for example in examples])
            lengths += [len(example.ids) for example in examples]
            # Padding belongs to the last one.
            lengths[-1] += self._row_tokens - end
        self._shard.add(tokens.ravel(), np.array(lengths, np.int64), learned.ravel())
        self._waiting, self._tokens = [], 0
