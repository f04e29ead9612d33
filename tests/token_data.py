"""A small prepared data directory, written without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llama_ray.data.dataset.shards import DatasetInfo, Shard, shard_name, token_bytes, write_info, write_shard
from llama_ray.data.tokenizing.tokenizer import Tokenizer

TEXTS = [f"def f{i}(x):\n    return x * {i} + {i * i}\n\nprint(f{i}({i}))\n" * 8 for i in range(60)]


def write_dataset(directory: Path, vocab_size: int = 400) -> Path:
    """Write a data directory with a training and a validation split of `TEXTS`, and return it."""
    directory.mkdir(parents=True)
    tokenizer = Tokenizer.train(iter(TEXTS), vocab_size)
    tokenizer.save(directory)
    width = token_bytes(tokenizer.vocab_size)
    splits = {}
    for split, texts in (("train", TEXTS[:50]), ("validation", TEXTS[50:])):
        ids = [np.array(tokenizer.encode(t, bos=True, eos=True)) for t in texts]
        count = write_shard(directory / shard_name(split, 0), ids, width)
        splits[split] = (Shard(shard_name(split, 0), count, len(texts)),)
    write_info(
        directory,
        DatasetInfo(
            source="test",
            seed=0,
            fingerprint="test",
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            token_bytes=width,
            splits=splits,
        ),
    )
    return directory
