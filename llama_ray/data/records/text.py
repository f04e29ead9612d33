"""The text of a piece of a file: bytes that must be UTF-8 without NUL, or a line of JSON that holds one text."""

from __future__ import annotations

import json

from llama_ray.data.records.fields import FieldError, TextFields
from llama_ray.data.sources.left_out import EMPTY, NO_TEXT, NOT_JSON, NOT_UTF8, NUL, TOO_DEEP

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class NotTextError(Exception):
    """A piece that is not text: the reason, and the byte where that shows."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.offset = reason, offset


def text_of_bytes(content: bytes) -> str:
    """Decode UTF-8. Raises NotTextError."""
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


def text_of_record(line: bytes, fields: TextFields) -> str:
    """Return the text of a line such as `{"text": "..."}`. Raises NotTextError."""
    content = text_of_bytes(line.removeprefix(BYTE_ORDER_MARK).strip())
    try:
        record = _DECODER.decode(content)
        text = fields.text_of(record)
    except RecursionError as error:
        raise NotTextError(TOO_DEEP) from error
    except FieldError as error:
        raise NotTextError(NO_TEXT) from error
    except ValueError as error:
        raise NotTextError(NOT_JSON) from error
    if not text:
        raise NotTextError(EMPTY)
    if "\0" in text:
        raise NotTextError(NUL)
    # JSON may escape half of a surrogate pair, which is not a character.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _record(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object's dict, without a text that is given twice: readers of JSON disagree on which one counts."""
    record = dict(pairs)
    if len(record) < len(pairs) and sum(key == "text" for key, _ in pairs) > 1:
        del record["text"]
    return record


# An int of 4300 digits or more cannot be read; no number matters here.
_DECODER = json.JSONDecoder(object_pairs_hook=_record, parse_int=float)
