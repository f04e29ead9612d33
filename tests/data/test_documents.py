from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.data.corpus import find_corpus
from llama_ray.data.documents import DOCUMENT_BYTES, NotUTF8Error, read
from llama_ray.data.sources import SourceError
from tests.data.helpers import texts


def test_a_jsonl_file_has_one_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"text": "one\ntwo"}, {"text": ""}, {"text": "é🎉", "id": 3}, {"text": "last"}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert texts(path) == ["one\ntwo", "é🎉", "last"]
    assert len(find_corpus(str(path)).documents) >= 2  # Even a small file can be divided into splits.


def test_a_large_jsonl_file_is_cut_between_lines_into_few_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [f"{n} " + "x" * (n * 37 % 900) for n in range(5000)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    assert texts(path) == lines
    assert 500 < len(find_corpus(str(path)).documents) <= 1001


def test_half_a_surrogate_pair_in_json_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83cb \\ud83c\\udf89"}')
    assert texts(tmp_path / "a.jsonl") == ["a\ufffdb 🎉"]


@pytest.mark.parametrize("line", ["{", '"text"', "[1]", '{"content": "a"}', '{"text": 3}', '{"text": null}'])
def test_invalid_jsonl_lines_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    message = r'a.jsonl has an invalid line after byte 0: .*; it must be \{"text": "..."\}'
    with pytest.raises(SourceError, match=message):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("line", "end"),
    [
        ("é" * 50 + "\n\n", "\n\n"),
        ("é" * 50 + "\r\n\r\n", "\n\r\n"),
        ("é" * 50 + "\n", "\n"),
        ("é日🎉" * 3, ""),
    ],
    ids=["blank lines", "crlf", "lines", "no lines"],
)
def test_a_long_file_is_cut_at_the_best_place(tmp_path: Path, line: str, end: str) -> None:
    path = tmp_path / "a.txt"
    content = line * (3 * DOCUMENT_BYTES // len(line.encode()))
    path.write_bytes(content.encode())
    parts = texts(path)
    assert "".join(parts) == content
    assert 3 <= len(parts) <= 5
    assert all(len(part.encode()) <= DOCUMENT_BYTES and part.endswith(end) for part in parts)


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path / "a.txt") == ["hello"]


def test_a_file_that_is_not_utf8_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 ole")
    with pytest.raises(NotUTF8Error, match=r"a.txt is not UTF-8 at byte 3; convert it"):
        texts(tmp_path / "a.txt")


def test_a_file_that_was_changed_or_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    [document] = find_corpus(str(tmp_path)).documents
    (tmp_path / "a.txt").write_text("he")
    with pytest.raises(SourceError, match="became shorter"):
        list(read(document))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(SourceError, match=r"cannot read .*a\.txt"):
        list(read(document))
