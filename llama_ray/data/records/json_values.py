"""The records of a JSON file: an array of objects, or objects one after the other, read without the whole of it."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from llama_ray.data.records.reading import Reading, Text
from llama_ray.data.records.text import DECODER, NotTextError, is_unicode, text_of_record
from llama_ray.data.sources.blocks import BLOCK_BYTES, DamagedError
from llama_ray.data.sources.left_out import NOT_JSON, NOT_UTF8, TOO_DEEP, TOO_LONG

_BETWEEN = re.compile(r"[\s,\[\]\ufeff]*")
_NEXT_OBJECT = re.compile(r"\}\s*,?\s*\{")
_KEPT = 64
"""Characters that are searched again when more are there: one of the above is hardly longer."""
_LONGEST_LITERAL = len("-Infinity")
_OPEN = "an array that does not end; the file is truncated"


def json_values(reading: Reading, blocks: Iterator[bytes]) -> Iterator[Text]:
    """Yield the text of each object. After a broken one, reading goes on where the next object seems to begin."""
    values = _Values(blocks, reading.max_record_bytes)
    number, broken = 0, False
    try:
        while values.find():
            try:
                yield Text(text_of_record(values.read(), reading.fields), number)
            except NotTextError as error:
                reading.bad(error.reason, values.place, detail=error.detail)
            except _BrokenError as error:
                reading.bad(str(error), values.place)
                broken = True
                values.recover()
            number += 1
        if values.depth > 0 and not broken:
            reading.bad(_OPEN, values.place, unit="stream")
    except DamagedError as error:
        reading.bad(str(error), values.place, unit="stream")


class _BrokenError(Exception):
    """A value whose end is not known; the message is the reason."""


class _Values:
    """The values of a file, one after the other: `find` goes to the next one, `read` returns it.

    `depth` is how many brackets were opened between values and not closed.
    """

    def __init__(self, blocks: Iterator[bytes], limit: int) -> None:
        self.depth = 0
        self._blocks, self._limit = blocks, limit
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        # What is at hand, where reading goes on in it, where the last value began, and the line at its beginning.
        self._text, self._position, self._start, self._line = "", 0, 0, 1
        self._is_unicode = True
        self._damage: DamagedError | None = None

    @property
    def place(self) -> str:
        """The line at which the last value begins, for `Reading.bad`."""
        return f":{self._line + self._text.count(chr(10), 0, self._start)}"

    def find(self) -> bool:
        """Go to the next value; False at the end of the file. Raises DamagedError there."""
        while True:
            between = _BETWEEN.match(self._text, self._position)
            assert between is not None
            self.depth += between[0].count("[") - between[0].count("]")
            self._position = self._start = between.end()
            if self._position < len(self._text):
                return True
            if not self._fill():
                if self._damage:
                    raise self._damage
                return False

    def read(self) -> object:
        """Return the value. Raises NotTextError for one that is no text, _BrokenError, DamagedError."""
        while True:
            self._start = self._position
            try:
                value, self._position = DECODER.raw_decode(self._text, self._start)
                break
            except RecursionError as error:
                raise _BrokenError(TOO_DEEP) from error
            except json.JSONDecodeError as error:
                if not self._is_cut(error):
                    raise _BrokenError(NOT_JSON) from error
                if len(self._text) - self._start > self._limit:
                    raise _BrokenError(TOO_LONG) from error
                if not self._fill():
                    raise self._damage or _BrokenError(NOT_JSON) from error
        if self._position - self._start > self._limit:
            raise NotTextError(TOO_LONG)
        if not self._is_unicode and not is_unicode(self._text[self._start : self._position]):
            raise NotTextError(NOT_UTF8)
        return value

    def recover(self) -> None:
        """Go to where the next object seems to begin, after a _BrokenError."""
        self._position = self._start
        while True:
            match = _NEXT_OBJECT.search(self._text, self._position)
            if match:
                self._position = match.end() - 1
                return
            self._position = max(self._position, len(self._text) - _KEPT)
            if not self._fill():
                self._position = len(self._text)
                return

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether a value may be broken only because more of it is to come."""
        return error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _LONGEST_LITERAL

    def _fill(self) -> bool:
        """Drop what was read, and double the rest; False if there is no more."""
        self._line += self._text.count("\n", 0, self._position)
        parts = [self._text[self._position :]]
        missing = max(BLOCK_BYTES, len(parts[0]))
        more = False
        try:
            while missing > 0 and (block := next(self._blocks, None)) is not None:
                parts.append(self._decoder.decode(block))
                missing -= len(block)
                more = True
        except DamagedError as error:
            self._damage = error
        self._text, self._position, self._start = "".join(parts), 0, 0
        self._is_unicode = all(map(is_unicode, parts))
        return more
