from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llama_ray.data.dataset.info import TokenizerInfo
from tests.token_data import write_documents

MakeDataset = Callable[..., Path]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """Write a dataset whose tokens count up from 0, so that each sample is different."""

    def make(train: Sequence[int], validation: Sequence[int] = (50,), vocab_size: int = 100_000) -> Path:
        splits = {}
        for split, lengths in (("train", train), ("validation", validation)):
            ends = itertools.accumulate(lengths, initial=0)
            splits[split] = [[range(start, end)] for start, end in itertools.pairwise(ends)]
        directory = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        return write_documents(directory, splits, TokenizerInfo("test", vocab_size))

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
