"""What a process of templates is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MARKS = "\U0010fffe", "\U0010ffff"
"""Begin and end what `{% generation %}` encloses; no message holds them, see `ChatEncoder`."""


class Cut(NamedTuple):
    """A conversation up to a message: its first `messages`, and whether the prompt for an answer follows.

    With `marks`, what `{% generation %}` encloses stands between MARKS.
    """

    messages: int
    add_generation_prompt: bool
    marks: bool = False


class Rendering(NamedTuple):
    """What to render: a template, its variables, the time that it sees, and which parts of `messages`, by default all.

    A text for each of the `cuts`, or one.
    """

    name: str
    variables: Mapping[str, Any]
    now: str | None = None
    cuts: Sequence[Cut] = ()
