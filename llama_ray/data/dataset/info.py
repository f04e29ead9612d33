"""`dataset.json`: what a dataset holds and what it was made from.

It is written last: a directory without it is not a dataset.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from llama_ray.data.dataset.shards import FORMAT_VERSION, PREPARE_AGAIN, DatasetError, Shard
from llama_ray.storage import store
from llama_ray.storage.atomic import replacing, sync
from llama_ray.utils.typed_json import from_json

INFO_FILE = "dataset.json"
SPLITS = ("train", "validation")
Task = Literal["pretrain", "sft", "dpo"]
"""What a model learns from data: text, the answers of conversations, or the better one of two answers."""


@dataclass(frozen=True)
class Counted:
    """How often something happened, and where first or an excerpt of it."""

    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceInfo:
    """What one source gave.

    `name` is that of its shards, `location` where it was found. `texts` counts what was read from `files`; what became
    documents has `text_bytes` bytes in UTF-8. The counts are by reason: `left_out` of what is no text (files of another
    kind, hidden ones), `bad_records` of what should be text and is damaged, `dropped` of texts by the rule of cleaning.
    `languages` counts texts by language where that was asked for.
    """

    name: str
    location: str
    files: int = 0
    texts: int = 0
    text_bytes: int = 0
    left_out: dict[str, Counted] = field(default_factory=dict)
    bad_records: dict[str, Counted] = field(default_factory=dict)
    dropped: dict[str, Counted] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer in the directory: `origin` says where it comes from, `encoder` which library tokenised.

    `bytes_per_token` is that of the text of the validation split, and `compared_bytes_per_token` that of a second
    tokenizer, `compared`, on the same text.
    """

    fingerprint: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    origin: str = ""
    encoder: str = ""
    bytes_per_token: float | None = None
    compared: str = ""
    compared_bytes_per_token: float | None = None


@dataclass(frozen=True)
class FileInfo:
    """A file beside the shards."""

    bytes: int
    sha256: str


Setting = str | int | float | bool | None


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`.

    `fingerprint` identifies what the dataset was made from (settings and source files). `token_bytes` is the size of a
    token id on disk, 2 or 4. `settings` are the flags of the preparation, `versions` those of the software. `files` are
    those that are not shards, by name.

    Data for another `task` than pretrain are rows of `row_tokens` tokens each, which no shard border cuts. A row begins
    with a document and holds whole ones: each is an example, and padding after the last of a row belongs to it, without
    being learned. `end_of_turn_ids` are the tokens that end the answers in them.
    """

    fingerprint: str
    seed: int
    token_bytes: int
    tokenizer: TokenizerInfo
    sources: tuple[SourceInfo, ...]
    splits: dict[str, tuple[Shard, ...]]
    settings: dict[str, Setting] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileInfo] = field(default_factory=dict)
    task: Task = "pretrain"
    row_tokens: int | None = None
    end_of_turn_ids: tuple[int, ...] = ()

    @property
    def source(self) -> str:
        """Where the text comes from, for people."""
        return ", ".join(source.location for source in self.sources)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def text_bytes(self) -> int:
        """Bytes in UTF-8 of all documents, 0 if that is not known."""
        return sum(source.text_bytes for source in self.sources)

    def tokens(self, split: str) -> int:
        """Return the number of tokens in `split`, including bos and eos."""
        return sum(shard.tokens for shard in self.splits[split])

    def documents(self, split: str) -> int:
        """Return the number of documents in `split`."""
        return sum(shard.documents for shard in self.splits[split])

    def trained(self, split: str) -> int:
        """Return the number of tokens in `split` that are learned."""
        return sum(shard.trained for shard in self.splits[split])

    @cached_property
    def content_fingerprint(self) -> str:
        """A digest of the tokens of all splits, wherever and whenever they were prepared, from their checksums.

        Where there are none, `fingerprint` takes their place.
        """
        shards = {
            split: [shard.sha256 or self.fingerprint for shard in self.splits[split]] for split in self.splits
        }
        rows = [] if self.row_tokens is None else [self.row_tokens]
        content = json.dumps([FORMAT_VERSION, self.tokenizer.fingerprint, shards, *rows], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def write_info(directory: Path, info: DatasetInfo) -> DatasetInfo:
    """Write `dataset.json` atomically and return its content; call it when everything else is on disk.

    Adds the checksums of the files in `directory` that are neither shards nor hidden.
    """
    shards = {shard.file for shards in info.splits.values() for shard in shards}
    others = [path for path in sorted(directory.iterdir()) if path.is_file() and path.name[0] != "."]
    files = {
        path.name: FileInfo(path.stat().st_size, store.sha256(str(path.absolute())))
        for path in others
        if path.name not in shards | {INFO_FILE}
    }
    info = replace(info, files=files)
    totals = {
        split: {"tokens": info.tokens(split), "documents": info.documents(split)} for split in info.splits
    }
    # What people look for stands first.
    content = {"format_version": FORMAT_VERSION, "totals": totals, **asdict(info)}
    with replacing(directory / INFO_FILE) as file:
        file.write(f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode())
    # Makes the names of the shards survive a power cut, too.
    sync(directory)
    return info


def read_info(directory: str | Path) -> DatasetInfo:
    """Read `dataset.json` of a directory of this machine.

    Raises DatasetError if it is missing, damaged or of another format version.
    """
    file = Path(directory) / INFO_FILE
    if not file.is_file():
        raise DatasetError(
            f"{directory} is not a prepared dataset (no {INFO_FILE}); run jobs/prepare_data.py"
        )
    return parse_info(file.read_bytes(), str(file))


def parse_info(text: bytes, file: str) -> DatasetInfo:
    """Return the content of a `dataset.json`, `file` in messages. Raises DatasetError as `read_info` does."""
    try:
        content = json.loads(text)
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise DatasetError(
                f"{file} has format version {version}; it must have version {FORMAT_VERSION}; {PREPARE_AGAIN}"
            )
        del content["totals"]
        return from_json(DatasetInfo, content)
    except DatasetError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(f"{file} is damaged ({error!r:.200}); {PREPARE_AGAIN}") from error
