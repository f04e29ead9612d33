"""Cleaned texts of a part, in an Arrow file, until the duplicates among all texts are known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

import pyarrow as pa
from pyarrow import ipc

from llama_ray.storage.atomic import replacing

_BATCH_CHARACTERS = 1024 * 1024
# A path that is not UTF-8 may be part of an id.
_SCHEMA = pa.schema(
    [("id", pa.binary()), ("text", pa.large_string()), ("language", pa.string()), ("place", pa.string())]
)


class Taken(NamedTuple):
    """A text that a dataset takes, unless it repeats another one; its id, and its language if that was asked for.

    `place` is that of `Text`.
    """

    id: str
    text: str
    language: str = ""
    place: str = ""


class KeptWriter:
    """Writes texts to a file, which gets its name when the block ends well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open = ExitStack()
        self._waiting: list[Taken] = []
        self._characters = 0

    def add(self, text: Taken) -> None:
        """Append a text."""
        self._waiting.append(text)
        self._characters += len(text.text)
        if self._characters >= _BATCH_CHARACTERS:
            self._write()

    def _write(self) -> None:
        columns = [
            [text.id.encode(errors="surrogateescape") for text in self._waiting],
            [text.text for text in self._waiting],
            [text.language for text in self._waiting],
            [text.place for text in self._waiting],
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
        self._waiting, self._characters = [], 0

    def __enter__(self) -> Self:
        file = self._open.enter_context(replacing(self._path))
        options = ipc.IpcWriteOptions(compression="zstd")
        self._writer = self._open.enter_context(ipc.new_stream(file, _SCHEMA, options=options))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # An error, also one of the block, removes the unfinished file.
        with self._open:
            if error is not None:
                raise error
            self._write()


def read_kept(path: Path) -> Iterator[Taken]:
    """Yield the texts of a file of `KeptWriter`, a batch of which is in memory."""
    with path.open("rb") as file, ipc.open_stream(file) as reader:
        for batch in reader:
            for id, *rest in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield Taken(id.decode(errors="surrogateescape"), *rest)
