"""The rows of CSV and TSV, whose first line names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from llama_ray.data.records.columns import missing_column
from llama_ray.data.records.lines import lines
from llama_ray.data.records.reading import Reading, Text
from llama_ray.data.records.text import NotTextError, is_unicode, text_of_record
from llama_ray.data.sources.blocks import DamagedError
from llama_ray.data.sources.left_out import NOT_ROW, NOT_UTF8, TOO_LONG

COMMA, TAB = ",", "\t"


def csv_header(blocks: Iterator[bytes], delimiter: str, limit: int) -> list[str]:
    """Return the names of the columns; none if the file has no first line that can be read."""
    try:
        return next(_rows(_Lines(blocks, limit), delimiter, limit), [])
    except (csv.Error, _LongLineError, DamagedError):
        return []


def csv_rows(reading: Reading, blocks: Iterator[bytes], delimiter: str) -> Iterator[Text]:
    """Yield the text of each row. Raises SourceError if the first line lacks a column of `reading.fields`."""
    limit = reading.max_record_bytes
    source = _Lines(blocks, limit)
    rows = _rows(source, delimiter, limit)
    header: list[str] | None = None
    number = 0
    while True:
        line = source.number + 1
        try:
            row = next(rows, None)
            if row is None:
                return
            if header is None:
                header = row
                _check_header(reading, header)
                continue
            if not row:
                continue
            number += 1
            yield Text(_text(row, header, reading), number - 1, f":{line}")
        except NotTextError as error:
            reading.bad(error.reason, f":{line}", detail=error.detail)
        except _LongLineError:
            reading.bad(TOO_LONG, f":{line}")
        except csv.Error as error:
            reading.bad(f"not CSV ({error})", f":{line}")
        except DamagedError as error:
            reading.bad(str(error), f":{line}", unit="stream")
            return


class _LongLineError(Exception):
    """A line that was too long to be read."""


class _Lines:
    """The lines of a file as text, which may hold bytes that are not UTF-8 as half surrogate pairs."""

    def __init__(self, blocks: Iterator[bytes], limit: int) -> None:
        self.number = 0
        self._lines = lines(blocks, limit)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        self.number += 1
        if line is None:
            raise _LongLineError
        text = line.decode(errors="surrogateescape")
        return (text.removeprefix("\ufeff") if self.number == 1 else text) + "\n"


def _rows(source: _Lines, delimiter: str, limit: int) -> Iterator[list[str]]:
    # The module has one limit for the whole process.
    csv.field_size_limit(limit)
    # Not strict, a quotation mark that is never closed would make a text of the rest of the file.
    return csv.reader(source, delimiter=delimiter, strict=True)


def _check_header(reading: Reading, header: list[str]) -> None:
    for name in reading.fields.names if reading.fields.required else ():
        if header.count(name) != 1:
            raise missing_column(reading.file, name, header)


def _text(row: list[str], header: list[str], reading: Reading) -> str:
    """Return the text of a row. Raises NotTextError."""
    if len(row) != len(header):
        raise NotTextError(NOT_ROW)
    wanted = reading.fields.names
    record = {name: value for name, value in zip(header, row, strict=True) if name in wanted}
    if not all(map(is_unicode, record.values())):
        raise NotTextError(NOT_UTF8)
    return text_of_record(record, reading.fields)
