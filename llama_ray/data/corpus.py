"""A corpus: the documents of a source, or a pseudo-random choice of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from llama_ray.data.documents import Document, split_file
from llama_ray.data.sources import SourceError, files


@dataclass(frozen=True)
class Corpus:
    """The documents of a source, in a fixed order.

    `fingerprint` changes with the name, size or modification time of any file.
    """

    source: str
    documents: list[Document]
    fingerprint: str

    @property
    def size(self) -> int:
        """Size in bytes."""
        return sum(document.size for document in self.documents)

    @property
    def single_file(self) -> bool:
        """Whether all documents come from one file."""
        return len({document.path for document in self.documents}) == 1


def find_corpus(source: str, max_bytes: int | None = None, seed: int = 0) -> Corpus:
    """List the documents of `source`; see `llama_ray.data.sources.files` for what it may be.

    With `max_bytes`, return a pseudo-random choice of documents of at most that size in all, which depends on `seed`.
    Raises SourceError if there is no text or the source cannot be read.
    """
    digest = hashlib.sha256()
    documents: list[Document] = []
    try:
        for file in sorted(files(source), key=lambda file: file.name):
            digest.update(f"{file.name}\0{file.size}\0{file.modified_ns}\n".encode())
            documents.extend(split_file(file))
    except OSError as error:
        raise SourceError(
            f"cannot read source {source!r} ({error}); check its name and access rights"
        ) from error
    if not documents:
        raise SourceError(
            f"no text found in {source!r}; give 'builtin', a text or .jsonl file, a folder, a glob or a URI "
            "with text"
        )
    if max_bytes is not None:
        documents = sample(documents, max_bytes, seed)
        if not documents:
            raise SourceError(
                f"max_bytes is {max_bytes}; it must be at least the size of a document of {source!r}; raise it"
            )
    return Corpus(source, documents, digest.hexdigest())


def sample(documents: list[Document], max_bytes: int, seed: int) -> list[Document]:
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
