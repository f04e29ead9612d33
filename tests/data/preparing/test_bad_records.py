from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.data.preparing.bad_records import BadRecords, TooManyBadRecordsError, too_many
from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import read
from llama_ray.data.sources.files import BUILTIN
from llama_ray.data.sources.left_out import NOT_UTF8, LeftOut
from tests.data.helpers import find_corpus


def test_thousands_of_bad_lines_are_listed_with_one_look_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join("bad\n" if number % 3 else json.dumps({"text": "x"}) + "\n" for number in range(30_000))
    )
    with BadRecords(tmp_path / "bad.jsonl", most=20_000) as bad:
        for piece in find_corpus(str(path)).documents:
            for _ in read(piece, TextFields(), lambda left_out: bad.add("web", left_out)):
                pass
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [bad["record"] for bad in listed] == [
        f"a.jsonl:{number + 1}" for number in range(30_000) if number % 3
    ]
    assert listed[0] == {"source": "web", "record": "a.jsonl:2", "reason": "not JSON"}


def test_the_first_record_too_many_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("bad\n" * 9)
    [piece] = find_corpus(str(path)).documents
    with BadRecords(tmp_path / "bad.jsonl", most=3) as bad, pytest.raises(TooManyBadRecordsError):
        list(read(piece, TextFields(), lambda left_out: bad.add("web", left_out)))
    assert bad.count == 4
    error = too_many(bad.count, 3, [tmp_path / "bad.jsonl"], tmp_path / "data")
    assert str(error).startswith(
        "4 bad records so far (a.jsonl:1: not JSON; a.jsonl:2: not JSON; a.jsonl:3: not JSON; ...)"
    )
    assert len((tmp_path / "data.bad_records.jsonl").read_text().splitlines()) == 4


def test_the_damaged_files_of_the_standard_library_are_not_the_users(tmp_path: Path) -> None:
    with BadRecords(tmp_path / "bad.jsonl", most=0) as bad:
        bad.add("builtin", LeftOut("document", NOT_UTF8, "test/bad.py", BUILTIN, "test/bad.py", 7))
        bad.add("web", LeftOut("file", NOT_UTF8, "photo.png"))
    assert bad.count == 0
    assert not (tmp_path / "bad.jsonl").exists()
