"""The rows of parquet and of Arrow files and streams."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from llama_ray.data.records.columns import check_columns, row_place, texts_of_batch, top_columns
from llama_ray.data.records.fields import Fields
from llama_ray.data.records.reading import Reading, Text
from llama_ray.data.sources.blocks import DamagedError
from llama_ray.data.sources.files import File
from llama_ray.utils.errors import first_line

if TYPE_CHECKING:
    # pyarrow is imported at its first use, because models train and generate on machines that lack it.
    import pyarrow
    from pyarrow import parquet

_BUFFER_BYTES = 1024 * 1024
_BATCH_BYTES = 8 * 1024 * 1024
_MAX_BATCH_ROWS = 1024
_MAGIC = b"ARROW1"
_STREAM_START = 8
"""An Arrow file is its magic number and a stream, and then an index of it."""
_TRUNCATED = "Arrow data that end too early; the file is truncated"


class StorageFailureError(Exception):
    """Storage that cannot be read, which is no fault of what is in it; the cause is an OSError."""


class _Watched(io.RawIOBase):
    """A file whose own errors are told from those of what it holds: pyarrow raises OSError for both."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        position = stream.tell()
        stream.seek(0, io.SEEK_END)
        self._size = stream.tell()
        stream.seek(position)

    def read(self, size: int = -1) -> bytes:
        # Damaged data may ask for more than there is memory.
        left = max(self._size - self.tell(), 0)
        try:
            content: bytes = self._stream.read(min(size, left) if size >= 0 else left)
        except OSError as error:
            raise StorageFailureError from error
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._stream.seek(offset, whence)
        return int(self._stream.tell())

    def tell(self) -> int:
        return int(self._stream.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def row_groups(file: File, stream: Any, fields: Fields) -> list[int]:
    """Return the size in bytes of each row group of a parquet file; none if it cannot be read.

    Raises SourceError if it lacks a field.
    """
    try:
        with _damage("parquet"):
            opened = _open_parquet(stream)
            check_columns(file, opened.schema_arrow, fields)
            # Not the sizes of its columns: to ask a damaged file for them ends the process (pyarrow 25).
            sizes = [
                opened.metadata.row_group(index).total_byte_size for index in range(opened.num_row_groups)
            ]
    except DamagedError:
        return []
    total = max(sum(sizes), 1)
    return [file.size * size // total for size in sizes]


def parquet_rows(reading: Reading, stream: Any, start: int, stop: int) -> Iterator[Text]:
    """Yield the texts of row groups `start` to `stop`; what of a group comes after a damaged page is left out."""
    try:
        with _damage("parquet"):
            opened = _open_parquet(stream)
            check_columns(reading.file, opened.schema_arrow, reading.fields)
            rows = [opened.metadata.row_group(index).num_rows for index in range(opened.num_row_groups)]
    except DamagedError as error:
        reading.bad(str(error), "", unit="stream")
        return
    for group in range(start, stop):
        first = sum(rows[:group])
        done = 0
        # Near a damaged page, row by row: an error costs the whole batch.
        for batch_rows in (_batch_rows(opened, group), 1):
            try:
                for batch in _batches(opened, group, batch_rows, reading.fields, done):
                    yield from texts_of_batch(reading, batch, first + done)
                    done += batch.num_rows
                break
            except DamagedError as error:
                damage = str(error)
        else:
            place = f"{row_place(first + done)} to {first + rows[group]}"
            reading.bad(damage, place, unit="stream")


def arrow_rows(reading: Reading, stream: Any) -> Iterator[Text]:
    """Yield the texts of an Arrow file or stream, such as `datasets` writes, up to the first damaged batch."""
    number = 0
    try:
        with _damage("Arrow"):
            opened = _open_arrow(stream, None)
            check_columns(reading.file, opened.schema, reading.fields)
            columns = top_columns(opened.schema, reading.fields)
            opened = _open_arrow(stream, [opened.schema.get_field_index(name) for name in columns])
            for batch in opened:
                yield from texts_of_batch(reading, batch, number)
                number += batch.num_rows
        if not _has_end(stream):
            raise DamagedError(_TRUNCATED)
    except DamagedError as error:
        reading.bad(str(error), row_place(number), unit="stream")


def check_arrow(file: File, stream: Any, fields: Fields) -> None:
    """Raise SourceError if an Arrow file lacks a field; whoever reads one that is damaged tells of that."""
    with suppress(DamagedError), _damage("Arrow"):
        check_columns(file, _open_arrow(stream, None).schema, fields)


@contextmanager
def _damage(kind: str) -> Iterator[None]:
    """Raise DamagedError in place of what pyarrow raises for damaged data."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, MemoryError, UnicodeDecodeError) as error:
        raise DamagedError(f"{kind} data that are damaged ({first_line(error)})") from error


def _open_parquet(stream: Any) -> parquet.ParquetFile:
    from pyarrow import parquet

    # Buffered, or a whole column of a row group would be in memory.
    return parquet.ParquetFile(
        _Watched(stream), buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def _batch_rows(opened: parquet.ParquetFile, group: int) -> int:
    """Return how many rows to read at once, by the average size of a row."""
    metadata = opened.metadata.row_group(group)
    bytes_per_row = metadata.total_byte_size // max(metadata.num_rows, 1)
    return int(min(max(_BATCH_BYTES // max(bytes_per_row, 1), 1), _MAX_BATCH_ROWS))


def _batches(
    opened: parquet.ParquetFile, group: int, rows: int, fields: Fields, skipped: int
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the rows of a group after the first `skipped`, `rows` at a time. Raises DamagedError."""
    columns = list(fields.names) if fields.required else top_columns(opened.schema_arrow, fields)
    batches = opened.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
    while True:
        with _damage("parquet"):
            batch = next(batches, None)
        if batch is None:
            return
        if skipped < batch.num_rows:
            yield batch.slice(skipped)
        skipped = max(skipped - batch.num_rows, 0)


def _open_arrow(stream: Any, columns: list[int] | None) -> pyarrow.RecordBatchStreamReader:
    import pyarrow as pa

    stream.seek(0)
    is_file = stream.read(len(_MAGIC)) == _MAGIC
    stream.seek(_STREAM_START if is_file else 0)
    options = pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
    return pa.ipc.open_stream(_Watched(stream), options=options)


def _has_end(stream: Any) -> bool:
    """Whether a file ends as Arrow files and streams do, and not between two batches."""
    stream.seek(0)
    is_file = stream.read(len(_MAGIC)) == _MAGIC
    size = stream.seek(0, io.SEEK_END) or stream.tell()
    tail_bytes = len(_MAGIC) if is_file else 4
    stream.seek(max(size - tail_bytes, 0))
    tail = stream.read(tail_bytes)
    return bool(tail == (_MAGIC if is_file else b"\0\0\0\0"))
