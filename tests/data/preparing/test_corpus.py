from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_ray.data.preparing.corpus import divide, find_corpus, sample
from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import read
from llama_ray.data.sources.files import SourceError
from llama_ray.data.sources.left_out import Tally
from tests.data.helpers import taken


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


@pytest.mark.parametrize("seed", range(8))
def test_what_is_not_text_is_never_all_of_a_split(tmp_path: Path, seed: int) -> None:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_bytes(b"\xe9" if number > 1 else b"good text")
        (tmp_path / f"{number}.jsonl").write_bytes(b"\n")
    corpus = find_corpus(str(tmp_path))
    splits = divide(corpus, 0.01, seed)
    for documents in splits.values():
        assert [
            text.text for document in documents for text in read(document, TextFields(), Tally().add)
        ] == ["good text"]


def test_documents_that_hold_no_text_are_not_enough(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"\xe9")
    (tmp_path / "c.tar").write_bytes(b"BZh")
    message = (
        r"has 1 document \(left out 1 file \(c.tar\): archives, .*; unpack them first; left out 1 document "
        r"\(b.txt:1\): not UTF-8.*\); training and validation need one each"
    )
    with pytest.raises(SourceError, match=message):
        divide(find_corpus(str(tmp_path)), 0.5, 0)


def test_no_file_is_taken_twice(folder: Path) -> None:
    (folder / "sub" / "link.txt").symlink_to(folder / "b.txt")
    (folder / "a link.txt").symlink_to(folder / "sub" / "README")
    for source in (folder, folder / "**", folder.as_uri()):
        found, left_out = taken(source)
        assert sorted(found) == ["bee", "no suffix", "see()", "é"]
        assert (
            "left out 2 files (sub/README, sub/link.txt): the same file as another one, by a link" in left_out
        )


def test_the_output_is_not_text_of_its_own_source(folder: Path) -> None:
    before = find_corpus(str(folder)).fingerprint
    (folder / "data").mkdir()
    (folder / "data" / "tokenizer.json").write_text("{}")
    corpus = find_corpus(str(folder), output=folder / "data")
    assert corpus.fingerprint == before
    assert "left out 1 file (data/tokenizer.json): in the output directory" in corpus.left_out.lines()
