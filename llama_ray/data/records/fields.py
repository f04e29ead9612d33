"""Which fields of a record are its text: one field, or a template of several."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from llama_ray.utils.errors import UserError, printable

DEFAULT_FIELD = "text"

WAY_OUT = "name one with --text_field, or several with --template"

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class FieldError(Exception):
    """A record whose fields do not give a text: the reason, and a detail of this record's own."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Fields(Protocol):
    """What makes the text of a record."""

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are read of a record, each once."""

    @property
    def required(self) -> bool:
        """Whether a record has all of them, and each is text; files of plain text are then texts, too."""

    def text_of(self, record: Mapping[str, object]) -> str:
        """Return the text of a record. Raises FieldError."""


class TextFieldsError(UserError):
    """A field or a template that cannot be."""


@dataclass(frozen=True)
class TextFields:
    r"""What makes the text of a record; plain text files have no fields and are their own text.

    Args:
        text_field: Field that holds the text; dots lead into nested objects, as in 'message.content'.
        template: Text with names of fields in braces, such as '{title}\n\n{body}', in place of one field; '{{' and '}}'
            are braces, '\\n' and '\\t' the characters that they mean.

    Raises TextFieldsError, a ValueError, for what can be neither.
    """

    text_field: str = DEFAULT_FIELD
    template: str | None = None

    def __post_init__(self) -> None:
        if not _is_name(self.text_field):
            raise TextFieldsError(
                f"text_field is {printable(self.text_field)!r}; it must be the name of a field, with dots between the "
                "names of nested ones; give one such as text or message.content"
            )
        if self.template is not None and self.text_field != DEFAULT_FIELD:
            raise TextFieldsError("text_field and template are both given; give one of them")
        if not self.names:
            raise TextFieldsError(
                f"template is {printable(self.template or '')!r}; it must name a field in braces, as in '{{title}}'"
            )

    @property
    def required(self) -> bool:
        """See `Fields`."""
        return True

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The fields that are needed of a record, each once."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name))

    def text_of(self, record: Mapping[str, object]) -> str:
        """Return the text of a record. Raises FieldError where a field is missing or is no text."""
        # The usual case, at half the price.
        text = record.get(self.text_field) if self.template is None else None
        if isinstance(text, str):
            return text
        return self._join([_value(record, name) for name in self.names])

    def _join(self, values: Sequence[object]) -> str:
        """Return the text of a record that has these values for `names`. Raises FieldError for one that is no text."""
        for name, value in zip(self.names, values, strict=True):
            if not isinstance(value, str):
                kind = "null" if value is None else "not text"
                raise FieldError(f"field {printable(name)!r} is {kind}")
        if self.template is None:
            return str(values[0])
        by_name = dict(zip(self.names, values, strict=True))
        return "".join(f"{literal}{by_name[name]}" if name else literal for literal, name in self._parts)

    @functools.cached_property
    def _parts(self) -> list[tuple[str, str]]:
        """Pairs of a literal text and the name of the field that follows it, '' for none."""
        if self.template is None:
            return [("", self.text_field)]
        parts, literal, end = [], "", 0
        for match in _PIECE.finditer(self.template):
            literal += self.template[end : match.start()]
            end = match.end()
            name = match[1]
            if match[0] in ("{{", "}}"):
                literal += match[0][0]
            elif name is None or not _is_name(name):
                raise TextFieldsError(
                    f"template is {printable(self.template)!r}; {printable(match[0])!r} at character "
                    f"{match.start() + 1} must be the name of a field in braces; write {{{{ and }}}} for braces"
                )
            else:
                parts.append((literal, name))
                literal = ""
        parts.append((literal + self.template[end:], ""))
        return [(_unescaped(literal), name) for literal, name in parts]


def _unescaped(literal: str) -> str:
    # A shell hands over the two characters that were typed.
    return literal.replace("\\n", "\n").replace("\\t", "\t")


def _is_name(name: str) -> bool:
    return all(part.strip() for part in name.split("."))


def _value(record: Mapping[str, object], name: str) -> object:
    value: object = record
    # A name with dots may be that of one field.
    for part in [name] if name in record else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise FieldError(f"no field {printable(name)!r}, or two; {WAY_OUT}")
        value = value[part]
    return value
