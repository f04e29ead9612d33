from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_ray.data.corpus import find_corpus, sample
from llama_ray.data.sources import SourceError


def test_documents_keep_their_ids_when_the_folder_moves(folder: Path) -> None:
    before = find_corpus(str(folder)).documents
    moved = folder.rename(folder.with_name("moved"))
    after = find_corpus(str(moved)).documents
    assert [document.id for document in before] == [document.id for document in after]
    assert [document.uniform(3) for document in before] == [document.uniform(3) for document in after]


def test_max_bytes_chooses_documents_by_seed_and_not_by_name() -> None:
    everything = find_corpus("builtin").documents
    chosen = find_corpus("builtin", max_bytes=1_000_000, seed=1)
    assert 900_000 < chosen.size <= 1_000_000
    assert chosen.documents == find_corpus("builtin", max_bytes=1_000_000, seed=1).documents
    assert chosen.documents != find_corpus("builtin", max_bytes=1_000_000, seed=2).documents
    positions = [everything.index(document) for document in chosen.documents]
    assert positions == sorted(positions)
    assert positions[-1] > len(everything) * 0.8
    assert sample(everything, 10**12, 0) == everything
    with pytest.raises(SourceError, match="max_bytes is 1; it must be at least the size of a document"):
        find_corpus("builtin", max_bytes=1)


def test_the_fingerprint_changes_with_names_sizes_and_times(folder: Path) -> None:
    seen = {find_corpus(str(folder)).fingerprint}
    assert find_corpus(str(folder)).fingerprint in seen
    (folder / "b.txt").write_bytes(b"more")
    seen.add(find_corpus(str(folder)).fingerprint)
    os.utime(folder / "b.txt", (1, 1))
    seen.add(find_corpus(str(folder)).fingerprint)
    (folder / "b.txt").rename(folder / "c.txt")
    seen.add(find_corpus(str(folder)).fingerprint)
    assert len(seen) == 4
