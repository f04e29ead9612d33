"""Pieces: what one reader takes at once of a file, so that a corpus need not fit into memory."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from llama_ray.data.records.arrow_files import (
    StorageFailureError,
    arrow_rows,
    check_arrow,
    parquet_rows,
    row_groups,
)
from llama_ray.data.records.columns import missing_column
from llama_ray.data.records.csv_rows import COMMA, TAB, csv_header, csv_rows
from llama_ray.data.records.documents import CELL_BYTES, CUT_BYTES, documents
from llama_ray.data.records.fields import Fields
from llama_ray.data.records.json_values import json_values
from llama_ray.data.records.lines import json_lines
from llama_ray.data.records.reading import MAX_RECORD_BYTES, Reading, Text
from llama_ray.data.sources.blocks import BLOCK_BYTES, blocks
from llama_ray.data.sources.files import BUILTIN, File, SourceError, has_changed, open_file
from llama_ray.data.sources.formats import Format
from llama_ray.data.sources.left_out import NOTHING, LeaveOut, LeftOut
from llama_ray.utils.errors import first_line, printable

PIECE_BYTES = 24 * CELL_BYTES
"""A file that can be read in ranges is cut into pieces of this size, 4.5 MiB, or into about MAX_PIECES larger ones."""

_MAX_PIECES = 4096
_FILES_AT_ONCE = 16
_END_BYTES = 64 * 1024
"""Bytes at a time after the end of a piece, for the rest of its last line."""


class Piece(NamedTuple):
    """A part of a file: the texts that begin in bytes `start` to `stop` of a file of text or lines.

    Of a parquet file, `start` and `stop` are row groups; of a file that is read from its beginning only, `stop` is its
    size. `size` is in bytes on disk.
    """

    file: File
    start: int
    stop: int
    size: int

    @property
    def id(self) -> str:
        """Identifier of the piece within its source."""
        return f"{self.file.name}:{self.start}"


def split_file(file: File, fields: Fields) -> Iterator[Piece]:
    """Yield the pieces of a file.

    Raises SourceError if it is a table that lacks a column of `fields`, or cannot be read.
    """
    form = file.layout.format
    if file.layout.in_ranges and file.seekable:
        cells = max(PIECE_BYTES, file.size // _MAX_PIECES) // CELL_BYTES
        # The last cut lies wholly within the file.
        last = max(file.size - CUT_BYTES, 1) if form is not Format.JSON_LINES else file.size
        starts = [*range(0, last, cells * CELL_BYTES), file.size]
        yield from (Piece(file, start, stop, stop - start) for start, stop in itertools.pairwise(starts))
    elif form is Format.PARQUET:
        with _opened(file) as stream:
            sizes = row_groups(file, stream, fields)
        yield from _groups(file, sizes) if sizes else [Piece(file, 0, 0, file.size)]
    else:
        with _opened(file) as stream:
            _check_columns(file, stream, fields)
        yield Piece(file, 0, file.size, file.size)


def split_files(files: Sequence[File], fields: Fields) -> Iterator[Piece]:
    """Yield the pieces of files, in their order; several at once where a server takes its time. Raises SourceError."""
    if all(file.root in ("", BUILTIN) for file in files):
        yield from (piece for file in files for piece in split_file(file, fields))
        return
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for pieces in pool.map(lambda file: list(split_file(file, fields)), files):
            yield from pieces


def read(
    piece: Piece, fields: Fields, leave_out: LeaveOut, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Text]:
    """Yield the texts of a piece, and call `leave_out` for each text or record that is bad.

    Memory is a small multiple of the largest record; one of more than `max_record_bytes` is left out, and not loaded
    but where its format (parquet, Arrow) holds it in one block with others. Raises SourceError for a file that was
    removed or changed since it was found, and for a table that lacks a column.
    """
    silent = True

    def told(left_out: LeftOut) -> None:
        nonlocal silent
        silent = False
        leave_out(left_out)

    reading = Reading(piece.file, fields, told, max_record_bytes)
    with _opened(piece.file) as stream:
        texts = _texts(reading, stream, piece)
        first = next(texts, None)
        if first is not None:
            yield first
            yield from texts
        elif silent and piece.size == piece.file.size:
            leave_out(LeftOut("file", NOTHING, piece.file.name))
        if has_changed(piece.file, stream):
            raise _changed(piece.file)


def _texts(reading: Reading, stream: Any, piece: Piece) -> Iterator[Text]:
    form, compression = piece.file.layout
    if form is Format.PARQUET:
        return parquet_rows(reading, stream, piece.start, piece.stop)
    if form is Format.ARROW:
        return arrow_rows(reading, stream)
    if piece.file.layout.in_ranges and piece.file.seekable:
        if form is Format.JSON_LINES:
            content = _range(stream, max(piece.start - 1, 0), piece.stop)
            return json_lines(reading, content, piece.start, piece.stop)
        content = _range(stream, piece.start, piece.stop)
        # The last document ends with the file.
        return documents(reading, content, piece.start, None if piece.stop == piece.file.size else piece.stop)
    content = blocks(stream, compression)
    if form is Format.JSON_LINES:
        return json_lines(reading, content, 0, None)
    if form is Format.JSON:
        return json_values(reading, content)
    if form in (Format.CSV, Format.TSV):
        return csv_rows(reading, content, COMMA if form is Format.CSV else TAB)
    return documents(reading, content)


def _range(stream: Any, start: int, stop: int) -> Iterator[bytes]:
    """Yield the content from `start` on: blocks that end at `stop`, and more of it for who goes on."""
    stream.seek(start)
    while block := stream.read(min(BLOCK_BYTES, stop - start) if start < stop else _END_BYTES):
        yield block
        start += len(block)


def _groups(file: File, sizes: list[int]) -> Iterator[Piece]:
    """Yield pieces of consecutive row groups of at least PIECE_BYTES, but for the last."""
    start = size = 0
    for index, group_size in enumerate(sizes):
        size += group_size
        if size >= PIECE_BYTES or index == len(sizes) - 1:
            yield Piece(file, start, index + 1, size)
            start, size = index + 1, 0


def _check_columns(file: File, stream: Any, fields: Fields) -> None:
    form, compression = file.layout
    if form is Format.ARROW:
        check_arrow(file, stream, fields)
    elif form in (Format.CSV, Format.TSV):
        delimiter = COMMA if form is Format.CSV else TAB
        header = csv_header(blocks(stream, compression), delimiter, MAX_RECORD_BYTES)
        for name in fields.names if header and fields.required else ():
            if header.count(name) != 1:
                raise missing_column(file, name, header)


@contextmanager
def _opened(file: File) -> Iterator[Any]:
    """Open a file that has not changed since it was found. Raises SourceError, also for an OSError of the block."""
    try:
        with open_file(file.root, file.path) as stream, _with_seek(file, stream) as readable:
            if has_changed(file, stream):
                raise _changed(file)
            yield readable
    except (OSError, StorageFailureError) as error:
        cause = error.__cause__ if isinstance(error, StorageFailureError) else error
        reason = getattr(cause, "strerror", None) or first_line(cause or error)
        raise SourceError(
            f"cannot read {printable(file.path)} ({reason}); restore it or start again"
        ) from error


@contextmanager
def _with_seek(file: File, stream: Any) -> Iterator[Any]:
    """Give a copy on disk of a file that its server sends only from the beginning, where the format needs more."""
    if file.seekable or file.layout.format not in (Format.PARQUET, Format.ARROW):
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy, BLOCK_BYTES)
        copy.seek(0)
        yield copy


def _changed(file: File) -> SourceError:
    return SourceError(f"{printable(file.path)} changed while it was read; start again")
