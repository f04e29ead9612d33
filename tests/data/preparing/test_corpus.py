from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_ray.data.preparing.bad_records import report_beside
from llama_ray.data.preparing.config import NamedSource
from llama_ray.data.preparing.corpus import Corpus, find_corpus, in_random_order
from llama_ray.data.preparing.parts import Part, divide
from llama_ray.data.records.fields import TextFields
from llama_ray.data.sources.files import SourceError
from tests.data.helpers import taken


def corpus_of(
    *sources: Path | str, output: Path | None = None, max_bytes: int | None = None, seed: int = 0
) -> Corpus:
    named = [NamedSource(name, str(where)) for name, where in zip("abc", sources, strict=False)]
    return find_corpus(named, TextFields(), max_bytes, seed, output)


def test_pieces_keep_their_ids_and_order_when_the_folder_moves(folder: Path) -> None:
    [before] = corpus_of(folder).sources
    moved = folder.rename(folder.with_name("moved"))
    [after] = corpus_of(moved).sources
    assert [piece.id for piece in before.pieces] == [piece.id for piece in after.pieces]
    assert [piece.id for piece in in_random_order(before, 3)] == [
        piece.id for piece in in_random_order(after, 3)
    ]


def test_max_bytes_chooses_pieces_by_seed_and_not_by_name(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"{number:03}.txt").write_text("x" * (500 + number))
    [everything] = corpus_of(tmp_path).sources
    [chosen] = corpus_of(tmp_path, max_bytes=20_000, seed=1).sources
    assert 19_000 < chosen.size <= 20_000
    assert chosen.pieces == corpus_of(tmp_path, max_bytes=20_000, seed=1).sources[0].pieces
    assert chosen.pieces != corpus_of(tmp_path, max_bytes=20_000, seed=2).sources[0].pieces
    assert chosen.left_out.lines() == [f"left out {200 - len(chosen.pieces)} pieces: beyond max_bytes"]
    positions = [everything.pieces.index(piece) for piece in chosen.pieces]
    assert positions == sorted(positions)
    assert positions[-1] > 160
    [all_chosen] = corpus_of(tmp_path, max_bytes=everything.size).sources
    assert all_chosen.pieces == everything.pieces
    with pytest.raises(
        SourceError, match="max_bytes is 1; it must be at least 500, the size of the smallest"
    ):
        corpus_of(tmp_path, max_bytes=1)


def test_the_fingerprint_changes_with_names_sizes_and_times(folder: Path) -> None:
    seen = {corpus_of(folder).fingerprint}
    assert corpus_of(folder).fingerprint in seen
    (folder / "b.txt").write_bytes(b"more")
    seen.add(corpus_of(folder).fingerprint)
    os.utime(folder / "b.txt", (1, 1))
    seen.add(corpus_of(folder).fingerprint)
    (folder / "b.txt").rename(folder / "c.txt")
    seen.add(corpus_of(folder).fingerprint)
    seen.add(find_corpus([NamedSource("other", str(folder))], TextFields()).fingerprint)
    assert len(seen) == 5


def test_no_file_is_taken_twice(folder: Path) -> None:
    (folder / "sub" / "link.txt").symlink_to(folder / "b.txt")
    (folder / "a link.txt").symlink_to(folder / "sub" / "README")
    for source in (folder, folder / "**", folder.as_uri()):
        found, left_out = taken(source)
        assert sorted(found) == ["bee", "no suffix", "see()", "é"]
        assert (
            "left out 2 files (sub/README, sub/link.txt): the same file as another one, by a link" in left_out
        )


def test_a_file_of_two_sources_belongs_to_the_first(folder: Path) -> None:
    first, second = corpus_of(folder / "sub", folder).sources
    assert {piece.file.name for piece in first.pieces} == {"README", "c.py"}
    assert {piece.file.name for piece in second.pieces} == {"a.md", "b.txt"}


def test_the_output_is_not_text_of_its_own_source(folder: Path) -> None:
    before = corpus_of(folder).fingerprint
    (folder / "data").mkdir()
    (folder / "data" / "tokenizer.json").write_text("{}")
    corpus = corpus_of(folder, output=folder / "data")
    assert corpus.fingerprint == before
    assert (
        "left out 1 file (data/tokenizer.json): in the output directory" in corpus.sources[0].left_out.lines()
    )


def test_the_report_of_a_preparation_that_failed_is_not_text_of_its_source(folder: Path) -> None:
    before = corpus_of(folder).fingerprint
    report_beside(folder / "data").write_text(
        '{"source": "a", "record": "b.jsonl:2", "reason": "not JSON"}\n'
    )
    corpus = corpus_of(folder, output=folder / "data")
    assert corpus.fingerprint == before
    assert any("(data.bad_records.jsonl)" in line for line in corpus.sources[0].left_out.lines())


def test_a_part_holds_consecutive_pieces_of_one_source(folder: Path) -> None:
    corpus = corpus_of(folder / "sub", folder)
    for part_bytes in (1, 8, 10**6):
        parts = divide(corpus, part_bytes)
        assert [part.index for part in parts] == list(range(len(parts)))
        for source in corpus.sources:
            of_source = [part for part in parts if part.source == source.source.name]
            assert [piece for part in of_source for piece in part.pieces] == source.pieces
            assert all(part.size >= part_bytes for part in of_source[:-1])
        assert [Part.from_json(part.to_json()) for part in parts] == parts
