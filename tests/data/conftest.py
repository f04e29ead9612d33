from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from llama_ray.data.dataset.shards import DatasetInfo, Shard, shard_name, token_bytes, write_info, write_shard

MakeDataset = Callable[..., Path]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Write a dataset whose tokens count up from 0, so that each sample is different."""

    def make(train: Sequence[int], validation: Sequence[int] = (50,), vocab_size: int = 100_000) -> Path:
        directory = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        splits = {}
        for split, lengths in (("train", train), ("validation", validation)):
            shards, first = [], 0
            for index, length in enumerate(lengths):
                tokens = np.arange(first, first + length)
                write_shard(directory / shard_name(split, index), [tokens], token_bytes(vocab_size))
                shards.append(Shard(shard_name(split, index), length, 1))
                first += length
            splits[split] = tuple(shards)
        write_info(
            directory,
            DatasetInfo(
                source="test",
                seed=0,
                fingerprint="f",
                vocab_size=vocab_size,
                tokenizer_fingerprint="t",
                token_bytes=token_bytes(vocab_size),
                splits=splits,
            ),
        )
        return directory

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name, content in {
        "b.txt": b"bee",
        "a.md": "é".encode(),
        "sub/c.py": b"see()",
        "sub/README": b"no suffix",
        "sub/photo.png": b"\x89PNG\0\0",
        "sub/latin.dat": b"caf\xe9 ole",
        "sub/.git/config": b"hidden",
        ".hidden.txt": b"hidden",
        "empty.txt": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path
