"""What a job leaves on storage: its record, finished parts, and at the end the one file with all answers.

Beside the output `out.jsonl` lie `out.jsonl.job.json`, which says what it is made from, and until it is complete
`out.jsonl.parts/`. A part's file appears whole or not at all and its content depends on the job alone, so that it
does not matter who writes it, how often, or who was killed in between.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import fs

from llama_ray.batch_inference.rows import Part
from llama_ray.storage import store
from llama_ray.storage.store import StorageError
from llama_ray.utils.errors import first_line

_RECORD, _PARTS = ".job.json", ".parts"
_PARTS_IN_FLIGHT = 64


@dataclass(frozen=True)
class Counts:
    """Rows, how many of them have an `error`, and tokens read and generated."""

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(*(mine + its for mine, its in zip(_values(self), _values(other), strict=True)))


@dataclass(frozen=True)
class Record:
    """What an output is made from (name -> value that decides its content), and its counts once it is complete."""

    made_from: dict[str, Any]
    counts: Counts | None = None
    size_bytes: int = 0

    @property
    def key(self) -> str:
        """Names the job: another one for another input, model or parameter."""
        return hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()[:16]


class Output:
    """The output of one job at `location`, a path or URI."""

    def __init__(self, location: str) -> None:
        self.location = location

    def owns(self, path: str) -> bool:
        """Whether a file is this output, or lies beside it for its sake."""
        own = self.location.partition("?")[0]
        return path in (own, own + _RECORD) or path.startswith(f"{own}{_PARTS}/")

    def record(self) -> Record | None:
        """What is known of the output. Raises StorageError where the record is there but cannot be read."""
        place = self._beside(_RECORD)
        try:
            text = store.read_text(place)
            if text is None:
                return None
            content = json.loads(text)
            counts = content["counts"]
            return Record(content["made_from"], counts and Counts(**counts), content["size_bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{place} cannot be read ({first_line(error)}): give --overwrite to start from nothing, or another "
                "--output"
            ) from error

    def size(self) -> int | None:
        """Bytes of the output; None where there is none. Raises StorageError for a place that cannot be looked at."""
        try:
            filesystem, path = store.open_storage(self.location)
            info = filesystem.get_file_info(path)
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot write to output {self.location} ({first_line(error)})") from error
        if info.type == fs.FileType.Directory:
            raise StorageError(f"output {self.location} is a directory: give a file in it, such as out.jsonl")
        return int(info.size) if info.type == fs.FileType.File else None

    def start(self, record: Record) -> None:
        """Note what is about to be made; parts of another job are removed. Raises StorageError."""
        try:
            self._remove_parts()
            store.write_text(self._beside(_RECORD), _to_json(record))
            filesystem, path = store.open_storage(self.location)
            if filesystem.get_file_info(path).type == fs.FileType.File:
                filesystem.delete_file(path)
        except (OSError, ValueError) as error:
            raise StorageError(
                f"cannot write to output {self.location} ({first_line(error)}): choose another --output"
            ) from error

    def parts_of(self, record: Record) -> str:
        """The directory for the parts of one job: a straggler of an earlier, different one writes elsewhere."""
        return self._beside(f"{_PARTS}/{record.key}")

    def finish(self, record: Record, parts: Sequence[Part]) -> Record:
        """Put all parts together in order -> the record with its counts. Raises StorageError for one that is not whole.

        The record says that the output is complete only when it is; killed before that, a job does this again.
        """
        total, size = Counts(), 0
        try:
            with store.replacing(self.location) as stream:
                for part in parts:
                    counts, content = _read_part(store.join(self.parts_of(record), part.file), part.rows)
                    stream.write(content)
                    total += counts
                    size += len(content)
                    if part.index % _PARTS_IN_FLIGHT == 0:
                        stream.flush()  # an object store's stream sends in the background, without a limit
            finished = Record(record.made_from, total, size)
            store.write_text(self._beside(_RECORD), _to_json(finished))
            self._remove_parts()
        except OSError as error:
            raise StorageError(f"cannot put {self.location} together: {first_line(error)}") from error
        return finished

    def _remove_parts(self) -> None:
        filesystem, path = store.open_storage(self._beside(_PARTS))
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            filesystem.delete_dir(path)

    def _beside(self, suffix: str) -> str:
        path, mark, options = self.location.partition("?")
        return path + suffix + mark + options


def committed(directory: str) -> set[str]:
    """The names of the parts that are finished."""
    # files that were being written when their writer was killed begin with a dot
    return {name for name in store.list_files(directory) if name.startswith("part-")}


def commit(directory: str, part: Part, rows: Sequence[Mapping[str, Any]], counts: Counts) -> None:
    """Write the answers of a part, its counts in the first line; from then on it is finished."""
    text = "".join(f"{_dumps(row)}\n" for row in ({"counts": asdict(counts)}, *rows))
    store.write_text(store.join(directory, part.file), text)


def _read_part(file: str, rows: int) -> tuple[Counts, bytes]:
    filesystem, path = store.open_storage(file)
    with filesystem.open_input_stream(path, compression=None) as stream:
        head, _, content = stream.readall().partition(b"\n")
    found = content.count(b"\n")
    if found != rows:
        raise StorageError(f"{file} holds {found} rows, not {rows}: delete it and start again")
    return Counts(**json.loads(head)["counts"]), content


# Line ends to Unicode but not to JSON: many a reader, such as str.splitlines, would cut a row there.
_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def _dumps(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False).translate(_LINE_ENDS)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON may hold as an escape only
        return json.dumps(row)
    return text


def _to_json(record: Record) -> str:
    return json.dumps(asdict(record), indent=2, sort_keys=True) + "\n"


def _values(counts: Counts) -> tuple[int, ...]:
    return (counts.rows, counts.errors, counts.prompt_tokens, counts.generated_tokens)
