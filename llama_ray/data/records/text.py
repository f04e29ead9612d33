"""What is text, and what makes the text of a line of JSON."""

from __future__ import annotations

import json

from llama_ray.data.records.fields import FieldError, Fields
from llama_ray.data.sources.left_out import (
    EMPTY,
    HALF_CHARACTER,
    NOT_JSON,
    NOT_OBJECT,
    NOT_UTF8,
    NUL,
    TOO_DEEP,
)

_SPACE = " \t\r\n"
_LONGEST_INTEGER = 1000

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class NotTextError(Exception):
    """A document or record that is not text: the reason, the byte where that shows, and a detail of its own."""

    def __init__(self, reason: str, offset: int = 0, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.offset, self.detail = reason, offset, detail


def text_of_bytes(content: bytes) -> str:
    """Decode UTF-8 without NUL. Raises NotTextError."""
    nul = content.find(b"\0")
    if nul >= 0:
        raise NotTextError(NUL, nul)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise NotTextError(NOT_UTF8, error.start) from error
    if not text:
        raise NotTextError(EMPTY)
    return text


def text_of_line(line: bytes, fields: Fields) -> str:
    """Return the text of a line such as `{"text": "..."}`. Raises NotTextError."""
    return text_of_json(text_of_bytes(line), fields)


def text_of_json(content: str, fields: Fields) -> str:
    """Return the text of a JSON object. Raises NotTextError."""
    content = content.strip(_SPACE)
    try:
        record, end = DECODER.raw_decode(content)
    except RecursionError as error:
        raise NotTextError(TOO_DEEP) from error
    except ValueError as error:
        raise NotTextError(NOT_JSON) from error
    if end < len(content):
        raise NotTextError(NOT_JSON)
    return text_of_record(record, fields)


def text_of_record(record: object, fields: Fields) -> str:
    """Return the text of a record. Raises NotTextError."""
    if not isinstance(record, dict):
        raise NotTextError(NOT_OBJECT)
    try:
        return checked(fields.text_of(record))
    except FieldError as error:
        raise NotTextError(error.reason, detail=error.detail) from error


def checked(text: str) -> str:
    """Return a text. Raises NotTextError if it is empty or has NUL or half of a surrogate pair."""
    if not text:
        raise NotTextError(EMPTY)
    if "\0" in text:
        raise NotTextError(NUL)
    if not is_unicode(text):
        raise NotTextError(HALF_CHARACTER)
    return text


def is_unicode(text: str) -> bool:
    """Whether a text is without halves of surrogate pairs, which are no characters."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _record(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object's dict, without fields that are given twice: readers of JSON disagree on which one counts."""
    record = dict(pairs)
    if len(record) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                record.pop(key, None)
            seen.add(key)
    return record


def _integer(text: str) -> int | float:
    # An int of 4300 digits or more cannot be read.
    return int(text) if len(text) < _LONGEST_INTEGER else float(text)


DECODER = json.JSONDecoder(object_pairs_hook=_record, parse_int=_integer)
"""Reads JSON; `strict` as the standard is, but for NaN and Infinity."""
