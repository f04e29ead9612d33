"""The documents of plain text: a file of text is one, and a long one is cut where a paragraph or a line ends."""

from __future__ import annotations

from collections.abc import Iterator

from llama_ray.data.records.reading import Reading, Text
from llama_ray.data.records.text import BYTE_ORDER_MARK, NotTextError, text_of_bytes
from llama_ray.data.sources.blocks import DamagedError

LINE_END = b"\n"

DOCUMENT_BYTES = 256 * 1024
"""A longer text is cut into documents of at most this size, and of at least half of it but for the last."""

CUT_BYTES = DOCUMENT_BYTES // 4
"""Cut `k` is at the best place within this many bytes after byte `k * CELL_BYTES`, wherever the cuts before it are."""

CELL_BYTES = DOCUMENT_BYTES - CUT_BYTES


def documents(
    reading: Reading, blocks: Iterator[bytes], start: int = 0, stop: int | None = None
) -> Iterator[Text]:
    """Yield the documents between the cuts after bytes `start` and `stop`, multiples of CELL_BYTES; None for the end.

    `blocks` begin at `start`.
    """
    # Of a later piece, lines are counted only for what is told.
    whole = start == 0
    line = 1
    try:
        for offset, content in _cut(blocks, start, stop):
            try:
                yield Text(
                    text_of_bytes(content if offset else content.removeprefix(BYTE_ORDER_MARK)), offset
                )
            except NotTextError as error:
                place = f":{line + content.count(LINE_END, 0, error.offset)}"
                reading.bad(error.reason, place if whole else offset + error.offset, "document")
            if whole:
                line += content.count(LINE_END)
    except DamagedError as error:
        reading.bad(str(error), f":{line}", unit="stream")


def _cut(blocks: Iterator[bytes], start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the content of each document."""
    buffer = b""
    position = start
    cell = start // CELL_BYTES or 1
    skipped = start == 0
    while stop is None or cell * CELL_BYTES <= stop:
        first = cell * CELL_BYTES - position
        buffer = _filled(buffer, blocks, first + CUT_BYTES + 1)
        if len(buffer) <= first + CUT_BYTES:
            break
        end = first + best_end(buffer[first : first + CUT_BYTES])
        if skipped:
            yield position, buffer[:end]
        skipped = True
        buffer = buffer[end:]
        position += end
        cell += 1
    else:
        return
    if buffer:
        yield position, buffer


def _filled(buffer: bytes, blocks: Iterator[bytes], size: int) -> bytes:
    """Return `buffer` with blocks appended until it has `size` bytes or there are no more."""
    parts = [buffer]
    missing = size - len(buffer)
    while missing > 0 and (block := next(blocks, None)) is not None:
        parts.append(block)
        missing -= len(block)
    return b"".join(parts) if len(parts) > 1 else buffer


def best_end(block: bytes) -> int:
    """Return where to cut: after the last paragraph, else the last line, else the last character of UTF-8."""
    blank_line = max(block.rfind(b"\n\n") + 2, block.rfind(b"\n\r\n") + 3)
    if blank_line > 3:
        return blank_line
    if b"\n" in block:
        return block.rfind(b"\n") + 1
    end = len(block) - 1
    while end > len(block) - 4 and block[end] & 0xC0 == 0x80:  # Inside a UTF-8 character.
        end -= 1
    return end
