"""Pieces: ranges of files that are read at once, so that a corpus need not fit into memory."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.text import BYTE_ORDER_MARK, NotTextError, text_of_bytes, text_of_record
from llama_ray.data.sources.files import File, SourceError, has_changed, is_json_lines, open_file
from llama_ray.data.sources.left_out import LeaveOut, LeftOut
from llama_ray.utils.errors import first_line, printable

DOCUMENT_BYTES = 256 * 1024
"""A longer text file is cut into documents of at most this size."""

MAX_RECORD_BYTES = 64 * 1024 * 1024
"""A longer record is left out, unless the caller says otherwise."""

_WHOLE_BYTES = 1024 * 1024
"""A `.jsonl` file of at most this size is read at once to find its lines."""


class Piece(NamedTuple):
    """A byte range of a file: one text, or in a `.jsonl` file some lines with one text each."""

    file: File
    start: int
    stop: int

    @property
    def id(self) -> str:
        """Identifier of the piece within its source."""
        return f"{self.file.name}:{self.start}"

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    def uniform(self, seed: int) -> float:
        """Return a pseudo-random number in [0, 1) that depends on `seed` and `id` only."""
        key = f"{seed}:{self.id}".encode(errors="surrogateescape")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") / 2**64


def split_file(file: File) -> Iterator[Piece]:
    """Cut a text file into documents of at most DOCUMENT_BYTES, and a `.jsonl` file between lines."""
    starts: Iterable[int] = [0]
    if is_json_lines(file.name):
        starts = _line_starts(file)
    elif file.size > DOCUMENT_BYTES:
        starts = _text_starts(file)
    start = None
    for next_start in starts:
        if start is not None:
            yield Piece(file, start, next_start)
        start = next_start
    if start is not None:
        yield Piece(file, start, file.size)


class Text(NamedTuple):
    """One text, and where it is in its file.

    `offset` is the byte where it begins in a file of text or lines, and the number of its record, from 0, in others.
    """

    text: str
    offset: int


def read(
    piece: Piece, fields: TextFields, leave_out: LeaveOut, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Text]:
    """Yield the texts of a piece, and call `leave_out` for each text or record that is bad.

    Records of more than `max_record_bytes` are left out without being loaded. Raises SourceError for a file that was
    removed or changed since it was found.
    """
    file = piece.file
    content = _content(piece)
    records = is_json_lines(file.name)
    for offset, line in _lines(content) if records else [(0, content)]:
        try:
            text = text_of_record(line, fields) if records else text_of_bytes(line)
        except NotTextError as error:
            position = piece.start + offset + error.offset
            unit = "record" if records else "document"
            leave_out(LeftOut(unit, error.reason, file.name, file.root, file.path, position))
        else:
            yield Text(text, piece.start + offset)


def _content(piece: Piece) -> bytes:
    file = piece.file
    try:
        with open_file(file.root, file.path) as stream:
            stream.seek(piece.start)
            content: bytes = stream.read(piece.size)
            changed = has_changed(file, stream)
    except OSError as error:
        raise SourceError(
            f"cannot read {printable(file.path)} ({error.strerror or first_line(error)}); restore it or start again"
        ) from error
    if changed:
        raise _changed(file)
    return content.removeprefix(BYTE_ORDER_MARK) if piece.start == 0 else content


def _changed(file: File) -> SourceError:
    return SourceError(f"{printable(file.path)} changed while it was read; start again")


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield each line that is not blank, with its offset."""
    offset = 0
    for line in content.split(b"\n"):
        if line.strip():
            yield offset, line
        offset += len(line) + 1


def _line_starts(file: File) -> Iterator[int]:
    """Yield where documents of a `.jsonl` file begin: at the line after every `step` bytes, blank lines left out."""
    # About 1000 documents a file at most, to keep their list short. All lines of a document are in one split.
    step = min(file.size // 1000, DOCUMENT_BYTES)
    with open_file(file.root, file.path) as opened:
        stream = io.BytesIO(opened.read(file.size)) if file.size <= _WHOLE_BYTES else opened
        mark = stream.read(len(BYTE_ORDER_MARK))
        start = _skip_blank(stream, len(mark) if mark == BYTE_ORDER_MARK else 0)
        while start < file.size:
            yield start
            start = _skip_blank(stream, _line_end(stream, start + step))


def _line_end(stream: BinaryIO, position: int) -> int:
    """Return the end of the line in which `position` is."""
    stream.seek(position)
    while block := stream.read(16 * 1024):
        if newline := block.find(b"\n") + 1:
            return position + newline
        position += len(block)
    return position


def _skip_blank(stream: BinaryIO, position: int) -> int:
    """Return the position of the first byte from `position` on that is not white space."""
    stream.seek(position)
    while block := stream.read(1024):
        if rest := block.lstrip():
            return position + len(block) - len(rest)
        position += len(block)
    return position


def _text_starts(file: File) -> Iterator[int]:
    """Yield the best place in the last quarter of each DOCUMENT_BYTES: a paragraph, else a line, else a character."""
    tail = DOCUMENT_BYTES // 4
    with open_file(file.root, file.path) as stream:
        start = 0
        yield start
        while start + DOCUMENT_BYTES < file.size:
            first = start + DOCUMENT_BYTES - tail
            stream.seek(first)
            block = stream.read(tail)
            if len(block) < tail:
                raise _changed(file)
            start = first + _best_end(block)
            yield start


def _best_end(block: bytes) -> int:
    blank_line = max(block.rfind(b"\n\n") + 2, block.rfind(b"\n\r\n") + 3)
    if blank_line > 3:
        return blank_line
    if b"\n" in block:
        return block.rfind(b"\n") + 1
    end = len(block) - 1
    while end > len(block) - 4 and block[end] & 0xC0 == 0x80:  # Inside a UTF-8 character.
        end -= 1
    return end
