from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.records.lines import lines
from llama_ray.data.records.pieces import PIECE_BYTES
from tests.data.records.helpers import found, pieces, taken, texts

GOOD = b'{"text": "good"}'
ISO = "not UTF-8; convert them"


@settings(deadline=None)
@given(st.lists(st.binary(max_size=8).map(lambda part: part.replace(b"a", b"\n"))), st.integers(0, 12))
def test_lines_are_those_of_the_whole_wherever_its_blocks_end(blocks: list[bytes], limit: int) -> None:
    expected = []
    offset = 0
    for line in b"".join(blocks).split(b"\n"):
        expected.append((offset, line if len(line) <= limit else None))
        offset += len(line) + 1
    # What follows the last line end is a line only if it is something.
    if expected[-1][1] == b"":
        expected.pop()
    assert list(lines(iter(blocks), limit)) == expected


def test_a_jsonl_file_has_one_text_a_line_at_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": "one\ntwo"}, {"text": ""}, {"text": "é🎉", "id": 3}, {"text": "last"}]
    path.write_text("\n\n".join(map(json.dumps, records)))
    taken, tally = found(path)
    assert [text.text for text in taken] == ["one\ntwo", "é🎉", "last"]
    content = path.read_bytes()
    assert all(json.loads(content[text.offset :].split(b"\n")[0])["text"] == text.text for text in taken)
    # A text that is empty is no mistake.
    assert tally.lines() == ["left out 1 record (a.jsonl:3): empty"]
    assert tally.bad == 0


def test_each_line_of_a_large_file_is_in_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # Lines that end before, at and after the end of a piece, and one that fills several.
    ends = [PIECE_BYTES - 20, PIECE_BYTES, 2 * PIECE_BYTES + 1, 3 * PIECE_BYTES - 1, 6 * PIECE_BYTES]
    ends += [6 * PIECE_BYTES + 20]
    sizes = [stop - start for start, stop in itertools.pairwise([0, *ends])]
    lines = [f'{{"text": "{"x" * (size - len(GOOD) - 1 + len("good"))}"}}\n' for size in sizes]
    path.write_text("".join(lines))
    assert path.stat().st_size == ends[-1]
    assert len(pieces(path)) == 7
    assert texts(path) == [json.loads(line)["text"] for line in lines]


def test_a_line_that_is_too_long_is_left_out_without_being_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b"\n" + b'{"text": "')
        for _ in range(24):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + GOOD + b"\n" + GOOD)
    assert len(pieces(path)) > 4
    tracemalloc.start()
    try:
        result = taken(path, limit=2**20)
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
    finally:
        tracemalloc.stop()
    assert result == (
        ["good", "good", "good"],
        ["left out 1 record (a.jsonl:2): longer than a record may be (64 MiB); cut them into several"],
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b'"text"', "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'{"content": "a"}', "no field 'text'"),
        (b'{"text": "a", "text": "b"}', "no field 'text', or two; name one with --text_field"),
        (b'{"text": 3}', "field 'text' is not text"),
        (b'{"text": ["a"]}', "field 'text' is not text"),
        (b'{"text": null}', "field 'text' is null"),
        (b'{"text": "caf\xe9"}', ISO),
        (b'{"text": "a", "id": "\xff"}', ISO),
        (b'{"text": "\xed\xa0\x80"}', ISO),
        (b'{"text": "a\\ud83c"}', "half of a surrogate pair"),
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
    texts, tally = found(tmp_path)
    assert [text.text for text in texts] == ["good", "good"]
    assert tally.bad == 1
    [told] = tally.lines()
    assert told.startswith(f"left out 1 record (a.jsonl:{number}): {reason}")


def test_a_bad_record_of_a_later_piece_is_named_by_its_line_too(tmp_path: Path) -> None:
    lines = [GOOD + b" " * 80] * (PIECE_BYTES // 50)
    lines[-2] = b"{"
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert len(pieces(tmp_path)) == 2
    assert taken(tmp_path)[1] == [f"left out 1 record (a.jsonl:{len(lines) - 1}): not JSON"]


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
    assert texts(tmp_path) == ["good", "good"]


@pytest.mark.parametrize("blank", ["", " \t", "\r"])
def test_blank_lines_are_no_records(tmp_path: Path, blank: str) -> None:
    good = [json.dumps({"text": str(number)}) for number in range(40)]
    lines = [blank, blank]
    for line in good:
        lines += [line, blank, blank]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), newline="")
    assert texts(tmp_path) == [str(number) for number in range(40)]
    (tmp_path / "b.jsonl").write_text("\n\n \n")
    assert taken(tmp_path)[1] == ["left out 1 file (b.jsonl): without a record"]
