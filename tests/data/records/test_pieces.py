from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.data.preparing.corpus import find_corpus
from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import DOCUMENT_BYTES, read
from llama_ray.data.sources.files import SourceError
from llama_ray.data.sources.left_out import Tally
from tests.data.helpers import taken, texts


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


GOOD = b'{"text": "good"}'
NO_TEXT = 'not {"text": "..."} with one text'
ISO = "not UTF-8; convert them"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b'"text"', NO_TEXT),
        (b"[1]", NO_TEXT),
        (b'{"content": "a"}', NO_TEXT),
        (b'{"text": 3}', NO_TEXT),
        (b'{"text": null}', NO_TEXT),
        (b'{"text": "a", "text": "b"}', NO_TEXT),
        (b'{"text": ""}', "empty"),
        (b'{"text": "caf\xe9"}', ISO),
        (b'{"text": "a", "id": "\xff"}', ISO),
        (b'{"text": "\xed\xa0\x80"}', ISO),
        (b'{"text": "a\0"}', "NUL characters"),
        (b'{"text": "a\\u0000"}', "NUL characters"),
        (b'{"text": "a", "deep": ' + b"[" * 100_000, "nested too deeply"),
        ('{"text": "a"}'.encode("utf-16-le"), "NUL characters"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("number", [1, 3, 5])
def test_only_the_bad_record_is_left_out_and_named_by_its_line(
    tmp_path: Path, line: bytes, reason: str, number: int
) -> None:
    lines = [GOOD, b"", GOOD, b" \t\r", GOOD]
    lines[number - 1] = line
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found, left_out = taken(tmp_path)
    assert found == ["good", "good"]
    assert len(left_out) == 1
    assert left_out[0].startswith(f"left out 1 record (a.jsonl:{number}): {reason}")


@pytest.mark.parametrize(
    "record",
    [
        '{"text": "good", "n": ' + "9" * 5000 + "}",
        '{"text": "good", "n": -1e999999, "m": NaN}',
        '{"id": 1, "id": 2, "text": "good", "meta": {"text": 1, "text": 2}}',
        '  {"text": "good"}\r',
        '\ufeff{"text": "good"}',
    ],
    ids=["5000 digits", "1e999999", "other fields twice", "crlf", "byte order mark"],
)
def test_what_is_beside_the_text_does_not_matter(tmp_path: Path, record: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{record}\n{record}", newline="")
    assert taken(tmp_path) == (["good", "good"], [])


@pytest.mark.parametrize("blank", ["", " \t", "\r"])
def test_blank_lines_are_not_documents(tmp_path: Path, blank: str) -> None:
    good = [json.dumps({"text": str(number)}) for number in range(40)]
    lines = [blank, blank]
    for line in good:
        lines += [line, blank, blank]
    for mark in ("", "\ufeff"):
        (tmp_path / "a.jsonl").write_text(mark + "\n".join(lines), newline="")
        corpus = find_corpus(str(tmp_path))
        assert len(corpus.documents) == 40
        assert texts(tmp_path) == [str(number) for number in range(40)]
    (tmp_path / "b.jsonl").write_text("\n\n \n")
    assert taken(tmp_path)[1] == ["left out 1 file (b.jsonl): empty"]


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
        (b"\xef\xbb\xbf", 1, "empty"),
    ],
)
def test_a_file_that_is_not_text_is_named_with_its_line(
    tmp_path: Path, content: bytes, line: int, reason: str
) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "a.TXT").write_bytes(content)
    found, left_out = taken(tmp_path)
    assert found == ["good"]
    assert len(left_out) == 1
    assert left_out[0].startswith(f"left out 1 document (a.TXT:{line}): {reason}")
    # The same rule for a file that is named itself.
    assert taken(tmp_path / "a.TXT") == ([], left_out)


def test_one_bad_byte_in_a_long_file_costs_one_document(tmp_path: Path) -> None:
    lines = [b"hello"] * (3 * DOCUMENT_BYTES // 6)
    lines[70_000] = b"h\xe9llo"
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
    found, left_out = taken(tmp_path)
    assert sum(map(len, found)) > 1.9 * DOCUMENT_BYTES
    assert len(left_out) == 1
    assert left_out[0].startswith(f"left out 1 document (a.txt:70001): {ISO}")


def test_a_file_that_was_changed_or_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    [document] = find_corpus(str(tmp_path)).documents
    for content in ("he", "hello hello", "HELLO"):
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(SourceError, match=r"a\.txt changed while it was read; start again"):
            list(read(document, TextFields(), Tally().add))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(SourceError, match=r"cannot read .*a\.txt"):
        list(read(document, TextFields(), Tally().add))
