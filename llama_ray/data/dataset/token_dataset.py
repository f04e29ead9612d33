"""One split of a dataset as windows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.dataset.files import DatasetFiles, Place
from llama_ray.data.dataset.locations import DEFAULT_CACHE_BYTES, open_files
from llama_ray.data.dataset.references import References, read_references
from llama_ray.data.dataset.shards import DatasetError, Span
from llama_ray.utils.targets import IGNORE_INDEX


class TokenDataset:
    """One split of a prepared dataset, which threads may share.

    The shards of the split follow each other without a gap. A window of `seq_len` is `seq_len + 1` consecutive tokens,
    of which the last is the next window's first: the last target of the one, the first input of the other. Where the
    data are rows (see `DatasetInfo`), a window is a row, whose last position has no target.
    """

    def __init__(
        self,
        data: str | Path | DatasetFiles,
        split: str,
        label: str | None = None,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """Use the files `data`, or those at that location: see `open_files`; of these, the shards with this `label`.

        Raises DatasetError for a directory, split or shard that is missing or damaged, and for an unknown label.
        """
        self._files = open_files(str(data), cache_bytes) if isinstance(data, str | Path) else data
        self.location, self.split = self._files.location, split
        self.info = self._files.info
        if split not in self.info.splits:
            raise DatasetError(
                f"{self.location} has no split {split!r}; choose one of {', '.join(sorted(self.info.splits))}"
            )
        self.vocab_size = self.info.vocab_size
        self._files.check(split)
        shards = list(enumerate(self.info.splits[split]))
        if label is not None:
            labels = sorted({shard.source for shards in self.info.splits.values() for shard in shards})
            if label not in labels:
                raise DatasetError(
                    f"{self.location} has no source {label!r}; choose one of {', '.join(labels)}"
                )
            shards = [(number, shard) for number, shard in shards if shard.source == label]
        self._label = label
        self._numbers = [number for number, _ in shards]
        # The number of tokens up to the end of each shard.
        self._ends = np.cumsum([shard.tokens for _, shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens of all splits, the label that chooses among them, and the weights of a reference."""
        reference = f"+{self.references.weights}" if self.references else ""
        return self.info.content_fingerprint + (f"#{self._label}" if self._label else "") + reference

    @cached_property
    def references(self) -> References | None:
        """How probable a reference model finds the answers; None but for pairs of which that has been computed."""
        return read_references(self._files) if self.info.task == "dpo" else None

    def num_windows(self, seq_len: int) -> int:
        """Return the number of windows of `seq_len` tokens in the split.

        Raises ValueError for a `seq_len` below 1 and, where the data are rows, for another one than theirs.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; it must be at least 1")
        row_tokens = self.info.row_tokens
        if row_tokens is None:
            return max(len(self) - 1, 0) // seq_len
        if seq_len != row_tokens:
            raise ValueError(
                f"seq_len is {seq_len}; it must be {row_tokens}, the length of the rows of {self.location}; leave it "
                f"out, or prepare the data again with --seq_len {seq_len}"
            )
        return len(self) // row_tokens

    def windows(self, indices: npt.NDArray[np.integer], seq_len: int, documents: bool = True) -> Batch:
        """Return the windows `indices` as one batch, a row each, read at once.

        With `documents`, the batch says where they begin, and the last token of a document has no target. The targets
        that the loss mask of the data leaves out are IGNORE_INDEX in any case. Raises DatasetError if a shard cannot
        be read any more.
        """
        width = seq_len + (self.info.row_tokens is None)
        places = [self._places(index * seq_len, width) for index in indices.tolist()]
        spans = iter(self._files.read(self.split, [place for row in places for place in row]))
        tokens = np.empty((len(indices), width), np.int64)
        borders = np.zeros((len(indices), width), np.int32)
        ignored = np.zeros((len(indices), width), np.bool_)
        for row, parts in enumerate(places):
            column = 0
            for _ in parts:
                column += _fill(next(spans), column, tokens[row], borders[row], ignored[row])
        if documents:
            ignored |= borders > 0
        targets = np.full((len(indices), seq_len), IGNORE_INDEX, np.int64)
        targets[:, : width - 1] = tokens[:, 1:]
        targets[:, : width - 1][ignored[:, 1:]] = IGNORE_INDEX
        starts = np.maximum.accumulate(borders[:, :seq_len], axis=1) if documents else None
        return Batch(
            torch.from_numpy(tokens[:, :seq_len].copy()),
            torch.from_numpy(targets),
            None if starts is None else torch.from_numpy(starts),
            reference=self._reference(places, seq_len) if self.references else None,
        )

    def _reference(self, places: Sequence[Sequence[Place]], seq_len: int) -> torch.Tensor:
        """Return `Batch.reference` of the rows at `places`."""
        assert self.references is not None
        reference = torch.zeros(len(places), seq_len)
        for row, parts in enumerate(places):
            column = 0
            for place in parts:
                starts = self._files.starts(self.split, place.shard)
                first, last = np.searchsorted(starts, (place.start, place.stop)).tolist()
                columns = torch.from_numpy(starts[first:last].astype(np.int64)) - place.start + column
                logprobs = self.references.of(self.split, place.shard)[first:last]
                reference[row, columns] = torch.from_numpy(logprobs)
                column += place.stop - place.start
        return reference

    def _places(self, start: int, count: int) -> list[Place]:
        """Return where `count` tokens from `start` on are, which may be in several shards."""
        places: list[Place] = []
        shard = int(self._ends.searchsorted(start, side="right"))
        while count:
            before = int(self._ends[shard - 1]) if shard else 0
            stop = min(start + count, int(self._ends[shard]))
            places.append(Place(self._numbers[shard], start - before, stop - before))
            count -= stop - start
            start, shard = stop, shard + 1
        return places


def _fill(
    span: Span,
    column: int,
    tokens: npt.NDArray[np.int64],
    borders: npt.NDArray[np.int32],
    ignored: npt.NDArray[np.bool_],
) -> int:
    """Copy a span to `column` of a row and what follows, and return its length.

    `borders` gets the column of each document's first token there.
    """
    end = column + len(span.tokens)
    tokens[column:end] = span.tokens
    borders[span.starts + column] = span.starts + column
    if span.learned is not None:
        ignored[column:end] = ~span.learned
    return len(span.tokens)
