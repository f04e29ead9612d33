"""A corpus: the documents of a source, or a pseudo-random choice of them, and their division into splits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import Piece, read, split_file
from llama_ray.data.sources.files import File, SourceError
from llama_ray.data.sources.find import files
from llama_ray.data.sources.left_out import EMPTY, NOT_CHOSEN, OUTPUT, SAME_FILE, LeftOut, Tally
from llama_ray.utils.errors import printable


@dataclass(frozen=True)
class Corpus:
    """The documents of a source, in a fixed order, and what of the source is not among them.

    `fingerprint` changes with the name, size or modification time of any file.
    """

    source: str
    documents: list[Piece]
    fingerprint: str
    left_out: Tally

    @property
    def size(self) -> int:
        """Size in bytes."""
        return sum(document.size for document in self.documents)


def find_corpus(
    source: str, max_bytes: int | None = None, seed: int = 0, output: Path | None = None
) -> Corpus:
    """List the documents of `source`, but for files in `output`; see `files` for what it may be.

    With `max_bytes`, return a pseudo-random choice of documents of at most that size in all, which depends on `seed`.
    Raises SourceError if there is no text or the source cannot be read.
    """
    digest = hashlib.sha256()
    found: list[Piece] = []
    left_out = Tally()
    try:
        for file in _different(sorted(files(source, left_out.add)), output, left_out):
            content = f"{file.name}\0{file.size}\0{file.modified_ns}\n"
            digest.update(content.encode(errors="surrogateescape"))
            before = len(found)
            found.extend(split_file(file, TextFields()))
            if len(found) == before:
                left_out.add(LeftOut("file", EMPTY, file.name))
    except OSError as error:
        raise SourceError(
            f"cannot read source {printable(source)!r} ({printable(str(error))}); check its name and access rights"
        ) from error
    if not found:
        raise SourceError(
            f"no text found in {printable(source)!r}{_reasons(left_out)}; give 'builtin', a text or .jsonl file, a "
            "folder, a glob or a URI with text"
        )
    documents = found if max_bytes is None else sample(found, max_bytes, seed)
    if not documents:
        raise SourceError(
            f"max_bytes is {max_bytes}; it must be at least the size of a document of {printable(source)!r}; raise it"
        )
    for _ in range(len(found) - len(documents)):
        left_out.add(LeftOut("document", NOT_CHOSEN, ""))
    return Corpus(source, documents, digest.hexdigest(), left_out)


def _different(found: Iterable[File], output: Path | None, left_out: Tally) -> Iterator[File]:
    """Yield each file once that is not in `output`, where an earlier preparation may have left its tokenizer."""
    output = output and output.resolve()
    seen: set[str] = set()
    for file in found:
        if output and file.root == "" and Path(file.path).is_relative_to(output):
            left_out.add(LeftOut("file", OUTPUT, file.name))
        elif file.path in seen:
            left_out.add(LeftOut("file", SAME_FILE, file.name))
        else:
            seen.add(file.path)
            yield file


def sample(documents: list[Piece], max_bytes: int, seed: int) -> list[Piece]:
    """Choose documents of at most `max_bytes` in all, pseudo-randomly by `seed`; their order is kept."""
    if sum(document.size for document in documents) <= max_bytes:
        return documents
    chosen, total = set(), 0
    for index in sorted(range(len(documents)), key=lambda index: documents[index].uniform(seed)):
        if total + documents[index].size > max_bytes:
            continue
        chosen.add(index)
        total += documents[index].size
    return [document for index, document in enumerate(documents) if index in chosen]


def divide(corpus: Corpus, fraction: float, seed: int) -> dict[str, list[Piece]]:
    """Divide the documents into splits by a hash of each, with at least one document that holds text in both.

    Raises SourceError if no two documents hold text.
    """
    # Not `seed` itself: with max_bytes, the chosen documents are those whose number for it is small.
    numbered = sorted((document.uniform(seed + 1), document) for document in corpus.documents)
    not_text = Tally()
    first = _first_with_text(numbered, not_text)
    last = first and _first_with_text(numbered[: numbered.index(first) : -1], not_text)
    if first is None or last is None:
        raise SourceError(
            f"{printable(corpus.source)!r} has {'no document' if first is None else '1 document'}"
            f"{_reasons(corpus.left_out, not_text)}; training and validation need one each; give more text (a file is "
            "cut into documents of 256 KiB, a .jsonl file by line)"
        )
    limit = min(max(fraction, first[0]), math.nextafter(last[0], 0))
    splits: dict[str, list[Piece]] = {"train": [], "validation": []}
    for document in corpus.documents:
        splits["train" if document.uniform(seed + 1) > limit else "validation"].append(document)
    return splits


def _first_with_text(numbered: Iterable[tuple[float, Piece]], not_text: Tally) -> tuple[float, Piece] | None:
    return next(
        (pair for pair in numbered if any(True for _ in read(pair[1], TextFields(), not_text.add))), None
    )


def _reasons(*tallies: Tally) -> str:
    """Return why there is so little text, in parentheses."""
    lines = [line for tally in tallies for line in tally.lines()]
    return f" ({'; '.join(lines)})" if lines else ""
