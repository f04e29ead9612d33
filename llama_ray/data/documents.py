"""Documents: byte ranges of files, so that a corpus need not fit into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llama_ray.data.sources import File, SourceError, open_file

DOCUMENT_BYTES = 256 * 1024
"""A longer text file is cut into documents of at most this size."""


class NotUTF8Error(SourceError):
    """A document that is not UTF-8."""


class Document(NamedTuple):
    """A byte range of a `File` (see there for `name`, `root` and `path`).

    It holds one text, or in a `.jsonl` file some lines with one text each.
    """

    name: str
    root: str
    path: str
    start: int
    stop: int

    @property
    def id(self) -> str:
        """Identifier of the document within its source."""
        return f"{self.name}:{self.start}"

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    def uniform(self, seed: int) -> float:
        """Return a pseudo-random number in [0, 1) that depends on `seed` and `id` only."""
        digest = hashlib.blake2b(f"{seed}:{self.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64


def split_file(file: File) -> Iterator[Document]:
    """Cut a text file into documents of at most DOCUMENT_BYTES, and a `.jsonl` file between lines."""
    ends: Iterable[int] = [file.size]
    if file.name.endswith(".jsonl"):
        # About 1000 documents a file at most, to keep their list short. All lines of a document are in one split.
        ends = _line_ends(file, min(file.size // 1000, DOCUMENT_BYTES))
    elif file.size > DOCUMENT_BYTES:
        ends = _text_ends(file)
    start = 0
    for stop in ends:
        if stop > start:
            yield Document(file.name, file.root, file.path, start, stop)
            start = stop


def read(document: Document) -> Iterator[str]:
    """Yield the texts of a document, without empty ones.

    Raises NotUTF8Error, and SourceError for a file that was removed or changed or has an invalid `.jsonl` line.
    """
    try:
        with open_file(document.root, document.path) as file:
            file.seek(document.start)
            content = file.read(document.size)
    except OSError as error:
        raise SourceError(f"cannot read {document.path} ({error}); restore it or start again") from error
    if len(content) != document.size:
        raise SourceError(f"{document.path} became shorter while it was read; start again")
    try:
        text = content.decode("utf-8-sig" if document.start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise NotUTF8Error(
            f"{document.path} is not UTF-8 at byte {document.start + error.start}; convert it (iconv -t UTF-8)"
        ) from error
    if not document.name.endswith(".jsonl"):
        if text:
            yield text
        return
    for line in text.split("\n"):
        if line.strip():
            yield from _line_text(line, document)


def _line_text(line: str, document: Document) -> Iterator[str]:
    try:
        text = json.loads(line)["text"]
        # JSON may escape half of a surrogate pair, which is not a character.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(
            f"{document.path} has an invalid line after byte {document.start}: {line[:80]!r}; it must be "
            '{"text": "..."}'
        ) from error
    if text:
        yield text


def _line_ends(file: File, step: int) -> Iterator[int]:
    """Yield the end of the first line that reaches `step` bytes beyond the previous end."""
    with open_file(file.root, file.path) as opened:
        stop = 0
        while stop < file.size:
            position = stop + step
            while position < file.size:
                opened.seek(position)
                block = opened.read(max(2 * step, 16 * 1024))
                newline = block.find(b"\n")
                if newline >= 0:
                    position += newline + 1
                    break
                position += len(block) or file.size
            stop = min(position, file.size)
            yield stop


def _text_ends(file: File) -> Iterator[int]:
    """Yield the best end in the last quarter of each DOCUMENT_BYTES: of a paragraph, else a line, else a character."""
    tail = DOCUMENT_BYTES // 4
    with open_file(file.root, file.path) as opened:
        stop = 0
        while stop + DOCUMENT_BYTES < file.size:
            first = stop + DOCUMENT_BYTES - tail
            opened.seek(first)
            stop = first + _best_end(opened.read(tail))
            yield stop
        yield file.size


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
