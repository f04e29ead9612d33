from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.records.fields import TextFields
from llama_ray.data.sources.files import SourceError
from tests.data.records.helpers import found, pieces, taken, texts

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.text(CHARACTERS), st.text(CHARACTERS, min_size=1))), st.sampled_from([",", "\t"])
)
def test_what_the_csv_module_wrote_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str
) -> None:
    content = io.StringIO()
    writer = csv.writer(content, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows(rows)
    folder = tmp_path_factory.mktemp("rows")
    (folder / ("a.csv" if delimiter == "," else "a.tsv")).write_bytes(content.getvalue().encode())
    taken, tally = found(folder)
    assert [text.text for text in taken] == [text for _, text in rows]
    assert [text.offset for text in taken] == list(range(len(rows)))
    assert tally.bad == 0


def test_columns_are_named_by_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('\ufefftitle,a.b,n\r\nT,B,1\r\n\r\n"T\n2","B""2""",2\r\n'.encode())
    assert texts(tmp_path, TextFields("title")) == ["T", "T\n2"]
    assert texts(tmp_path, TextFields("a.b")) == ["B", 'B"2"']
    assert texts(tmp_path, TextFields(template="{title}: {a.b}")) == ["T: B", 'T\n2: B"2"']


@pytest.mark.parametrize("compressed", [False, True])
def test_a_column_that_is_not_there_is_refused_before_any_work(tmp_path: Path, compressed: bool) -> None:
    content = b"id,title,title\n1,a,b\n"
    (tmp_path / ("a.csv.gz" if compressed else "a.csv")).write_bytes(
        gzip.compress(content) if compressed else content
    )
    with pytest.raises(
        SourceError,
        match=r"a\.csv.* has no column 'text'; its columns are 'id', 'title', 'title'; name one",
    ):
        pieces(tmp_path)
    with pytest.raises(SourceError, match="has two columns 'title'"):
        pieces(tmp_path, TextFields("title"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"2", "not as many fields as the first line has"),
        (b"2,a,b", "not as many fields as the first line has"),
        (b'2,"a"b', "not CSV (',' expected after '\"')"),
        (b"2,caf\xe9", "not UTF-8"),
        (b"2,a\0", "NUL characters"),
        (b"2," + b"x" * 5000, "longer than a record may be"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_only_the_bad_row_is_left_out_and_named_by_its_line(tmp_path: Path, row: bytes, reason: str) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,"good\nand more"\n' + row + b"\n3,good\n")
    texts, tally = found(tmp_path, limit=1000)
    assert [text.text for text in texts] == ["good\nand more", "good"]
    assert tally.bad == 1
    [told] = tally.lines()
    assert told.startswith(f"left out 1 record (a.csv:4): {reason}")


def test_a_quotation_mark_that_is_never_closed_makes_no_text_of_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,good\n2,"open\n3,good\n')
    texts, lines = taken(tmp_path)
    assert texts == ["good"]
    assert lines == ["left out 1 record (a.csv:3): not CSV (unexpected end of data)"]


def test_an_empty_field_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,\n2,good\n")
    texts, tally = found(tmp_path)
    assert ([text.text for text in texts], tally.bad) == (["good"], 0)
    assert tally.lines() == ["left out 1 record (a.csv:2): empty"]
    (tmp_path / "a.csv").write_text("id,text\n")
    assert taken(tmp_path) == ([], ["left out 1 file (a.csv): without a record"])
