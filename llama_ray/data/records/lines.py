"""Lines, without more than one of them in memory, and the texts of JSON Lines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from llama_ray.data.records.reading import Reading, Text
from llama_ray.data.records.text import BYTE_ORDER_MARK, NotTextError, text_of_line
from llama_ray.data.sources.blocks import DamagedError
from llama_ray.data.sources.left_out import TOO_LONG


def lines(blocks: Iterator[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line without its end, and its offset; None, and its content is dropped, for one of over `limit` bytes.

    A line that is too long comes as soon as that is known.
    """
    offset = size = 0
    held: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        held.append(first)
        known, size = size > limit, size + len(first)
        if size > limit:
            held.clear()
            if not known:
                yield offset, None
        if not others:
            continue
        if size <= limit:
            yield offset, b"".join(held)
        offset += size + 1
        last = others.pop()
        for line in others:
            yield offset, line if len(line) <= limit else None
            offset += len(line) + 1
        held, size = [last], len(last)
        if size > limit:
            held.clear()
            yield offset, None
    if 0 < size <= limit:
        yield offset, b"".join(held)


def after_line(blocks: Iterator[bytes], position: int, stop: int) -> tuple[int, Iterator[bytes]]:
    """Skip the line in which `blocks`, which begin at byte `position`, begin.

    Returns where the next line begins, and the blocks from there on; no blocks if that is not before `stop`.
    """
    for block in blocks:
        end = block.find(b"\n") + 1
        if end:
            return position + end, itertools.chain([block[end:]], blocks)
        position += len(block)
        if position >= stop:
            break
    return stop, iter(())


def json_lines(reading: Reading, blocks: Iterator[bytes], start: int, stop: int | None) -> Iterator[Text]:
    """Yield the texts of the lines that begin from byte `start` up to `stop`, None for the end of the file.

    `blocks` begin at `start`, or at the byte before it unless that is 0.
    """
    if start:
        assert stop is not None
        start, blocks = after_line(blocks, start - 1, stop)
    whole = start == 0
    number = 0
    try:
        for offset, line in lines(blocks, reading.max_record_bytes):
            position = start + offset
            if stop is not None and position >= stop:
                return
            number += 1
            # Of a later piece, lines are counted only for what is told.
            place = f":{number}" if whole else ""
            if line is None:
                reading.bad(TOO_LONG, place or position)
                if stop is not None and position + reading.max_record_bytes >= stop:
                    return
                continue
            line = line.removeprefix(BYTE_ORDER_MARK)
            if not line or line.isspace():
                continue
            try:
                yield Text(text_of_line(line, reading.fields), position, place)
            except NotTextError as error:
                reading.bad(error.reason, place or position, detail=error.detail)
    except DamagedError as error:
        reading.bad(str(error), f":{number + 1}", unit="stream")
