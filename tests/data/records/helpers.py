from __future__ import annotations

from pathlib import Path

from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import Piece, read, split_file
from llama_ray.data.records.reading import MAX_RECORD_BYTES, Text
from llama_ray.data.sources.find import files
from llama_ray.data.sources.left_out import Tally

TEXT = TextFields()


def pieces(source: Path | str, fields: TextFields = TEXT, tally: Tally | None = None) -> list[Piece]:
    """All pieces of a source, in the order of its files."""
    leave_out = (tally or Tally()).add
    return [piece for file in sorted(files(str(source), leave_out)) for piece in split_file(file, fields)]


def found(
    source: Path | str, fields: TextFields = TEXT, limit: int = MAX_RECORD_BYTES
) -> tuple[list[Text], Tally]:
    """All texts of a source, in the order of its files, and what is left out."""
    tally = Tally()
    taken = [
        text for piece in pieces(source, fields, tally) for text in read(piece, fields, tally.add, limit)
    ]
    return taken, tally


def taken(
    source: Path | str, fields: TextFields = TEXT, limit: int = MAX_RECORD_BYTES
) -> tuple[list[str], list[str]]:
    """All texts of a source, and a line for each reason why something was left out."""
    texts, tally = found(source, fields, limit)
    return [text.text for text in texts], tally.lines()


def texts(source: Path | str, fields: TextFields = TEXT) -> list[str]:
    """All texts of a source, from which nothing may be left out."""
    texts, lines = taken(source, fields)
    assert not lines, lines
    return texts
