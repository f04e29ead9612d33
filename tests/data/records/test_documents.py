from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.records.documents import DOCUMENT_BYTES
from llama_ray.data.records.pieces import PIECE_BYTES
from tests.data.records.helpers import found, pieces, taken, texts

ISO = "not UTF-8; convert them"


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


@pytest.mark.parametrize("size", [PIECE_BYTES - 1, PIECE_BYTES + DOCUMENT_BYTES // 4, 2 * PIECE_BYTES + 99])
def test_documents_are_the_same_from_pieces_and_from_a_stream(tmp_path: Path, size: int) -> None:
    content = (b"some words, and more of them\n" * (size // 29 + 1))[:size]
    (tmp_path / "a.txt").write_bytes(content)
    documents, _ = found(tmp_path)
    assert "".join(text.text for text in documents).encode() == content
    offset = 0
    for text in documents:
        assert text.offset == offset
        offset += len(text.text)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content, 1))
    assert found(tmp_path)[0] == documents


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path / "a.txt") == ["hello"]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("one\ncaf\xe9".encode("latin-1"), 2, ISO),
        ("one\ncafé".encode("utf-16"), 1, "NUL characters"),
        ("one\ncafé".encode("utf-16-le"), 1, "NUL characters"),
        ("one\ncafé".encode("utf-16-be"), 1, "NUL characters"),
        ("日本語".encode("utf-16"), 1, ISO),
        ("one\ncafé".encode("utf-32"), 1, "NUL characters"),
        (b"one\ntwo\nthr\0ee", 3, "NUL characters"),
    ],
)
def test_a_file_that_is_not_text_is_named_with_its_line(
    tmp_path: Path, content: bytes, line: int, reason: str
) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "a.TXT").write_bytes(content)
    documents, tally = found(tmp_path)
    assert [text.text for text in documents] == ["good"]
    assert tally.bad == 1
    [told] = tally.lines()
    assert told.startswith(f"left out 1 document (a.TXT:{line}): {reason}")
    # The same rule for a file that is named itself.
    assert taken(tmp_path / "a.TXT") == ([], [told])


def test_a_file_with_nothing_but_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    _, tally = found(tmp_path)
    assert (tally.lines(), tally.bad) == (["left out 1 document (a.txt:1): empty"], 0)


@pytest.mark.parametrize("number", [7, 70_000, 900_000])
def test_one_bad_byte_in_a_long_file_costs_one_document(tmp_path: Path, number: int) -> None:
    lines = [b"hello"] * ((PIECE_BYTES + 3 * DOCUMENT_BYTES) // 6)
    lines[number - 1] = b"h\xe9llo"
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    assert len(pieces(tmp_path)) == 2
    documents, left_out = taken(tmp_path)
    assert sum(map(len, documents)) > PIECE_BYTES + 1.9 * DOCUMENT_BYTES
    assert len(left_out) == 1
    assert left_out[0].startswith(f"left out 1 document (a.txt:{number}): {ISO}")


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_a_short_file_is_one_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "a.md"
    path.write_bytes(text.encode())
    assert texts(path) == ([text.removeprefix("\ufeff")] if text != "\ufeff" else [])
