"""Messages of exceptions, for texts of one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of the message of `error`, or the name of its class if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
