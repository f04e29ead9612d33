"""Parts: groups of pieces of one source, each of which one task makes into one shard a split."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from llama_ray.data.preparing.corpus import Corpus, SourcePieces
from llama_ray.data.records.pieces import Piece
from llama_ray.data.sources.files import File

MAX_PARTS = 4096
"""A corpus has about so many parts at most, and one more a source, because each makes a file or two."""


@dataclass(frozen=True)
class Part:
    """Consecutive pieces of the source of this name; `index` counts the parts of all sources."""

    index: int
    source: str
    pieces: Sequence[Piece]

    @cached_property
    def size(self) -> int:
        """Size in bytes, as it is stored."""
        return sum(piece.size for piece in self.pieces)

    def to_json(self) -> str:
        """Serialise for another process."""
        return json.dumps([self.index, self.source, self.pieces])

    @classmethod
    def from_json(cls, text: str) -> Part:
        """Rebuild what `to_json` wrote."""
        index, source, pieces = json.loads(text)
        return cls(index, source, [Piece(File(*file), *place) for file, *place in pieces])


def divide(corpus: Corpus, part_bytes: int) -> list[Part]:
    """Divide a corpus into parts of at least `part_bytes` each, but for the last of a source."""
    size = max(part_bytes, corpus.size // MAX_PARTS)
    groups = [(source.source.name, group) for source in corpus.sources for group in _groups(source, size)]
    return [Part(index, name, group) for index, (name, group) in enumerate(groups)]


def _groups(source: SourcePieces, size: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    filled = 0
    for piece in source.pieces:
        group.append(piece)
        filled += piece.size
        if filled >= size:
            yield group
            group, filled = [], 0
    if group:
        yield group
