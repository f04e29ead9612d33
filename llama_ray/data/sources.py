"""Where text comes from: references to documents, so that no corpus has to fit into memory."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import fs

from llama_ray.storage.paths import is_uri

BUILTIN = "builtin"
DOCUMENT_BYTES = 256 * 1024
"""A longer text file is cut into documents of at most this size."""

_SNIFFED_BYTES = 8 * 1024
_TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".jsonl"})


class SourceError(ValueError):
    """A source that gives no text; the message is one line with the way out."""


class NotUTF8Error(SourceError):
    """A document that is not UTF-8."""


class Document(NamedTuple):
    """A byte range of a file: one text, or of a ``.jsonl`` file some lines with one text each.

    ``name`` is the file as seen from the source, so it stays the same when the corpus moves; ``path`` is
    where to read it; ``root`` is the file system: '' (local), 'builtin', or the head of a URI.
    """

    name: str
    root: str
    path: str
    start: int
    stop: int

    @property
    def id(self) -> str:
        """Identifies the document within its source."""
        return f"{self.name}:{self.start}"

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    def draw(self, seed: int) -> float:
        """A pseudo-random number in [0, 1) that depends on ``seed`` and ``id`` only."""
        digest = hashlib.blake2b(f"{seed}:{self.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64


@dataclass(frozen=True)
class Corpus:
    """The documents of a source, in a fixed order.

    ``fingerprint`` changes with the name, size or modification time of any file.
    """

    source: str
    documents: list[Document]
    fingerprint: str

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(document.size for document in self.documents)

    @property
    def single_file(self) -> bool:
        """Whether all documents come from one file."""
        return len({document.path for document in self.documents}) == 1


def find(source: str, max_bytes: int | None = None, seed: int = 0) -> Corpus:
    """Lists the documents of ``source``.

    ``source`` is ``builtin`` (the source code of the running interpreter's standard library), a text or ``.jsonl``
    file, a folder (searched recursively; hidden and binary files are left out), a glob, or the URI of a file or
    folder that pyarrow reads (``s3://``, ``gs://``, ``file://`` ...). With ``max_bytes`` a pseudo-random choice of
    documents, by ``seed``, of at most that size. Raises SourceError where nothing is found.
    """
    digest = hashlib.sha256()
    documents: list[Document] = []
    try:
        for file in sorted(files(source), key=lambda file: file.name):
            digest.update(f"{file.name}\0{file.size}\0{file.modified_ns}\n".encode())
            documents.extend(_documents(file))
    except OSError as error:
        raise SourceError(f"cannot read source {source!r}: {error}") from error
    if not documents:
        raise SourceError(
            f"no text found in {source!r}: give 'builtin', a text or .jsonl file, a folder, a glob or a URI "
            "that holds some"
        )
    if max_bytes is not None:
        documents = sample(documents, max_bytes, seed)
        if not documents:
            raise SourceError(f"max_bytes is {max_bytes}, less than any document of {source!r}: raise it")
    return Corpus(source, documents, digest.hexdigest())


def sample(documents: list[Document], max_bytes: int, seed: int) -> list[Document]:
    """A pseudo-random choice of ``documents`` with at most ``max_bytes`` in all, in their given order."""
    if sum(document.size for document in documents) <= max_bytes:
        return documents
    chosen, total = set(), 0
    for position in sorted(range(len(documents)), key=lambda position: documents[position].draw(seed)):
        if total + documents[position].size > max_bytes:
            continue
        chosen.add(position)
        total += documents[position].size
    return [document for position, document in enumerate(documents) if position in chosen]


def read(document: Document) -> Iterator[str]:
    """The texts of a document, empty ones left out.

    Raises NotUTF8Error, and SourceError for a file that went away, changed, or has a bad ``.jsonl`` line.
    """
    try:
        with open_file(document.root, document.path) as file:
            file.seek(document.start)
            content = file.read(document.size)
    except OSError as error:
        raise SourceError(f"cannot read {document.path}: {error}") from error
    if len(content) != document.size:
        raise SourceError(f"{document.path} became shorter while it was read: start again")
    try:
        text = content.decode("utf-8-sig" if document.start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise NotUTF8Error(
            f"{document.path} is not UTF-8 at byte {document.start + error.start}: convert it (iconv -t UTF-8)"
        ) from error
    if not document.name.endswith(".jsonl"):
        if text:
            yield text
        return
    for line in text.split("\n"):
        if line.strip():
            yield from _line_text(line, document)


def _line_text(line: str, document: Document) -> Iterator[str]:
    try:
        text = json.loads(line)["text"]
        # JSON may escape half a surrogate pair, which is no character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(
            f'{document.path}: a line behind byte {document.start} is not {{"text": "..."}}: {line[:80]!r}'
        ) from error
    if text:
        yield text


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source: `name` as seen from the source, `root` and `path` for `open_file`."""

    name: str
    root: str
    path: str
    size: int
    modified_ns: int


def files(source: str) -> Iterator[File]:
    """All non-empty text files of a source, in no fixed order."""
    if source == BUILTIN:
        stdlib = _stdlib()
        for path in stdlib.rglob("*.py"):
            name = path.relative_to(stdlib)
            if not {"site-packages", "dist-packages"} & set(name.parts):
                yield from _local(path, name.as_posix(), BUILTIN)
    elif is_uri(source):
        yield from _remote(source)
    elif Path(source).is_file():
        yield from _local(Path(source), Path(source).name)
    elif Path(source).is_dir():
        for folder, folders, names in os.walk(source):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = [Path(folder, name) for name in names if not name.startswith(".")]
            for path in paths:
                if _is_text(path.name, "", str(path)):
                    yield from _local(path, path.relative_to(source).as_posix())
    elif glob.has_magic(source):
        base = _fixed_part(source)
        for match in glob.iglob(source, recursive=True):  # noqa: PTH207 (Path.glob takes no absolute patterns)
            path = Path(match)
            if path.is_file() and _is_text(path.name, "", match):
                yield from _local(path, path.relative_to(base).as_posix())


def _fixed_part(pattern: str) -> Path:
    """The folder of a glob pattern above its first wildcard."""
    parts = Path(pattern).parts
    magic = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:magic])


def _local(path: Path, name: str, root: str = "") -> Iterator[File]:
    status = path.stat()
    if status.st_size:
        place = name if root == BUILTIN else str(path.resolve())
        yield File(name, root, place, status.st_size, status.st_mtime_ns)


def _remote(uri: str) -> Iterator[File]:
    """Files behind a URI; what follows a '?' configures the file system (``endpoint_override`` ...)."""
    head, _, options = uri.partition("?")
    scheme, _, rest = head.partition("://")
    root = f"{scheme}://{rest.split('/')[0]}/" + (f"?{options}" if options else "")
    try:
        system, base = fs.FileSystem.from_uri(uri)
    except ValueError as error:  # pyarrow's ArrowInvalid: a scheme it does not know, a malformed URI
        raise SourceError(f"cannot read source {uri!r}: {error}") from error
    found = system.get_file_info(base)
    if found.type == fs.FileType.Directory:
        infos = system.get_file_info(fs.FileSelector(base, recursive=True))
    else:
        infos = [found]
    for info in infos:
        name = info.path[len(base) :].strip("/") or info.base_name
        hidden = any(part.startswith(".") for part in name.split("/"))
        wanted = info.type == fs.FileType.File and info.size and not hidden
        if wanted and _is_text(info.base_name, root, info.path):
            yield File(name, root, info.path, info.size, info.mtime_ns or 0)


def _is_text(name: str, root: str, path: str) -> bool:
    """By suffix, or else because the first bytes are UTF-8 without NUL."""
    if Path(name).suffix.lower() in _TEXT_SUFFIXES:
        return True
    try:
        with open_file(root, path) as file:
            start = file.read(_SNIFFED_BYTES)
        start.decode()
    except UnicodeDecodeError as error:
        # a character cut in two by the end of the sniffed bytes is no fault of the file
        return error.reason == "unexpected end of data" and b"\0" not in start
    except OSError:
        return False
    return b"\0" not in start


def _documents(file: File) -> Iterator[Document]:
    """Cuts a file where it is too long for one document, and a ``.jsonl`` file between lines."""
    cuts: Iterable[int] = [0, file.size]
    if file.name.endswith(".jsonl"):
        # at most about 1000 pieces a file, so that references stay few; lines of one piece share a split
        cuts = _line_cuts(file, min(file.size // 1000, DOCUMENT_BYTES))
    elif file.size > DOCUMENT_BYTES:
        cuts = _text_cuts(file)
    start = 0
    for stop in cuts:
        if stop > start:
            yield Document(file.name, file.root, file.path, start, stop)
            start = stop


def _line_cuts(file: File, step: int) -> Iterator[int]:
    """Ends of the first lines that reach beyond ``step`` bytes."""
    with open_file(file.root, file.path) as opened:
        stop = 0
        while stop < file.size:
            position = stop + step
            while position < file.size:
                opened.seek(position)
                block = opened.read(max(2 * step, 16 * 1024))
                newline = block.find(b"\n")
                if newline >= 0:
                    position += newline + 1
                    break
                position += len(block) or file.size
            stop = min(position, file.size)
            yield stop


def _text_cuts(file: File) -> Iterator[int]:
    """Places in the last quarter of DOCUMENT_BYTES: after a blank line, else a line, else a character."""
    tail = DOCUMENT_BYTES // 4
    with open_file(file.root, file.path) as opened:
        stop = 0
        while stop + DOCUMENT_BYTES < file.size:
            first = stop + DOCUMENT_BYTES - tail
            opened.seek(first)
            block = opened.read(tail)
            blank = max(block.rfind(b"\n\n") + 2, block.rfind(b"\n\r\n") + 3)
            if blank > 3:
                stop = first + blank
            elif b"\n" in block:
                stop = first + block.rfind(b"\n") + 1
            else:
                end = len(block) - 1
                while end > len(block) - 4 and block[end] & 0xC0 == 0x80:  # inside a UTF-8 character
                    end -= 1
                stop = first + end
            yield stop
        yield file.size


def open_file(root: str, path: str) -> Any:
    """A seekable binary file; those behind a URI are pyarrow's, which cannot be read by line."""
    if root == BUILTIN:
        return (_stdlib() / path).open("rb")
    if root == "":
        return Path(path).open("rb")
    return _file_system(root).open_input_file(path)


@functools.lru_cache(maxsize=8)
def _file_system(root: str) -> fs.FileSystem:
    # finding the region of a bucket takes a round trip, so once a process is enough
    return fs.FileSystem.from_uri(root)[0]


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))
