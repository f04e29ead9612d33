"""Which fields of a record are its text: one field, or a template of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_FIELD = "text"


class FieldError(Exception):
    """A record whose fields do not give a text; the message is the reason."""


@dataclass(frozen=True)
class TextFields:
    r"""What makes the text of a record; plain text files have no fields and are their own text.

    Args:
        text_field: Field that holds the text; dots lead into nested objects, as in 'message.content'.
        template: Text with names of fields in braces, such as '{title}\n\n{body}', in place of one field; '{{' and '}}'
            are braces.
    """

    text_field: str = DEFAULT_FIELD
    template: str | None = None

    def __post_init__(self) -> None:
        self._parts()

    def text_of(self, record: object) -> str:
        """Return the text of a record. Raises FieldError where a field is missing or is no text."""
        return "".join(literal + (_field(record, name) if name else "") for literal, name in self._parts())

    def columns(self) -> list[str]:
        """Return the fields that are needed of a record, without repetition."""
        return list(dict.fromkeys(name for _, name in self._parts() if name))

    def _parts(self) -> list[tuple[str, str]]:
        """Return pairs of (literal text, name of the field that follows it, or '')."""
        if self.template is None:
            return [("", self.text_field)]
        raise ValueError("template is not supported yet")


def _field(record: object, name: str) -> str:
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            raise FieldError(f"no field {name!r}")
        record = record[part]
    if not isinstance(record, str):
        raise FieldError(f"field {name!r} is not text")
    return record
