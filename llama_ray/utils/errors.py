"""Messages of exceptions, for texts of one line."""

from __future__ import annotations

from llama_ray.utils.redact import redact


class UserError(ValueError):
    """What a user can mend; the message is one line with the way out, and shows no secret of a URI."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def first_line(error: BaseException) -> str:
    """Return the first line of the message of `error` without secrets; its class if it has no message."""
    lines = redact(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """Return the whole message of `error` in one line without secrets; its class if it has no message."""
    return " ".join(redact(str(error)).split()) or type(error).__name__
