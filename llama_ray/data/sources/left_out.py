"""What is not taken from a source: each piece with its reason, counted, so that nothing is left out in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from llama_ray.data.sources.files import open_file
from llama_ray.utils.errors import first_line, printable

EMPTY = "empty"
HIDDEN = "hidden, with a name that begins with a dot"
ARCHIVE = "archives, or compressed in a way that is not read; unpack them first"
DATA_SET_NOTES = "notes about a data set, not its records"
OTHER_SPLIT = "of another split than train; give their own folder or file to take them"
NOT_UTF8 = "not UTF-8; convert them (iconv -t UTF-8)"
NUL = "NUL characters in them, as in binary files and UTF-16; convert text (iconv -f UTF-16 -t UTF-8)"
NOT_A_FILE = "a FIFO, socket or device; only files are read"
NOWHERE = "links that lead nowhere"
TAKEN_ALREADY = "links to a folder that is taken already"
SAME_FILE = "the same file as another one, by a link"
OUTPUT = "in the output directory"
REPORT = "the report on bad records of an earlier preparation"
MATCHED_FOLDER = "matched by the glob, which takes files; end it with /** to take the files in them"
NOT_JSON = "not JSON"
NOT_OBJECT = "not a JSON object with fields"
TOO_DEEP = "nested too deeply"
TOO_LONG = "longer than a record may be (64 MiB); cut them into several"
HALF_CHARACTER = "half of a surrogate pair in them, which is no character"
NOT_ROW = "not as many fields as the first line has"
NOTHING = "without a record"
NO_RECORDS = "plain text, which has no conversations; give JSON Lines, JSON, CSV, parquet or Arrow"
NOT_CHOSEN = "beyond max_bytes"

_NOT_BAD = (EMPTY, NOT_CHOSEN)
_MAX_NAMES = 3
_MAX_COUNTED_BYTES = 2**30
"""Line numbers are found by reading the file up to the line, which beyond this takes too long."""


class LeftOut(NamedTuple):
    """A file, folder, document, record or stream (`unit`) that is not taken, and the reason.

    A document or record is found at `place` of its file, such as ':17' for a line, or else at byte `offset` of the file
    that `open_file` opens as `root` and `path`. A stream is the rest of a file after some damage. `detail` says what is
    wrong in this one.
    """

    unit: str
    reason: str
    name: str
    root: str = ""
    path: str = ""
    offset: int | None = None
    place: str = ""
    detail: str = ""

    @property
    def bad(self) -> bool:
        """Whether this is a bad record, and not one that is rightly left out, or a file."""
        return _is_bad(self.unit, self.reason)

    def location(self) -> str:
        """Return the name for a message, with the line if it is known, and the detail."""
        return Locations().of(self) + (f" ({self.detail})" if self.detail else "")


class Locations:
    """Finds the lines of pieces; of pieces of a file in their order, the file is read once."""

    def __init__(self) -> None:
        self._file = ("", "")
        # A byte and its line.
        self._known = (0, 1)

    def of(self, piece: LeftOut) -> str:
        """Return the name of a piece for a message, with the line if it is known."""
        name = printable(piece.name)
        if piece.offset is None:
            return name + piece.place
        if (piece.root, piece.path) != self._file or piece.offset < self._known[0]:
            self._file, self._known = (piece.root, piece.path), (0, 1)
        line = _line_number(*self._file, piece.offset, self._known)
        if line is None:
            return f"{name} at byte {piece.offset}"
        self._known = piece.offset, line
        return f"{name}:{line}"


LeaveOut = Callable[[LeftOut], None]
"""Called for each piece that is left out."""


class Tally:
    """Counts what is left out by unit and reason, and keeps the first names of each, in the order of the alphabet."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._first: dict[tuple[str, str], list[LeftOut]] = {}

    def add(self, piece: LeftOut) -> None:
        """Count one piece."""
        self._add(piece.unit, piece.reason, 1, [piece])

    def merge(self, other: Tally) -> None:
        """Count what `other` counted."""
        for (unit, reason), count in other._counts.items():
            self._add(unit, reason, count, other._first[unit, reason])

    @property
    def bad(self) -> int:
        """How many bad records were counted."""
        return sum(count for key, count in self._counts.items() if _is_bad(*key))

    def lines(self) -> list[str]:
        """Return a line for each reason, the most frequent first: `left out 2 files (a.gz, b.xz): compressed; ...`."""
        return [
            f"left out {count:,} {unit}{'' if count == 1 else 's'}{self._names(unit, reason)}: {reason}"
            for (unit, reason), count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        ]

    def counts(self) -> list[tuple[str, int, list[LeftOut]]]:
        """Return (`UNIT: REASON`, count, first pieces) of each reason, in the order of the alphabet."""
        return [
            (f"{unit}: {reason}", count, self._first[unit, reason])
            for (unit, reason), count in sorted(self._counts.items())
        ]

    def to_json(self) -> str:
        """Serialise for another process."""
        return json.dumps([[*key, count, self._first[key]] for key, count in self._counts.items()])

    @classmethod
    def from_json(cls, text: str) -> Tally:
        """Rebuild what `to_json` wrote."""
        tally = cls()
        for unit, reason, count, first in json.loads(text):
            tally._add(unit, reason, count, [LeftOut(*piece) for piece in first])
        return tally

    def _add(self, unit: str, reason: str, count: int, first: list[LeftOut]) -> None:
        key = unit, reason
        self._counts[key] = self._counts.get(key, 0) + count
        first = sorted([*self._first.get(key, []), *first], key=_order)
        self._first[key] = first[:_MAX_NAMES]

    def _names(self, unit: str, reason: str) -> str:
        named = [piece.location() for piece in self._first[unit, reason] if piece.name]
        if not named:
            return ""
        more = ", ..." if self._counts[unit, reason] > len(named) else ""
        return f" ({', '.join(named)}{more})"


def _order(piece: LeftOut) -> tuple[str, int, int, str]:
    """Sort by name and place: `:9` comes before `:10`."""
    return piece.name, piece.offset or 0, len(piece.place), piece.place


def _is_bad(unit: str, reason: str) -> bool:
    return unit not in ("file", "folder") and reason not in _NOT_BAD


def _line_number(root: str, path: str, offset: int, known: tuple[int, int] = (0, 1)) -> int | None:
    """Return the line of a byte of a file, given one byte before it and its line; None if it is too far."""
    start, line = known
    left = offset - start
    if left > _MAX_COUNTED_BYTES:
        return None
    try:
        with open_file(root, path) as file:
            file.seek(start)
            while left and (block := file.read(min(left, 2**20))):
                line += block.count(b"\n")
                left -= len(block)
    except OSError:
        return None
    return line


def cannot_be_read(error: OSError) -> str:
    """Return the reason for a file or folder that the system refuses."""
    return f"they cannot be read ({error.strerror or first_line(error)}); check their access rights"
