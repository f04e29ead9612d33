"""Writes the texts of one split of a part as a shard."""

from __future__ import annotations

from llama_ray.data.dataset.shards import ShardWriter
from llama_ray.data.preparing.kept import Taken
from llama_ray.data.report.statistics import Document, Statistics
from llama_ray.data.tokenizing.encoder import DocumentEncoder

BORDERS = 2
"""Tokens of a document that are not of its text: bos and eos."""
_BATCH_CHARACTERS = 1024 * 1024
"""Texts are encoded when there are so many characters: few calls, little memory."""


class SplitWriter:
    """Encodes texts in batches and gives them to a shard; `compare` only counts tokens."""

    def __init__(
        self,
        shard: ShardWriter,
        source: str,
        encoder: DocumentEncoder,
        compare: DocumentEncoder | None = None,
    ) -> None:
        self.statistics = Statistics()
        self.compared_tokens = 0
        self._shard, self._source = shard, source
        self._encoder, self._compare = encoder, compare
        self._waiting: list[Taken] = []
        self._characters = 0

    def add(self, taken: Taken) -> None:
        """Append a document."""
        self._waiting.append(taken)
        self._characters += len(taken.text)
        if self._characters >= _BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Encode what waits; call it at the end."""
        if not self._waiting:
            return
        texts = [taken.text for taken in self._waiting]
        tokens, lengths = self._encoder.encode(texts)
        self._shard.add(tokens, lengths)
        self.statistics.add(
            self._source,
            (
                Document(taken.id, taken.text, length, taken.language)
                for taken, length in zip(self._waiting, lengths.tolist(), strict=True)
            ),
        )
        if self._compare is not None:
            tokens, lengths = self._compare.encode(texts)
            self.compared_tokens += len(tokens) - BORDERS * len(lengths)
        self._waiting, self._characters = [], 0
