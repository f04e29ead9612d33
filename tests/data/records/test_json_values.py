from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.sources.blocks import BLOCK_BYTES
from tests.data.records.helpers import found, taken, texts

RECORDS = [{"text": f'{number} "é" \\ {{[,]}} \n', "more": [{"text": 1}, []]} for number in range(20)]
TEXTS = [record["text"] for record in RECORDS]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("layout", ["array", "one after the other", "lines", "arrays", "byte order mark"])
def test_records_of_any_layout_are_found(tmp_path: Path, layout: str, indent: int | None) -> None:
    written = [json.dumps(record, indent=indent, ensure_ascii=False) for record in RECORDS]
    content = {
        "array": json.dumps(RECORDS, indent=indent),
        "one after the other": "".join(written),
        "lines": "\n".join(written) + "\n",
        "arrays": json.dumps(RECORDS[:7], indent=indent) + "\n" + json.dumps(RECORDS[7:], indent=indent),
        "byte order mark": "\ufeff" + json.dumps(RECORDS, indent=indent),
    }[layout]
    (tmp_path / "a.json").write_text(content)
    taken, tally = found(tmp_path)
    assert [text.text for text in taken] == TEXTS
    assert [text.offset for text in taken] == list(range(20))
    assert tally.lines() == []


def test_a_large_file_is_read_in_parts(tmp_path: Path) -> None:
    # Records that end before, at and after the ends of blocks.
    expected = ["é" * (size * 7919 % (BLOCK_BYTES // 3)) + "!" for size in range(60)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in expected], ensure_ascii=False))
    assert texts(tmp_path) == expected


GOOD = '{"text": "good"}'


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"text": "a" "b": 1}', "not JSON"),
        ('{"text": "a}', "not JSON"),
        ('{"text": tru}', "not JSON"),
        ("{'text': 'a'}", "not JSON"),
        ('{"text": null}', "field 'text' is null"),
        ('{"text": 1}', "field 'text' is not text"),
        ('{"texts": "a"}', "no field 'text', or two"),
        ('{"text": "a", "text": "b"}', "no field 'text', or two"),
        ('"a"', "not a JSON object"),
        ("12", "not a JSON object"),
        ('{"text": "a\\ud800"}', "half of a surrogate pair"),
        ('{"text": "a\\u0000"}', "NUL"),
        ('{"text": "caf\xe9"}', "not UTF-8"),
        ('{"text": "a", "deep": ' + "[" * 100_000 + "1" + "]" * 100_000 + "}", "nested too deeply"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("separator", [",\n", "\n"], ids=["array", "lines"])
def test_only_the_bad_record_is_left_out_and_named_by_its_line(
    tmp_path: Path, record: str, reason: str, separator: str
) -> None:
    content = separator.join([GOOD, record, GOOD])
    content = f"[{content}]" if separator == ",\n" else content
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    texts, tally = found(tmp_path)
    assert [text.text for text in texts] == ["good", "good"]
    assert tally.bad == 1
    [told] = tally.lines()
    assert told.startswith(f"left out 1 record (a.json:2): {reason}")


@pytest.mark.parametrize(("end", "line"), [("", 2), (",", 2), ("\n  ", 3)])
def test_an_array_that_does_not_end_is_told(tmp_path: Path, end: str, line: int) -> None:
    (tmp_path / "a.json").write_text(f"[{GOOD},\n{GOOD}{end}")
    texts, lines = taken(tmp_path)
    assert texts == ["good", "good"]
    assert lines == [f"left out 1 stream (a.json:{line}): an array that does not end; the file is truncated"]


def test_a_record_that_is_too_long_is_left_out_without_being_loaded(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.write(f'[{GOOD}, {{"text": "'.encode())
        for _ in range(24):
            file.write(b"x" * 2**20)
        file.write(f'"}},{GOOD}]'.encode())
    tracemalloc.start()
    try:
        result = taken(tmp_path, limit=2**20)
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()
    assert result == (
        ["good", "good"],
        ["left out 1 record (a.json:1): longer than a record may be (64 MiB); cut them into several"],
    )


@settings(deadline=None)
@given(st.data())
def test_a_cut_file_gives_the_records_before_the_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    parts = [json.dumps(record) for record in RECORDS]
    content = f"[{', '.join(parts)}]"
    cut = data.draw(st.integers(1, len(content) - 1))
    path = tmp_path_factory.mktemp("cut") / "a.json"
    path.write_text(content[:cut])
    taken, tally = found(path)
    whole = sum(content.index(part) + len(part) <= cut for part in parts)
    assert [text.text for text in taken] == TEXTS[:whole]
    assert tally.bad == 1
