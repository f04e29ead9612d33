"""What an exception says, for messages that are one line long."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of the message of `error`, or the name of its class where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
