"""Records that should be text and are damaged: which ones they are, and how many are too many."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Self

from llama_ray.data.sources.files import BUILTIN, SourceError
from llama_ray.data.sources.left_out import LeftOut, Locations
from llama_ray.storage.atomic import replacing
from llama_ray.utils.errors import printable

BAD_RECORDS_FILE = "bad_records.jsonl"
"""The file of a dataset that lists what was left out as damaged."""

_NAMED = 3


class TooManyBadRecordsError(Exception):
    """A part has more bad records than all of the preparation may have."""


def is_bad(piece: LeftOut) -> bool:
    """Whether what was left out is damaged text, rather than no text at all.

    The standard library's tests bring files that are damaged on purpose: those are not the user's.
    """
    return piece.bad and piece.root != BUILTIN


class BadRecords:
    """Writes a line of JSON (source, file with line, reason) for each bad record; no file if there is none.

    Raises TooManyBadRecordsError for the record with which there are more than `most`; the file is then complete.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.count = 0
        self._path, self._most = path, most
        self._locations = Locations()
        self._file: BinaryIO | None = None
        self._open = ExitStack()

    def add(self, source: str, piece: LeftOut) -> None:
        """Write one record, if that is what was left out."""
        if not is_bad(piece):
            return
        if self._file is None:
            self._file = self._open.enter_context(replacing(self._path))
        self.count += 1
        reason = f"{piece.reason} ({piece.detail})" if piece.detail else piece.reason
        line = {"source": source, "record": self._locations.of(piece), "reason": reason}
        self._file.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())
        if self.count > self._most:
            raise TooManyBadRecordsError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()


def bad_file(work: Path, stage: str, part: int) -> Path:
    """Return the file for the bad records that a stage finds in a part."""
    return work / f"bad-{stage}-{part:05d}.jsonl"


def join(files: Iterable[Path], whole: Path) -> None:
    """Write those of `files` that exist to the file `whole`, one after the other; none if there are none."""
    found = [file for file in files if file.exists()]
    if not found:
        return
    with replacing(whole) as stream:
        for file in found:
            with file.open("rb") as part:
                shutil.copyfileobj(part, stream)


def report_beside(output: Path) -> Path:
    """Return the file that lists bad records where there is no dataset because of them."""
    return output.with_name(f"{output.name}.{BAD_RECORDS_FILE}")


def too_many(count: int, most: int, files: Iterable[Path], output: Path) -> SourceError:
    """Join `files` into the report beside `output`, and return the error that names the first bad records."""
    report = report_beside(output)
    join(files, report)
    with report.open("rb") as file:
        first = [json.loads(line) for line in islice(file, _NAMED)]
    named = "; ".join(f"{printable(bad['record'])}: {bad['reason']}" for bad in first)
    return SourceError(
        f"{count:,} bad record{'' if count == 1 else 's'} so far ({named}{'; ...' if count > len(first) else ''}); "
        f"max_bad_records is {most}; {printable(str(report))} lists them; mend them, or give a larger "
        "--max_bad_records, which leaves them out"
    )
