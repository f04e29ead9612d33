"""A tokenised dataset on disk: shards of token ids, their tokenizer, and `dataset.json`.

A shard is a header (`MAGIC`, format version, bytes a token, number of tokens; little-endian) followed by the token
ids, little-endian uint16 if the vocabulary allows it, else uint32. Each document is bos, its tokens, eos.
`dataset.json` is written last: a directory without it is not a dataset.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ray.storage.atomic import replacing, sync
from llama_ray.storage.paths import is_uri
from llama_ray.utils.errors import UserError

MAGIC = b"LLAMARAY"
FORMAT_VERSION = 1
INFO_FILE = "dataset.json"
SPLITS = ("train", "validation")
_AGAIN = "prepare the data again (--overwrite)"
_HEADER = struct.Struct("<8sIIQ")
# A content fingerprint reads at most so many windows of so many bytes: 64 MiB.
_WINDOWS, _WINDOW_BYTES = 4096, 1 << 14
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}

Tokens = npt.NDArray[np.integer]


class DatasetError(UserError):
    """A dataset directory that cannot be used."""


@dataclass(frozen=True)
class Shard:
    """A file of tokens, and the numbers of tokens and documents in it."""

    file: str
    tokens: int
    documents: int


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`.

    `fingerprint` identifies what the dataset was made from (settings and source files), `tokenizer_fingerprint` the
    tokenizer in the directory. `token_bytes` is the size of a token id on disk, 2 or 4.
    """

    source: str
    seed: int
    fingerprint: str
    vocab_size: int
    tokenizer_fingerprint: str
    token_bytes: int
    splits: dict[str, tuple[Shard, ...]]

    def tokens(self, split: str) -> int:
        """Return the number of tokens in `split`, including bos and eos."""
        return sum(shard.tokens for shard in self.splits[split])

    def documents(self, split: str) -> int:
        """Return the number of documents in `split`."""
        return sum(shard.documents for shard in self.splits[split])


def token_bytes(vocab_size: int) -> int:
    """Return the size of a token id on disk in bytes."""
    return 2 if vocab_size <= 2**16 else 4


def shard_name(split: str, index: int) -> str:
    """Return the name of a shard's file, such as `train-00000.bin`."""
    return f"{split}-{index:05d}.bin"


def write_shard(path: Path, documents: Iterable[Tokens], width: int) -> int:
    """Write the token ids of `documents`, `width` bytes each, and return their number.

    The file gets its name only when it is complete and on disk, so a killed writer leaves no incomplete shard.
    """
    count = 0
    with replacing(path) as file:
        file.write(_HEADER.pack(MAGIC, FORMAT_VERSION, width, 0))
        for tokens in documents:
            file.write(tokens.astype(_DTYPES[width]).tobytes())
            count += len(tokens)
        file.seek(0)
        file.write(_HEADER.pack(MAGIC, FORMAT_VERSION, width, count))
    return count


def open_shard(path: Path) -> Tokens:
    """Map the token ids of a shard into memory, read-only.

    Raises DatasetError for a missing file, a file that is not a shard, another format version, and a file that is
    shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        size = path.stat().st_size
    except OSError as error:
        raise DatasetError(f"cannot read shard {path} ({error.strerror}); {_AGAIN}") from error
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise DatasetError(f"{path} is not a token shard; {_AGAIN}")
    _, version, width, count = _HEADER.unpack(header)
    if version != FORMAT_VERSION or width not in _DTYPES:
        raise DatasetError(
            f"{path} has format version {version} with {width}-byte tokens; it must have version "
            f"{FORMAT_VERSION} with 2 or 4 bytes; {_AGAIN}"
        )
    expected = _HEADER.size + count * width
    if size != expected:
        raise DatasetError(f"{path} has {size} bytes; {count} tokens need {expected}; {_AGAIN}")
    if count == 0:  # An empty range cannot be mapped.
        return np.empty(0, dtype=_DTYPES[width])
    return np.memmap(path, dtype=_DTYPES[width], mode="r", offset=_HEADER.size, shape=(count,))


def content_fingerprint(directory: Path, info: DatasetInfo) -> str:
    """Return a digest of the tokens of all splits, wherever and whenever they were prepared.

    Up to 64 MiB of shards are read whole. Of more, windows at even distances are, because reading all of a large
    dataset takes minutes; together with the numbers of tokens and documents of each shard they tell datasets apart.
    """
    described = [[split, *map(asdict, info.splits[split])] for split in sorted(info.splits)]
    digest = hashlib.sha256(json.dumps([info.tokenizer_fingerprint, described]).encode())
    shards = [shard for split in sorted(info.splits) for shard in info.splits[split]]
    total = sum(shard.tokens for shard in shards) * info.token_bytes
    stride = max(_WINDOW_BYTES, total // _WINDOWS)
    # Bytes of earlier shards, so that the windows are spread over all of them.
    before = 0
    for shard in shards:
        size = shard.tokens * info.token_bytes
        with (directory / shard.file).open("rb") as file:
            for window in range(before - before % stride, before + size, stride):
                start = max(window - before, 0)
                file.seek(_HEADER.size + start)
                digest.update(file.read(max(min(window + _WINDOW_BYTES - before, size) - start, 0)))
        before += size
    return digest.hexdigest()


def write_info(directory: Path, info: DatasetInfo) -> None:
    """Write `dataset.json` atomically; call it when everything else is on disk."""
    content = {"format_version": FORMAT_VERSION, **asdict(info)}
    content["totals"] = {
        split: {"tokens": info.tokens(split), "documents": info.documents(split)} for split in info.splits
    }
    with replacing(directory / INFO_FILE) as file:
        file.write(f"{json.dumps(content, indent=2)}\n".encode())
    # Makes the names of the shards survive a power cut, too.
    sync(directory)


def read_info(directory: str | Path) -> DatasetInfo:
    """Read `dataset.json`. Raises DatasetError if it is missing, damaged or of another format version."""
    if is_uri(str(directory)):
        raise DatasetError(
            f"data is {directory}; it must be a directory on storage that all nodes mount, not a URI"
        )
    file = Path(directory) / INFO_FILE
    if not file.is_file():
        raise DatasetError(
            f"{directory} is not a prepared dataset (no {INFO_FILE}); run jobs/prepare_data.py"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise DatasetError(
                f"{file} has format version {version}; it must have version {FORMAT_VERSION}; {_AGAIN}"
            )
        content.pop("totals")
        content["splits"] = {
            split: tuple(Shard(**shard) for shard in shards) for split, shards in content["splits"].items()
        }
        return DatasetInfo(**content)
    except DatasetError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DatasetError(f"{file} is damaged ({error!r}); {_AGAIN}") from error
