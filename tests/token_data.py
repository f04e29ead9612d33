"""Small prepared data directories, written without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llama_ray.data.dataset.info import DatasetInfo, SourceInfo, Task, TokenizerInfo, write_info
from llama_ray.data.dataset.shards import Shard, ShardWriter, shard_name, token_bytes
from llama_ray.data.tokenizing.tokenizer import Tokenizer

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i * i}\n\nprint(f{i}({i}))\n" * 8 for i in range(60)]
SOURCE = "test"

Documents = Sequence[Sequence[int]]
INFO = DatasetInfo(
    fingerprint="test",
    seed=0,
    token_bytes=2,
    tokenizer=TokenizerInfo("test", 300),
    sources=(SourceInfo(SOURCE, "tests/token_data.py"),),
    splits={},
)


def write_dataset(directory: Path, vocab_size: int = 400, tokenizer: Tokenizer | None = None) -> Path:
    """Write a data directory with a training and a validation split of `TEXTS`, and return it.

    By default its tokenizer is trained on them.
    """
    directory.mkdir(parents=True)
    tokenizer = tokenizer or Tokenizer.train(iter(TEXTS), vocab_size)
    tokenizer.save(directory)
    documents = [tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]
    ids = tokenizer.bos_id, tokenizer.eos_id
    summary = TokenizerInfo(tokenizer.fingerprint, tokenizer.vocab_size, *ids)
    return write_documents(directory, {"train": [documents[:50]], "validation": [documents[50:]]}, summary)


def write_documents(
    directory: Path,
    splits: Mapping[str, Sequence[Documents]],
    tokenizer: TokenizerInfo = INFO.tokenizer,
    learned: Mapping[str, Sequence[Sequence[bool]]] | None = None,
    row_tokens: int | None = None,
) -> Path:
    """Write the shards of each split, a list of documents each, and `dataset.json`; return `directory`.

    `learned` holds a loss mask for each shard of the splits that have one. With `row_tokens` the documents are those of
    rows for sft.
    """
    directory.mkdir(parents=True, exist_ok=True)
    width = token_bytes(tokenizer.vocab_size)
    shards: dict[str, tuple[Shard, ...]] = {}
    for split, parts in splits.items():
        masks = (learned or {}).get(split) or [None] * len(parts)
        written = [
            write_shard(directory / shard_name(split, number), documents, width, mask)
            for number, (documents, mask) in enumerate(zip(parts, masks, strict=True))
        ]
        shards[split] = tuple(shard for shard in written if shard)
    task: Task = "pretrain" if row_tokens is None else "sft"
    info = replace(INFO, tokenizer=tokenizer, token_bytes=width, task=task, row_tokens=row_tokens)
    write_info(directory, replace(info, splits=shards))
    return directory


def write_shard(
    path: Path, documents: Documents, width: int = 2, learned: Sequence[bool] | None = None
) -> Shard | None:
    """Write `documents` as one shard, with a loss mask if `learned` is given."""
    with ShardWriter(path, width, source=SOURCE, masks=learned is not None) as writer:
        writer.add(
            np.array([token for document in documents for token in document], dtype=np.int64),
            np.array([len(document) for document in documents], dtype=np.int64),
            None if learned is None else np.array(learned, dtype=np.bool_),
        )
    return writer.shard
