"""Lines of `.jsonl` files -> numbered rows, in parts that are the same on every cluster, and what a row asks for."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from pydantic import TypeAdapter, ValidationError

from llama_ray.data.sources import SourceError, files, open_file
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.storage.paths import is_uri

_BOM = b"\xef\xbb\xbf"
SMALLEST_PART, _LARGEST_PART = 32, 256
_PARAMS = TypeAdapter(SamplingParams)
_PARAM_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


class RowError(ValueError):
    """A row that cannot be answered; the message becomes its `error` field."""


class Piece(NamedTuple):
    """Whole lines of one file: bytes `start` to `stop`, the first of them line number `line` (from 1).

    `root` and `path` say where the file is, as in `llama_ray.data.sources`.
    """

    name: str
    root: str
    path: str
    start: int
    stop: int
    line: int


@dataclass(frozen=True)
class Part:
    """Consecutive rows, answered by one replica and kept in one file; `first_row` counts over the whole input."""

    index: int
    first_row: int
    rows: int
    digest: str
    pieces: tuple[Piece, ...]

    @property
    def file(self) -> str:
        """The name of the file with this part's answers."""
        return f"part-{self.index:06}.jsonl"

    def to_json(self) -> str:
        """For the way to a replica."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def from_json(cls, text: str) -> Part:
        """The part that `to_json` wrote."""
        index, first_row, rows, digest, pieces = json.loads(text)
        return cls(index, first_row, rows, digest, tuple(Piece(*piece) for piece in pieces))


@dataclass(frozen=True)
class Rows:
    """The rows of an input. `fingerprint` depends on their content and order, not on where the files lie."""

    parts: tuple[Part, ...]
    fingerprint: str

    @property
    def count(self) -> int:
        """Rows in all parts."""
        return sum(part.rows for part in self.parts)


class Line(NamedTuple):
    """One row as it was read: its number over the whole input, `file:line`, and its bytes."""

    row: int
    place: str
    content: bytes


def find_rows(source: str, leave_out: Callable[[str], bool]) -> Rows:
    """Reads through `source` once: a file, a folder (its `.jsonl` files), a glob or a URI of a file or folder.

    Files come in the order of their names; lines of white space only are no rows. `leave_out` says of a path or URI
    that it is the job's own output and no input. Raises SourceError where there is no row.
    """
    parts: list[Part] = []
    open_part = _OpenPart(0, 0)
    try:
        for file in sorted(files(source), key=lambda file: file.name):
            if not _asked_for(source, file.name) or leave_out(_whole_path(file.root, file.path)):
                continue
            if file.name.endswith((".gz", ".zst", ".bz2", ".xz")):
                raise SourceError(f"{file.path} is compressed: unpack it first")
            position = 0
            with open_file(file.root, file.path) as opened:
                for number, size, content in _lines(_buffered(opened), 1, at_start=True):
                    if content:
                        open_part.add(file.name, file.root, file.path, position, size, number, content)
                    position += size
                    if open_part.full:
                        parts.append(open_part.closed())
                        open_part = _OpenPart(len(parts), parts[-1].first_row + parts[-1].rows)
    except OSError as error:
        raise SourceError(f"cannot read input {source!r}: {error}") from error
    if open_part.rows:
        parts.append(open_part.closed())
    if not parts:
        raise SourceError(
            f"no rows found in {source!r}: give a .jsonl file other than the output, a folder or glob of them, or a URI"
        )
    digests = "".join(f"{part.rows}:{part.digest}\n" for part in parts)
    return Rows(tuple(parts), hashlib.sha256(digests.encode()).hexdigest())


def read_lines(part: Part) -> list[Line]:
    """The rows of a part. Raises SourceError where its files are gone or are not what `find_rows` saw."""
    lines: list[Line] = []
    digest = hashlib.sha256()
    for piece in part.pieces:
        try:
            with open_file(piece.root, piece.path) as opened:
                opened.seek(piece.start)
                content = opened.read(piece.stop - piece.start)
        except OSError as error:
            raise SourceError(
                f"a worker cannot read {piece.path} ({error}): the input must be on storage that all nodes share"
            ) from error
        for number, _, line in _lines(io.BytesIO(content), piece.line, at_start=piece.start == 0):
            if line:
                digest.update(line + b"\n")
                lines.append(Line(part.first_row + len(lines), f"{piece.name}:{number}", line))
    if digest.hexdigest() != part.digest:
        raise SourceError(f"{part.pieces[0].path} changed while it was read: start again")
    return lines


def parse(line: Line) -> dict[str, Any]:
    """The row's fields. Raises RowError for what is not a JSON object in UTF-8."""
    try:
        fields = json.loads(line.content.decode(), parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{line.place} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RowError(f"{line.place} is no JSON object but {type(fields).__name__}: write one object a line")
    return fields


def prompt_of(fields: Mapping[str, Any], prompt_field: str) -> str | list[int]:
    """The text or the token ids to continue. Raises RowError where a row has neither or both."""
    text, token_ids = fields.get(prompt_field), fields.get("token_ids")
    if (text is None) == (token_ids is None):
        which = "both" if text is not None else "neither"
        raise RowError(f"the row has {which} of {prompt_field!r} (text) and 'token_ids': give one of them")
    if token_ids is None:
        if not isinstance(text, str):
            raise RowError(f"{prompt_field!r} is {type(text).__name__}: give text, or ids as 'token_ids'")
        return text
    if not isinstance(token_ids, list) or any(type(token) is not int for token in token_ids):
        raise RowError("'token_ids' must be a list of integers")
    return token_ids


def params_of(fields: Mapping[str, Any], base: SamplingParams, seed: int, row: int) -> SamplingParams:
    """`base` with what the row's `sampling_params` replace. Raises RowError for a name or value that does not fit.

    A row without a seed of its own gets one from the job's `seed` and its number alone.
    """
    given = fields.get("sampling_params") or {}
    if not isinstance(given, dict):
        raise RowError(f"'sampling_params' is {type(given).__name__}: give an object")
    unknown = sorted(given.keys() - set(_PARAM_NAMES))
    if unknown:
        raise RowError(f"sampling_params: {unknown[0]!r} is not known; known are {', '.join(_PARAM_NAMES)}")
    defaults = {name: getattr(base, name) for name in _PARAM_NAMES} | {"seed": row_seed(seed, row)}
    try:
        return _PARAMS.validate_python(defaults | {k: v for k, v in given.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        place = f"{first['loc'][0]}: " if first["loc"] else ""
        raise RowError(f"sampling_params: {place}{first['msg'].removeprefix('Value error, ')}") from None


def row_seed(seed: int, row: int) -> int:
    """64 bits that depend on the job's seed and the row's number."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest(), "little")


class _OpenPart:
    """The part that rows are being added to; its lines are cut into pieces where a file ends."""

    def __init__(self, index: int, first_row: int) -> None:
        self.index, self.first_row, self.rows = index, first_row, 0
        self._pieces: list[Piece] = []
        self._digest = hashlib.sha256()

    @property
    def full(self) -> bool:
        # Small parts for small inputs, so that all replicas have some; large ones later, so that files stay few.
        # The rows before decide alone: a part is the same whatever follows it.
        return self.rows >= min(max(SMALLEST_PART, self.first_row // 64), _LARGEST_PART)

    def add(self, name: str, root: str, path: str, start: int, size: int, line: int, content: bytes) -> None:
        last = self._pieces[-1] if self._pieces else None
        if last is not None and (last.root, last.path) == (root, path):
            self._pieces[-1] = last._replace(stop=start + size)
        else:
            self._pieces.append(Piece(name, root, path, start, start + size, line))
        self._digest.update(content + b"\n")
        self.rows += 1

    def closed(self) -> Part:
        return Part(self.index, self.first_row, self.rows, self._digest.hexdigest(), tuple(self._pieces))


def _lines(file: Iterable[bytes], line: int, *, at_start: bool) -> Iterator[tuple[int, int, bytes]]:
    """(line number, bytes in the file, content without white space at its ends) of each line."""
    for offset, raw in enumerate(file):
        content = raw.removeprefix(_BOM) if at_start and offset == 0 else raw
        yield line + offset, len(raw), content.strip()


def _buffered(file: Any) -> BinaryIO:
    # pyarrow's files, which cannot be read by line, say that they are buffered
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, 1 << 20)


def _asked_for(source: str, name: str) -> bool:
    """Whether the user named this file, alone or by a pattern; of a folder only `.jsonl` files count."""
    by_pattern = glob.has_magic(source) and not is_uri(source)
    return name.endswith(".jsonl") or by_pattern or source.partition("?")[0].endswith(f"/{name}")


def _whole_path(root: str, path: str) -> str:
    return path if not root else f"{root.partition('://')[0]}://{path}"


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number that JSON can hold")
