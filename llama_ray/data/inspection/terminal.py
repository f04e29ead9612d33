"""Lines for a terminal: at most 80 columns wide, with colours only where they are shown as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 80

_BLOCKS = " ▏▎▍▌▋▊▉█"
# Control characters of a text would be commands to the terminal.
_KEPT = "\n\t"


@dataclass(frozen=True)
class Style:
    """How parts of a line stand out: by colours, or without them by characters."""

    colours: bool

    def title(self, text: str) -> str:
        """Return a heading."""
        return f"\033[1m{text}\033[0m" if self.colours else text

    def border(self, text: str) -> str:
        """Return a line between documents."""
        return f"\033[36m{text}\033[0m" if self.colours else text

    def untrained(self, text: str) -> str:
        """Return text that the loss mask leaves out."""
        return f"\033[2m{text}\033[0m" if self.colours else f"⟦{text}⟧"


def rule(text: str) -> str:
    """Return a line over the whole width that begins with `text`."""
    return f"── {text} ".ljust(WIDTH, "─")


def bar(share: float, width: int) -> str:
    """Return a bar of `width` columns, filled to this share; it shows something wherever the share is not 0."""
    eighths = round(share * width * 8)
    eighths = max(eighths, 1) if share else 0
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_BLOCKS[rest] if rest else "")).ljust(width)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return rows with their columns below each other, the first `left` ones aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def shown(text: str) -> str:
    r"""Return `text` with characters that are no text escaped, such as \x1b."""
    return "".join(
        character if character.isprintable() or character in _KEPT else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
