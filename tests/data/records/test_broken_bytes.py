"""Bytes that are broken anywhere cost the records that they are in, and are told."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
from collections.abc import Callable
from contextlib import nullcontext, suppress

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llama_ray.data.sources.files import SourceError
from tests.data.records.helpers import found

TEXTS = [f'text {number} é "quoted" {{and}}, \\ more\n' * (1 + number % 3) for number in range(60)]


def json_lines() -> bytes:
    return b"".join(json.dumps({"id": 3, "text": text}).encode() + b"\n" for text in TEXTS)


def comma_separated() -> bytes:
    content = io.StringIO()
    writer = csv.writer(content)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(TEXTS))
    return content.getvalue().encode()


def parquet_table(compression: str) -> bytes:
    content = io.BytesIO()
    table = pa.table({"id": range(60), "text": TEXTS, "deep": [{"a": text} for text in TEXTS]})
    parquet.write_table(table, content, row_group_size=17, compression=compression)
    return content.getvalue()


def arrow_stream(compression: str | None) -> bytes:
    content = io.BytesIO()
    table = pa.table({"id": range(60), "text": TEXTS})
    with pa.ipc.new_stream(
        content, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
    ) as writer:
        writer.write_table(table, max_chunksize=17)
    return content.getvalue()


CONTENTS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": json_lines,
    "a.jsonl.gz": lambda: gzip.compress(json_lines()),
    "a.jsonl.zst": lambda: zstandard.compress(json_lines()),
    "a.txt.bz2": lambda: bz2.compress("".join(TEXTS).encode()),
    "a.json.xz": lambda: lzma.compress(json.dumps([{"text": text} for text in TEXTS]).encode()),
    "a.json": lambda: json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "a.csv": comma_separated,
    "a.txt": lambda: "".join(TEXTS).encode(),
    "snappy.parquet": functools.partial(parquet_table, "snappy"),
    "plain.parquet": functools.partial(parquet_table, "none"),
    "a.arrow": functools.partial(arrow_stream, None),
    "zstd.arrow": functools.partial(arrow_stream, "zstd"),
}


@pytest.mark.parametrize("name", CONTENTS)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_broken_bytes_raise_nothing(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    content = bytearray(CONTENTS[name]())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    path = tmp_path_factory.mktemp("broken") / name
    path.write_bytes(content or b"x")
    # The names of the columns may be what is broken.
    with suppress(SourceError) if name.endswith((".csv", ".parquet", ".arrow")) else nullcontext():
        found(path)


@settings(deadline=None)
@given(st.data())
def test_other_lines_come_out_unchanged(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lines = json_lines().splitlines()
    broken = data.draw(st.dictionaries(st.integers(0, 59), st.binary(max_size=40), max_size=5))
    for number, content in broken.items():
        start = data.draw(st.integers(0, len(lines[number])))
        lines[number] = lines[number][:start] + content.replace(b"\n", b"\xff") + lines[number][start + 3 :]
    path = tmp_path_factory.mktemp("broken") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    texts, tally = found(path)
    starts = [sum(len(line) + 1 for line in lines[:number]) for number in range(60)]
    by_offset = {text.offset: text.text for text in texts}
    assert all(by_offset[starts[number]] == TEXTS[number] for number in range(60) if number not in broken)
    # Each of the others is a text, or told.
    told = sum(start not in by_offset for start in starts)
    assert tally.bad + sum(": empty" in line for line in tally.lines()) >= (told > 0)
    assert tally.bad <= told
