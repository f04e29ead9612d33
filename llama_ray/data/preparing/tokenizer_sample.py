"""The texts that a tokenizer is trained on: a choice over the sources that depends on the seed only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from llama_ray.data.preparing.bad_records import BadRecords, TooManyBadRecordsError, too_many
from llama_ray.data.preparing.corpus import Corpus, SourcePieces, in_random_order
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.part_record import PartRecord
from llama_ray.data.preparing.reading import Reading, read_documents
from llama_ray.data.preparing.splits import number_of, split_of

SAMPLE_BYTES = 100_000_000
"""A tokenizer is trained on at most this much text; more takes long and changes few merges."""

BAD_SAMPLE_FILE = "bad-sample.jsonl"
"""Lists the bad records of the sample, in the folder WORK of the staging directory."""

_SMALLEST_SHARE = 4 * 1024 * 1024
"""So much is read of a piece, if it is that long, though there are many pieces."""


class TokenizerSample:
    """Yields texts of the training split, source after source, of each source its share of `size` characters.

    Of a source, pieces are read in a pseudo-random order until its share is filled, and of a piece that is much longer
    than others only the beginning; so no more is read than is needed. `shares` gives the share of a source, by default
    that of its bytes. A source that is smaller than its share is taken once.

    Raises SourceError as soon as there are more than `max_bad_records`: a field that no record has is known before
    anything is trained.
    """

    def __init__(
        self,
        corpus: Corpus,
        reading: Reading,
        staging: Path,
        output: Path,
        *,
        limit: float,
        max_bad_records: int = 0,
        shares: Mapping[str, float] | None = None,
        size: int = SAMPLE_BYTES,
    ) -> None:
        self._corpus, self._reading, self._size = corpus, reading, size
        self._bad_file, self._output = staging / WORK / BAD_SAMPLE_FILE, output
        self._limit, self._max_bad_records = limit, max_bad_records
        self._shares = shares or _shares_of_bytes(corpus)

    def __iter__(self) -> Iterator[str]:
        empty = True
        for text in self._checked(self._limit):
            empty = False
            yield text
        if empty:
            # So few texts that all of them are for validation, as it seems yet.
            yield from self._checked(limit=0)

    def _checked(self, limit: float) -> Iterator[str]:
        """Yield the texts that `limit` leaves for training. Raises SourceError for too many bad records."""
        with BadRecords(self._bad_file, self._max_bad_records) as bad:
            try:
                yield from self._texts(bad, limit)
            except TooManyBadRecordsError:
                pass
            else:
                return
        raise too_many(bad.count, self._max_bad_records, [self._bad_file], self._output)

    def _texts(self, bad: BadRecords, limit: float) -> Iterator[str]:
        for source in self._corpus.sources:
            if share := self._shares.get(source.source.name, 0):
                yield from self._texts_of(source, int(self._size * share), bad, limit)

    def _texts_of(self, source: SourcePieces, size: int, bad: BadRecords, limit: float) -> Iterator[str]:
        of_piece = max(size // max(len(source.pieces), 1), _SMALLEST_SHARE)
        left = size
        # What is left out is counted when it is tokenised.
        uncounted = PartRecord(limit)
        for piece in in_random_order(source, self._reading.seed):
            from_piece = min(of_piece, left)
            for taken in read_documents(source.source.name, [piece], self._reading, uncounted, bad):
                if split_of(number_of(self._reading.seed, taken.id), limit) == "train":
                    yield taken.text
                    from_piece -= len(taken.text)
                    left -= len(taken.text)
                if from_piece <= 0:
                    break
            if left <= 0:
                return


def _shares_of_bytes(corpus: Corpus) -> dict[str, float]:
    # A server may not say how long its file is, which then counts as much as the largest source.
    largest = max((source.size for source in corpus.sources), default=0) or 1
    sizes = {source.source.name: source.size or largest for source in corpus.sources}
    total = sum(sizes.values())
    return {name: size / total for name, size in sizes.items()}
