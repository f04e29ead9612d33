"""Whether the files of a dataset are those that were written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llama_ray.data.dataset.files import DatasetFiles, Place
from llama_ray.data.dataset.info import INFO_FILE, FileInfo, TokenizerInfo
from llama_ray.data.dataset.shards import Starts, Tokens
from llama_ray.utils.errors import first_line

_CHUNK_BYTES = 8 * 2**20


def verify(files: DatasetFiles) -> Iterator[str]:
    """Read all files of a dataset and yield a line for each that is not as `dataset.json` says: none if all are.

    The files must have the checksums that were written, where there are any. The documents of a shard must follow each
    other from its first token on, begin with bos, end with eos and hold no id outside of the vocabulary.
    """
    expected = dict(files.info.files)
    # A file of Megatron may hold shards of both splits.
    shards: dict[str, list[tuple[str, int]]] = {}
    for split, entries in files.info.splits.items():
        for number, shard in enumerate(entries):
            expected[shard.file] = FileInfo(shard.bytes, shard.sha256)
            shards.setdefault(shard.file, []).append((split, number))
    names = {file.sha256: name for name, file in expected.items()}

    def fault(name: str) -> str | None:
        try:
            checks = (_wrong_documents(files, *shard) for shard in shards.get(name, ()))
            return _changed(files, name, expected[name], names) or next(filter(None, checks), None)
        except (ValueError, OSError) as error:
            return f"cannot be read ({first_line(error)})"

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, found in zip(expected, threads.map(fault, expected), strict=True):
            if found:
                yield f"{name} {found}"


def _changed(files: DatasetFiles, name: str, expected: FileInfo, names: dict[str, str]) -> str | None:
    """Say how the content of a file differs from what was written; None if it does not."""
    size = files.size(name)
    if size is None:
        return "is missing"
    if size != expected.bytes:
        return f"has {size} bytes; {INFO_FILE} says {expected.bytes}: it was cut off or replaced"
    if not expected.sha256:
        return None
    digest = hashlib.sha256()
    for start in range(0, size, _CHUNK_BYTES):
        digest.update(files.read_file(name, start, min(start + _CHUNK_BYTES, size)))
    found = digest.hexdigest()
    if found == expected.sha256:
        return None
    if found in names:
        return f"holds what {INFO_FILE} says of {names[found]}: they were swapped"
    return f"has checksum {found[:12]}; {INFO_FILE} says {expected.sha256[:12]}: it was damaged or changed"


def _wrong_documents(files: DatasetFiles, split: str, number: int) -> str | None:
    """Say what is wrong with the documents of a shard; None if nothing is."""
    shard = files.info.splits[split][number]
    tokenizer = files.info.tokenizer
    [span] = files.read(split, [Place(number, 0, shard.tokens)])
    starts, tokens = files.starts(split, number), span.tokens
    if len(starts) == 0 or starts[0] != 0 or (starts[1:] <= starts[:-1]).any() or starts[-1] >= len(tokens):
        return "has a document index that is not in order"
    if (largest := int(tokens.max())) >= tokenizer.vocab_size:
        return f"holds the token id {largest}; the vocabulary has {tokenizer.vocab_size}"
    if (row_tokens := files.info.row_tokens) is not None:
        if len(tokens) % row_tokens or not np.isin(np.arange(0, len(tokens), row_tokens), starts).all():
            return f"has rows that do not begin with a document every {row_tokens} tokens"
    elif wrong := _wrong_borders(tokens, starts, tokenizer):
        return wrong
    trained = shard.tokens if span.learned is None else int(np.count_nonzero(span.learned))
    if trained != shard.trained:
        return f"has {trained} tokens to be learned; {INFO_FILE} says {shard.trained}"
    return None


def _wrong_borders(tokens: Tokens, starts: Starts, tokenizer: TokenizerInfo) -> str | None:
    """Say which text does not stand between bos and eos; None if all do."""
    if tokenizer.bos_id is not None and (wrong := _other(tokens, starts, tokenizer.bos_id)) is not None:
        return f"has a document that does not begin with bos (number {wrong})"
    ends = np.append(starts[1:], len(tokens)).astype(np.int64) - 1
    if tokenizer.eos_id is not None and (wrong := _other(tokens, ends, tokenizer.eos_id)) is not None:
        return f"has a document that does not end with eos (number {wrong})"
    return None


def _other(tokens: Tokens, positions: Starts, expected: int) -> int | None:
    """Return the first of the `positions` that holds another token, by its number; None if all hold `expected`."""
    wrong = np.flatnonzero(tokens[positions] != expected)
    return int(wrong[0]) if len(wrong) else None
