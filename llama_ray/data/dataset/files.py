"""The files of a dataset, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from llama_ray.data.dataset.info import DatasetInfo, read_info
from llama_ray.data.dataset.shards import PREPARE_AGAIN, DatasetError, OpenShard, Span, Starts, open_shard


class Place(NamedTuple):
    """Where a span of tokens is: the number of its shard in the split, its first token, and the one after its last."""

    shard: int
    start: int
    stop: int


class DatasetFiles(Protocol):
    """The files of a dataset; threads may share them."""

    location: str
    info: DatasetInfo

    def tokenizer_directory(self) -> Path:
        """Return a directory of this machine that holds the tokenizer."""

    def check(self, split: str) -> None:
        """Raise DatasetError for a shard that is missing or of another size, without reading its tokens."""

    def read(self, split: str, places: Sequence[Place]) -> list[Span]:
        """Return the spans at `places`, all read at once. Raises DatasetError or StorageError if that fails."""

    def starts(self, split: str, shard: int) -> Starts:
        """Return where the documents of shard number `shard` begin. Raises as `read` does."""

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if there is no such file."""

    def read_file(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes of a file from `start` to `stop`. Raises DatasetError, StorageError or OSError."""


class MountedFiles:
    """What datasets in a directory of this machine have in common."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def tokenizer_directory(self) -> Path:
        """See `DatasetFiles`."""
        return self._directory

    def size(self, name: str) -> int | None:
        """See `DatasetFiles`."""
        path = self._directory / name
        return path.stat().st_size if path.is_file() else None

    def read_file(self, name: str, start: int, stop: int) -> bytes:
        """See `DatasetFiles`."""
        with (self._directory / name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


def read_spans(shards: Sequence[OpenShard], places: Sequence[Place]) -> list[Span]:
    """Return the spans at `places` of these mapped shards; the disk reads them at once."""
    for shard, place in zip(shards, places, strict=True):
        shard.read_ahead(place.start, place.stop)
    return [shard.span(place.start, place.stop) for shard, place in zip(shards, places, strict=True)]


class LocalFiles(MountedFiles):
    """A dataset in a directory of this machine, or one that it mounts; its shards are mapped into memory."""

    def __init__(self, directory: str | Path) -> None:
        """Raise DatasetError for a directory that holds no dataset."""
        super().__init__(Path(directory))
        self.location = str(directory)
        self.info = read_info(directory)
        self._open: dict[str, OpenShard] = {}

    def check(self, split: str) -> None:
        """See `DatasetFiles`."""
        for number, shard in enumerate(self.info.splits[split]):
            if self.size(shard.file) != shard.bytes:
                # Says what is wrong with it.
                self._shard(split, number)

    def read(self, split: str, places: Sequence[Place]) -> list[Span]:
        """See `DatasetFiles`."""
        return read_spans([self._shard(split, place.shard) for place in places], places)

    def starts(self, split: str, shard: int) -> Starts:
        """See `DatasetFiles`."""
        return self._shard(split, shard).starts

    def _shard(self, split: str, number: int) -> OpenShard:
        expected = self.info.splits[split][number]
        # Two threads may open it at once; either result will do.
        if (shard := self._open.get(expected.file)) is None:
            path = self._directory / expected.file
            shard = open_shard(path)
            if (len(shard.tokens), len(shard.starts)) != (expected.tokens, expected.documents):
                raise DatasetError(
                    f"{path} holds {len(shard.tokens)} tokens; dataset.json says {expected.tokens}; {PREPARE_AGAIN}"
                )
            self._open[expected.file] = shard
        return shard
