"""The documents that bits per byte are measured on: of text files, or of the validation split of prepared data."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from llama_ray.data.dataset.files import DatasetFiles, Place
from llama_ray.data.dataset.locations import open_files
from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import read, split_files
from llama_ray.data.sources.files import BUILTIN
from llama_ray.data.sources.find import files
from llama_ray.data.sources.left_out import Tally
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.evaluation.results import EvaluationError
from llama_ray.storage.paths import existing, is_uri
from llama_ray.utils.errors import printable

Notice = Callable[[str], None]
"""Takes a line that the user should see."""

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_VALIDATION = "validation"


@dataclass(frozen=True)
class Corpus:
    """Documents under a name; `fingerprint` depends on their texts and their order alone."""

    name: str
    documents: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A digest of the documents."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(hashlib.sha256(document.encode()).digest())
        return digest.hexdigest()


def located(given: str) -> str:
    """Return `SOURCE` or `NAME=SOURCE` with a path that leads to the same place from anywhere.

    What is there under the whole of `given` is a source whose path has an equals sign.
    """
    match = None if Path(given).expanduser().exists() else _NAMED.fullmatch(given)
    name, source = (f"{match[1]}=", match[2]) if match else ("", given)
    return f"{name}{source if source == BUILTIN else existing(source)}"


def check_names(given: Iterable[str], tasks: Iterable[str]) -> None:
    """Raise EvaluationError if two of the texts and data `given`, or one of them and a task, have one name."""
    seen = set(tasks)
    for one in given:
        name = _named(one)[0]
        if name in seen:
            raise EvaluationError(
                f"{printable(name)} names two of what is measured; give each text another name (NAME=SOURCE)"
            )
        seen.add(name)


def read_text(given: str, limit: int | None, notice: Notice) -> Corpus:
    """Return the documents of `SOURCE` or `NAME=SOURCE`; at most `limit` of them.

    A source is what `files` takes: a file, a folder, a glob, a URI, `builtin`. Long texts are cut into documents as in
    a preparation. `notice` is told what is left out. Raises EvaluationError for a source without text, and SourceError.
    """
    name, source = _named(given)
    left_out = Tally()
    found = sorted(files(source, left_out.add), key=lambda file: file.name)
    texts = (
        text.text
        for piece in split_files(found, TextFields())
        for text in read(piece, TextFields(), left_out.add)
    )
    corpus = _corpus(name, texts, limit, f"text {printable(given)}")
    for line in left_out.lines():
        notice(f"text {name}: {line}")
    return corpus


def read_data(given: str, limit: int | None) -> Corpus:
    """Return the validation documents of prepared data at `LOCATION` or `NAME=LOCATION`; at most `limit` of them.

    Their tokens are turned back into text, so that a model with any tokenizer can be measured. Raises EvaluationError
    for data that hold no validation text, and DatasetError.
    """
    name, location = _named(given)
    opened = open_files(location)
    info = opened.info
    if info.task != "pretrain":
        raise EvaluationError(
            f"data {printable(given)} are for the task {info.task}; bits per byte need text; give data of the task "
            "pretrain"
        )
    tokenizer = Tokenizer.load(opened.tokenizer_directory())
    return _corpus(name, _decoded(opened, tokenizer), limit, f"data {printable(given)}")


def _decoded(opened: DatasetFiles, tokenizer: Tokenizer) -> Iterator[str]:
    for number, shard in enumerate(opened.info.splits.get(_VALIDATION, ())):
        starts = [*opened.starts(_VALIDATION, number), shard.tokens]
        for start, stop in itertools.pairwise(map(int, starts)):
            (span,) = opened.read(_VALIDATION, [Place(number, start, stop)])
            yield tokenizer.decode(span.tokens.tolist())


def _corpus(name: str, texts: Iterable[str], limit: int | None, what: str) -> Corpus:
    documents = tuple(itertools.islice(filter(None, texts), limit))
    if not documents:
        raise EvaluationError(f"{what} holds no text; give a file, a folder or data with a validation split")
    return Corpus(name, documents)


def _named(given: str) -> tuple[str, str]:
    """Return the name and the source of `NAME=SOURCE`; a source alone is named by the last part of its path.

    The name is in the names of metrics and tags, so it has nothing of a URI that may be a secret.
    """
    if match := _NAMED.fullmatch(given):
        return match[1], match[2]
    uri = urlsplit(given) if is_uri(given) else None
    path = uri.path if uri else given
    return PurePosixPath(path.rstrip("/")).name or (uri.hostname if uri else None) or "text", given
