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


def printable(text: str, limit: int = 200) -> str:
    r"""Return `text` without secrets on one line that any terminal can show, cut in the middle beyond `limit`.

    What cannot be printed is escaped; a byte of a file name that is not UTF-8 becomes `\xNN`.
    """
    text = redact(text)
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 2 :]}"
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    # Python puts U+DC80 to U+DCFF in place of the bytes 0x80 to 0xFF of a file name that are not UTF-8.
    byte = ord(character) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()
