"""A corpus: the pieces of several sources, or a pseudo-random choice of them, in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_ray.data.preparing.bad_records import report_beside
from llama_ray.data.preparing.config import NamedSource
from llama_ray.data.preparing.splits import number_of
from llama_ray.data.records.fields import Fields
from llama_ray.data.records.pieces import Piece, split_files
from llama_ray.data.sources.files import File, SourceError
from llama_ray.data.sources.find import files
from llama_ray.data.sources.formats import Format
from llama_ray.data.sources.left_out import NO_RECORDS, NOT_CHOSEN, OUTPUT, REPORT, SAME_FILE, LeftOut, Tally
from llama_ray.utils.errors import printable


@dataclass(frozen=True)
class SourcePieces:
    """The pieces of one source, in the order of its files' names, and what of it is not among them."""

    source: NamedSource
    pieces: list[Piece]
    left_out: Tally

    @property
    def size(self) -> int:
        """Size in bytes, as it is stored."""
        return sum(piece.size for piece in self.pieces)

    @property
    def files(self) -> int:
        """Number of files."""
        return len({(piece.file.root, piece.file.path) for piece in self.pieces})


@dataclass(frozen=True)
class Corpus:
    """The pieces of all sources.

    `fingerprint` changes with the name of a source and with the name, size or modification time of any file.
    """

    sources: list[SourcePieces]
    fingerprint: str

    @property
    def size(self) -> int:
        """Size in bytes, as it is stored."""
        return sum(source.size for source in self.sources)


def find_corpus(
    sources: Sequence[NamedSource],
    fields: Fields,
    max_bytes: int | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> Corpus:
    """List the pieces of `sources`, but for files in `output`; see `files` for what a source may be.

    With `max_bytes`, choose pieces of at most that size in all, pseudo-randomly by `seed`. Raises SourceError if a
    source has no text, cannot be read or has a table without a column of `fields`, and if all pieces are larger than
    `max_bytes`.
    """
    digest = hashlib.sha256()
    seen: set[tuple[str, str]] = set()
    found = []
    for source in sources:
        left_out = Tally()
        digest.update(f"{source.name}\0".encode())
        chosen = list(_files(source, fields, output, seen, left_out))
        for file in chosen:
            content = f"{file.name}\0{file.size}\0{file.modified_ns}\n"
            digest.update(content.encode(errors="surrogateescape"))
        pieces = list(split_files(chosen, fields))
        if not pieces:
            raise SourceError(
                f"no text found in {printable(source.where)!r}{reasons(left_out)}; give 'builtin', a file, a folder, a "
                "glob or a URI with text"
            )
        found.append(SourcePieces(source, pieces, left_out))
    if max_bytes is not None:
        found = _chosen(found, max_bytes, seed)
    return Corpus(found, digest.hexdigest())


def in_random_order(source: SourcePieces, seed: int) -> Iterator[Piece]:
    """Yield the pieces of a source in an order that depends on `seed` and their ids only."""
    for _, index in sorted(
        (number_of(seed, f"order:{source.source.name}/{piece.id}"), index)
        for index, piece in enumerate(source.pieces)
    ):
        yield source.pieces[index]


def reasons(*tallies: Tally) -> str:
    """Return why there is so little text, in parentheses."""
    lines = [line for tally in tallies for line in tally.lines()]
    return f" ({'; '.join(lines)})" if lines else ""


def _files(
    source: NamedSource, fields: Fields, output: Path | None, seen: set[tuple[str, str]], left_out: Tally
) -> Iterator[File]:
    """Yield each file once that has the form of `fields` and that no earlier preparation left.

    Such ones are its tokenizer in `output`, and a report beside it.
    """
    output = output and output.resolve()
    report = output and report_beside(output)
    try:
        found = sorted(files(source.where, left_out.add))
    except OSError as error:
        raise _cannot_read(source.where, error) from error
    for file in found:
        path = Path(file.path)
        if output and file.root == "" and path.is_relative_to(output):
            left_out.add(LeftOut("file", OUTPUT, file.name))
        elif report and file.root == "" and path == report:
            left_out.add(LeftOut("file", REPORT, file.name))
        elif (file.root, file.path) in seen:
            left_out.add(LeftOut("file", SAME_FILE, file.name))
        elif not fields.required and file.layout.format in (Format.TEXT, None):
            left_out.add(LeftOut("file", NO_RECORDS, file.name))
        else:
            seen.add((file.root, file.path))
            yield file


def _cannot_read(where: str, error: OSError) -> SourceError:
    return SourceError(
        f"cannot read source {printable(where)!r} ({printable(str(error))}); check its name and access rights"
    )


def _chosen(sources: list[SourcePieces], max_bytes: int, seed: int) -> list[SourcePieces]:
    """Return sources with the pieces, of at most `max_bytes` in all, that come first in a pseudo-random order."""
    if sum(source.size for source in sources) <= max_bytes:
        return sources
    order = sorted(
        (number_of(seed, f"max_bytes:{source.source.name}/{piece.id}"), place, index)
        for place, source in enumerate(sources)
        for index, piece in enumerate(source.pieces)
    )
    chosen: list[list[int]] = [[] for _ in sources]
    left = max_bytes
    for _, place, index in order:
        size = sources[place].pieces[index].size
        if size <= left:
            chosen[place].append(index)
            left -= size
        else:
            sources[place].left_out.add(LeftOut("piece", NOT_CHOSEN, ""))
    if not any(chosen):
        smallest = min(piece.size for source in sources for piece in source.pieces)
        raise SourceError(
            f"max_bytes is {max_bytes}; it must be at least {smallest}, the size of the smallest piece of the sources"
        )
    return [
        SourcePieces(source.source, [source.pieces[index] for index in sorted(indices)], source.left_out)
        for source, indices in zip(sources, chosen, strict=True)
    ]
