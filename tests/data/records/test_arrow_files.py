from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import read
from llama_ray.data.sources.files import SourceError
from llama_ray.data.sources.left_out import Tally
from tests.data.records.helpers import found, pieces, taken, texts

TEXTS = [f"text {number} é" for number in range(2500)]


def write_parquet(table: pa.Table, path: Path) -> None:
    parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=700)


def write_file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(path.with_suffix(".arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(path.with_suffix(".arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def write_feather(table: pa.Table, path: Path) -> None:
    feather.write_feather(table, path.with_suffix(".feather"), compression="zstd")


each = pytest.mark.parametrize("write", [write_parquet, write_file, write_stream, write_feather])
Write = Callable[[pa.Table, Path], None]


@each
@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_the_texts_of_a_table_are_its_rows(tmp_path: Path, write: Write, kind: pa.DataType) -> None:
    if write is write_parquet and kind == pa.string_view():
        kind = pa.large_string()
    write(pa.table({"id": range(2500), "text": pa.array(TEXTS).cast(kind)}), tmp_path / "a")
    taken, tally = found(tmp_path)
    assert [text.text for text in taken] == TEXTS
    assert [text.offset for text in taken] == list(range(2500))
    assert tally.lines() == []


@each
def test_fields_in_structures_are_found(tmp_path: Path, write: Write) -> None:
    rows = [
        {"a": {"b": "deep", "c": 3}, "a.c": "x"},
        {"a": None, "a.c": "x"},
        {"a": {"b": None, "c": 3}, "a.c": "y"},
    ]
    write(pa.Table.from_pylist(rows), tmp_path / "a")
    assert texts(tmp_path, TextFields("a.c")) == ["x", "x", "y"]
    found, lines = taken(tmp_path, TextFields(template="{a.b} {a.c}"))
    assert found == ["deep x"]
    assert len(lines) == 1
    assert lines[0].startswith("left out 2 records (a.")
    assert lines[0].endswith("row 3): field 'a.b' is null")


@each
def test_a_column_that_is_missing_or_no_text_is_refused_before_any_work(tmp_path: Path, write: Write) -> None:
    write(pa.table({"id": [1], "content": ["a"], "parts": [["a"]]}), tmp_path / "a")
    with pytest.raises(
        SourceError, match=r"has no column 'text'; its columns are 'id', 'content', 'parts'; name one"
    ):
        pieces(tmp_path)
    with pytest.raises(SourceError, match="has int64 in its column 'id', which must be text"):
        pieces(tmp_path, TextFields("id"))
    with pytest.raises(SourceError, match=r"has no column 'content\.a'"):
        pieces(tmp_path, TextFields("content.a"))
    with pytest.raises(SourceError, match=r"has list<.*> in its column 'parts'"):
        pieces(tmp_path, TextFields("parts"))


@each
def test_only_bad_rows_are_left_out_and_named(tmp_path: Path, write: Write) -> None:
    values = [b"good", b"caf\xe9", None, b"", b"a\0", b"x" * 99, b"last"]
    text = pa.array(values, pa.binary()).view(pa.string())
    write(pa.table({"text": text}), tmp_path / "a")
    [name] = [path.name for path in tmp_path.iterdir()]
    found_texts, tally = found(tmp_path, limit=50)
    assert [text.text for text in found_texts] == ["good", "last"]
    assert tally.bad == 4
    assert sorted(line.partition(";")[0] for line in tally.lines()) == [
        f"left out 1 record ({name} row 2): not UTF-8",
        f"left out 1 record ({name} row 3): field 'text' is null",
        f"left out 1 record ({name} row 4): empty",
        f"left out 1 record ({name} row 5): NUL characters in them, as in binary files and UTF-16",
        f"left out 1 record ({name} row 6): longer than a record may be (64 MiB)",
    ]


def test_a_large_parquet_file_is_cut_between_row_groups(tmp_path: Path) -> None:
    rows = [str(number) * 3000 for number in range(4000)]
    parquet.write_table(
        pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=300, compression="none"
    )
    found_pieces = pieces(tmp_path)
    assert len(found_pieces) > 3
    size = (tmp_path / "a.parquet").stat().st_size
    assert 0.9 * size < sum(piece.size for piece in found_pieces) <= size
    # Each piece knows the numbers of its rows.
    for piece in reversed(found_pieces):
        for text in read(piece, TextFields(), Tally().add):
            assert text.text == rows[text.offset]
    assert texts(tmp_path) == rows


def test_a_damaged_page_costs_the_rest_of_its_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": TEXTS})
    options = {"data_page_size": 1000, "write_batch_size": 50, "use_dictionary": False, "compression": "none"}
    parquet.write_table(table, path, row_group_size=1000, write_page_checksum=True, **options)
    content = bytearray(path.read_bytes())
    content[content.index(b"text 1507 ")] ^= 1
    path.write_bytes(content)
    found_texts, tally = found(path)
    numbers = [text.offset for text in found_texts]
    assert [text.text for text in found_texts] == [TEXTS[number] for number in numbers]
    # The rows of the pages before it are taken, and those of the other row groups.
    missing = sorted(set(range(2500)) - set(numbers))
    assert 1300 < missing[0] <= 1500
    assert missing == list(range(missing[0], 2000))
    [told] = tally.lines()
    assert told.startswith(
        f"left out 1 stream (a.parquet row {missing[0] + 1} to 2000): parquet data that are damaged"
    )
    assert tally.bad == 1


@pytest.mark.parametrize("write", [write_file, write_stream])
def test_of_an_arrow_file_that_is_cut_the_batches_before_the_cut_are_taken(
    tmp_path: Path, write: Write
) -> None:
    write(pa.table({"text": TEXTS}), tmp_path / "a")
    path = tmp_path / "a.arrow"
    content = path.read_bytes()
    for cut in range(len(content) - 1, 8, -len(content) // 50):
        path.write_bytes(content[:cut])
        found_texts, tally = found(path)
        assert [text.text for text in found_texts] == TEXTS[: len(found_texts)]
        assert len(found_texts) in (0, 700, 1400, 2100, 2500)
        assert tally.bad == 1
    path.write_bytes(content[: len(content) * 2 // 3])
    assert len(found(path)[0]) >= 700


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_what_is_no_table_at_all_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such thing, and some more of it")
    texts, tally = found(tmp_path)
    assert (texts, tally.bad) == ([], 1)
