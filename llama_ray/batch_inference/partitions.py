"""The rows of `.jsonl` files, in partitions that are the same on every cluster."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from llama_ray.data.sources.files import File, SourceError, open_file
from llama_ray.data.sources.find import files
from llama_ray.data.sources.formats import Compression, Format, layout
from llama_ray.data.sources.left_out import EMPTY, HIDDEN, MATCHED_FOLDER, TAKEN_ALREADY, LeftOut
from llama_ray.storage import store
from llama_ray.storage.paths import is_uri
from llama_ray.utils.errors import printable

MIN_PARTITION_ROWS, _MAX_PARTITION_ROWS = 32, 256
_ROWS_BEFORE_PER_ROW = 64
"""A partition may have one row for each 64 rows before it."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_WITHOUT_ROWS = (EMPTY, HIDDEN, MATCHED_FOLDER, TAKEN_ALREADY)


class Line(NamedTuple):
    """One row as it was read: its number in the whole input, `file:line` for messages, and its bytes."""

    row: int
    location: str
    content: bytes


class FileRange(NamedTuple):
    """Whole lines of one file: bytes `start` to `stop`; the first of them is line `line_number`, counted from 1.

    `name`, `root` and `path` identify the file, as in `llama_ray.data.sources.find`.
    """

    name: str
    root: str
    path: str
    start: int
    stop: int
    line_number: int


@dataclass(frozen=True)
class Partition:
    """Consecutive rows that one replica answers and that share one output file.

    `first_row` is numbered over the whole input; `digest` is the SHA-256 of the rows' content.
    """

    index: int
    first_row: int
    num_rows: int
    digest: str
    file_ranges: tuple[FileRange, ...]

    @property
    def file(self) -> str:
        """The name of the file with this partition's answers."""
        return f"part-{self.index:06}.jsonl"

    def to_json(self) -> str:
        """Serialise for a replica."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def from_json(cls, text: str) -> Partition:
        """Rebuild the partition that `to_json` wrote."""
        index, first_row, num_rows, digest, file_ranges = json.loads(text)
        return cls(index, first_row, num_rows, digest, tuple(FileRange(*r) for r in file_ranges))


@dataclass(frozen=True)
class PartitionedInput:
    """All rows of an input. `fingerprint` depends on their content and order, not on the location of the files."""

    partitions: tuple[Partition, ...]
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Rows in all partitions."""
        return sum(partition.num_rows for partition in self.partitions)


def partition_input(source: str, is_output: Callable[[str], bool]) -> PartitionedInput:
    """Read all of `source` once: a file, a folder (its `.jsonl` files), a glob, or the URI of a file or folder.

    Files are read in the order of their names; blank lines are not rows. Paths and URIs for which `is_output` is
    true belong to the job's own output and are skipped. Raises SourceError for an input that cannot be read or has no
    rows.
    """
    try:
        partitions = tuple(_partitions(_input_lines(source, is_output)))
    except OSError as error:
        raise SourceError(f"cannot read input {source!r}: {error}") from error
    if not partitions:
        raise SourceError(
            f"no rows found in {source!r}; give a .jsonl file other than the output, a folder or glob of them, or a URI"
        )
    digests = "".join(f"{partition.num_rows}:{partition.digest}\n" for partition in partitions)
    return PartitionedInput(partitions, hashlib.sha256(digests.encode()).hexdigest())


def read_lines(partition: Partition) -> list[Line]:
    """Return the rows of a partition. Raises SourceError if its files are gone or changed since `partition_input`."""
    lines: list[Line] = []
    digest = hashlib.sha256()
    for file_range in partition.file_ranges:
        for number, content in _read_range(file_range):
            digest.update(content + b"\n")
            row = partition.first_row + len(lines)
            lines.append(Line(row, f"{file_range.name}:{number}", content))
    if digest.hexdigest() != partition.digest:
        raise SourceError(f"{partition.file_ranges[0].path} changed while it was read; start the job again")
    return lines


class _InputLine(NamedTuple):
    """A line that holds a row, and its position: line `number` of `file`, bytes `start` to `stop`."""

    file: File
    number: int
    start: int
    stop: int
    content: bytes


def _input_lines(source: str, is_output: Callable[[str], bool]) -> Iterator[_InputLine]:
    def refuse(piece: LeftOut) -> None:
        if piece.reason in _WITHOUT_ROWS or not (piece.unit == "folder" or _is_requested(source, piece.name)):
            return
        raise SourceError(f"cannot take rows from {printable(piece.name)}: {piece.reason}")

    for file in sorted(files(source, refuse)):
        if not _is_requested(source, file.name) or is_output(file.path):
            continue
        if file.layout.compression is not Compression.NONE:
            raise SourceError(f"{printable(file.name)} is compressed; decompress it first")
        with open_file(file.root, file.path) as stream:
            yield from _file_lines(file, _buffered(stream))


def _file_lines(file: File, stream: Iterable[bytes]) -> Iterator[_InputLine]:
    start = 0
    for number, raw in enumerate(stream, 1):
        stop = start + len(raw)
        if content := _content(raw, at_file_start=start == 0):
            yield _InputLine(file, number, start, stop, content)
        start = stop


def _partitions(lines: Iterable[_InputLine]) -> Iterator[Partition]:
    builder = _PartitionBuilder(index=0, first_row=0)
    for line in lines:
        builder.add(line)
        if builder.full:
            partition = builder.build()
            yield partition
            builder = _PartitionBuilder(partition.index + 1, partition.first_row + partition.num_rows)
    if builder.num_rows:
        yield builder.build()


class _PartitionBuilder:
    """Collects the lines of one partition; a new `FileRange` begins with each file."""

    def __init__(self, index: int, first_row: int) -> None:
        self.num_rows = 0
        self._index, self._first_row = index, first_row
        self._file_ranges: list[FileRange] = []
        self._digest = hashlib.sha256()

    @property
    def full(self) -> bool:
        # Small partitions for small inputs, so that every replica gets some; large ones later, so that files stay few.
        # Only the rows before a partition count: it is the same whatever follows it.
        wanted = max(MIN_PARTITION_ROWS, self._first_row // _ROWS_BEFORE_PER_ROW)
        return self.num_rows >= min(wanted, _MAX_PARTITION_ROWS)

    def add(self, line: _InputLine) -> None:
        file, last = line.file, self._file_ranges[-1] if self._file_ranges else None
        if last is not None and (last.root, last.path) == (file.root, file.path):
            self._file_ranges[-1] = last._replace(stop=line.stop)
        else:
            self._file_ranges.append(
                FileRange(file.name, file.root, file.path, line.start, line.stop, line.number)
            )
        self._digest.update(line.content + b"\n")
        self.num_rows += 1

    def build(self) -> Partition:
        return Partition(
            self._index, self._first_row, self.num_rows, self._digest.hexdigest(), tuple(self._file_ranges)
        )


def _read_range(file_range: FileRange) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, content) of each row. Raises SourceError if the file cannot be read."""
    try:
        with open_file(file_range.root, file_range.path) as stream:
            stream.seek(file_range.start)
            block = stream.read(file_range.stop - file_range.start)
    except OSError as error:
        raise SourceError(
            f"a worker cannot read {file_range.path} ({error}); the input must be on storage that all nodes share"
        ) from error
    for offset, raw in enumerate(io.BytesIO(block)):
        if content := _content(raw, at_file_start=file_range.start == offset == 0):
            yield file_range.line_number + offset, content


def _content(raw: bytes, *, at_file_start: bool) -> bytes:
    """Return a line without white space at its ends and without a byte order mark; empty for a blank line."""
    return (raw.removeprefix(_BYTE_ORDER_MARK) if at_file_start else raw).strip()


def _buffered(file: Any) -> BinaryIO:
    # pyarrow's files claim to be buffered but cannot be read by line.
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, 1 << 20)


def _is_requested(source: str, name: str) -> bool:
    """Whether the user named this file, by path or pattern; of a folder only `.jsonl` files, also compressed, count."""
    by_pattern = glob.has_magic(source) and not is_uri(source)
    return layout(name).format is Format.JSON_LINES or by_pattern or store.name_of(source) == name
