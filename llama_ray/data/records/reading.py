"""What the readers of all formats share: the file, what is text in it, and where bad records are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llama_ray.data.records.fields import Fields
from llama_ray.data.sources.files import File
from llama_ray.data.sources.left_out import LeaveOut, LeftOut

MAX_RECORD_BYTES = 64 * 1024 * 1024
"""A longer record is left out, unless the caller says otherwise."""


class Text(NamedTuple):
    """One text, and where it is in its file.

    `offset` is the byte of the (decompressed) content where it begins in files of text and JSON Lines, and the number
    of its record, from 0, in others. `place` is how a message names it, such as ':17' for a line, where the offset does
    not tell.
    """

    text: str
    offset: int
    place: str = ""


@dataclass(frozen=True)
class Reading:
    """One pass over a piece of a file."""

    file: File
    fields: Fields
    leave_out: LeaveOut
    max_record_bytes: int

    def bad(self, reason: str, place: int | str, unit: str = "record", detail: str = "") -> None:
        """Tell of a record that is no text, at a byte of the file or at a place such as ':17' for a line."""
        file = self.file
        offset, place = (place, "") if isinstance(place, int) else (None, place)
        self.leave_out(LeftOut(unit, reason, file.name, file.root, file.path, offset, place, detail))
