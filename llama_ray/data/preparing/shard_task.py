"""One task of a preparation: tokenise a group of documents and write them as a shard."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_ray.data.dataset.shards import DatasetError, ShardWriter, Tokens, token_bytes
from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import Piece, read
from llama_ray.data.sources.files import File
from llama_ray.data.sources.left_out import Tally
from llama_ray.data.tokenizing.tokenizer import Tokenizer


@dataclass
class ShardResult:
    """What became of a group of documents.

    `shard` describes the file as JSON, null where no text was found. `bytes` counts all bytes of the documents,
    `text_bytes` those of the texts in them, and `left_out` is a `Tally` as JSON.
    `error` is a message for the user, or empty: Ray would wrap an exception into a page of traceback.
    """

    file: str
    shard: str = "null"
    bytes: int = 0
    text_bytes: int = 0
    left_out: str = ""
    error: str = ""


def make_group(file: str, documents: Sequence[Piece]) -> dict[str, str]:
    """Return a row of Ray Data: the documents that the shard `file` will hold."""
    # JSON, because Ray Data would turn nested values into Arrow types.
    return {"file": file, "documents": json.dumps(documents)}


def write_group(
    group: dict[str, Any], directory: str, tokenizer_fingerprint: str, source: str
) -> dict[str, Any]:
    """Write the shard of a row from `make_group` into `directory`; runs in a Ray worker.

    `source` is its label, and `directory` holds the tokenizer, too. Returns the fields of a `ShardResult`.
    """
    # A task has one CPU; the tokenizer would start a thread for each core of the machine.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    result = ShardResult(group["file"])
    left_out = Tally()
    try:
        tokenizer = _load_tokenizer(directory, tokenizer_fingerprint)
        path, width = Path(directory, result.file), token_bytes(tokenizer.vocab_size)
        with ShardWriter(path, width, source=source) as writer:
            for tokens in _encode_documents(group["documents"], tokenizer, result, left_out):
                writer.add(tokens, np.array([len(tokens)]))
        result.shard = json.dumps(writer.shard and asdict(writer.shard))
    except ValueError as error:
        result.error = str(error)
    except OSError as error:
        result.error = (
            f"cannot write to {directory} on a worker ({error}); free space or choose another output"
        )
    result.left_out = left_out.to_json()
    return asdict(result)


def _encode_documents(
    documents: str, tokenizer: Tokenizer, result: ShardResult, left_out: Tally
) -> Iterator[Tokens]:
    """Yield the token ids of each text, and count into `result` and `left_out`."""
    for file, *place in json.loads(documents):
        document = Piece(File(*file), *place)
        result.bytes += document.size
        for text in read(document, TextFields(), left_out.add):
            result.text_bytes += len(text.text.encode())
            yield np.array(tokenizer.encode(text.text, bos=True, eos=True), dtype=np.uint32)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(directory: str, fingerprint: str) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    if tokenizer.fingerprint != fingerprint:
        raise DatasetError(
            f"{directory} holds another tokenizer on a worker; give an --output on storage that all nodes share"
        )
    return tokenizer
