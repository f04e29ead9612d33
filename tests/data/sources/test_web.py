from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import PIECE_BYTES, read, split_file, split_files
from llama_ray.data.sources import http_file
from llama_ray.data.sources.files import SourceError
from llama_ray.data.sources.left_out import Tally
from llama_ray.data.sources.remote import http_file as http_file_of
from tests.data.records.helpers import found, pieces, taken, texts
from tests.data.sources.web_server import Web, hub_contents, web_server

LINES = b"".join(b'{"text": "line %d%s"}\n' % (number, b" and more" * 60) for number in range(10_000))


def table(*texts: str) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pa.table({"text": list(texts)}), stream)
    return stream.getvalue()


@pytest.fixture
def web() -> Iterator[Web]:
    contents = {
        "/a/lines.jsonl": LINES,
        "/a/some words.txt": b"some words",
        "/lines.jsonl.gz": gzip.compress(LINES[: LINES.index(b"\n", 90_000)], 1),
        "/table.parquet": table("one", "two"),
        "/empty.txt": b"",
    }
    with web_server(contents) as server:
        yield server


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("says_length", [True, False])
def test_a_file_of_the_web_is_read_from_any_server(
    web: Web, tmp_path: Path, ranges: bool, says_length: bool
) -> None:
    web.ranges, web.says_length = ranges, says_length
    (tmp_path / "lines.jsonl").write_bytes(LINES)
    expected = [text.text for text in found(tmp_path)[0]]
    assert [text.text for text in found(web.url("/a/lines.jsonl?token=1"))[0]] == expected
    assert len(pieces(web.url("/a/lines.jsonl"))) == (len(LINES) // PIECE_BYTES + 1 if ranges else 1)
    assert texts(web.url("/a/some%20words.txt")) == ["some words"]
    assert texts(web.url("/lines.jsonl.gz"))[:3] == expected[:3]
    assert texts(web.url("/table.parquet")) == ["one", "two"]


def test_a_file_is_not_named_after_the_password_of_its_server(web: Web) -> None:
    web.contents["/"] = b"some words"
    assert http_file_of(web.url("/").replace("://", "://user:secret@")).name == "127.0.0.1"


def test_many_files_are_looked_at_at_once_and_stay_in_order(web: Web) -> None:
    for number in range(10):
        web.contents[f"/{number}.parquet"] = table(f"text {number}")
    files = [http_file_of(web.url(f"/{number}.parquet")) for number in range(10)]
    pieces = list(split_files(files, TextFields()))
    assert [piece.file for piece in pieces] == files
    assert pieces == [piece for file in files for piece in split_file(file, TextFields())]
    with pytest.raises(SourceError, match=r"parquet has no column 'body'; its columns are 'text'"):
        list(split_files(files, TextFields("body")))


def test_a_broken_connection_is_made_again_where_it_broke(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_file, "PAUSE_S", 0)
    found = pieces(web.url("/a/lines.jsonl"))
    web.cuts = web.failures = 2
    assert sum(1 for piece in found for _ in read(piece, TextFields(), Tally().add)) == 10_000
    assert web.cuts == web.failures == 0


def test_a_connection_that_breaks_again_and_again_is_an_error_that_names_the_file(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_file, "PAUSE_S", 0)
    [piece, *_] = pieces(web.url("/a/lines.jsonl"))
    web.failures = 10**6
    with pytest.raises(SourceError, match=r"cannot read http://127.*lines\.jsonl \(the server says 503"):
        list(read(piece, TextFields(), Tally().add))
    web.failures, web.ranges = 0, False
    [piece, *_] = pieces(web.url("/table.parquet"))
    web.cuts = 10**6
    with pytest.raises(SourceError, match=r"cannot read http://127.*table\.parquet \(.*ended too early\)"):
        list(read(piece, TextFields(), Tally().add))


def test_what_is_not_there_is_refused_at_once(web: Web) -> None:
    with pytest.raises(SourceError, match=r"cannot read source 'http.*nope' \(the server says 404"):
        taken(web.url("/nope"))
    assert taken(web.url("/empty.txt"))[0] == []


def test_a_password_is_sent_and_never_shown(web: Web) -> None:
    address = f"http://user:hunter2@127.0.0.1:{web.port}"
    assert texts(f"{address}/a/some%20words.txt") == ["some words"]
    assert set(web.users) == {"user:hunter2"}
    with pytest.raises(SourceError) as raised:
        taken(f"{address}/nope")
    assert "hunter2" not in str(raised.value)


def test_a_file_that_changes_on_its_server_is_named(web: Web) -> None:
    [piece, *_] = pieces(web.url("/a/some%20words.txt"))
    web.contents["/a/some words.txt"] = b"other words, and more"
    with pytest.raises(SourceError, match=r"some%20words\.txt changed while it was read; start again"):
        list(read(piece, TextFields(), Tally().add))


CARD = """---
license: mit
configs:
- config_name: small
  data_files:
  - {split: train, path: "small/train-*"}
  - {split: test, path: "small/test-*"}
- config_name: big
  data_files: "big/**"
---
# The card of a data set
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    files = {
        "README.md": CARD.encode(),
        ".gitattributes": b"*.parquet filter=lfs",
        "small/train-0.parquet": table("one", "two"),
        "small/train-1.parquet": table("three"),
        "small/test-0.parquet": table("never trained on"),
        "big/a/0.jsonl": b'{"text": "big"}\n',
        "big/notes.txt": b"how it was made",
    }
    with web_server(hub_contents(files)) as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", server.url(""))
        yield server


@pytest.mark.parametrize(
    ("address", "expected", "left_out"),
    [
        (
            "owner/name/small",
            ["one", "two", "three"],
            ["(small/test-0.parquet): of another split than train"],
        ),
        ("datasets/owner/name/big@v1", ["big"], ["(big/notes.txt): notes about a data set"]),
        ("owner/name@v1/small/test-0.parquet", ["never trained on"], []),
        ("owner/name/*/train-?.parquet", ["one", "two", "three"], []),
    ],
)
def test_a_data_set_of_the_hub_is_read_as_its_card_says(
    hub: Web, address: str, expected: list[str], left_out: list[str]
) -> None:
    texts, lines = taken(f"hf://{address}")
    assert texts == expected
    assert len(lines) == len(left_out)
    assert all(part in line for part, line in zip(left_out, lines, strict=True))


def test_a_data_set_without_a_declared_configuration_is_taken_as_a_whole(hub: Web) -> None:
    files = {
        "README.md": b"# no front matter",
        "data/train.csv": b"text\none\n",
        "data/test.csv": b"text\ntwo\n",
    }
    hub.contents = hub_contents(files)
    texts, lines = taken("hf://owner/name")
    assert texts == ["one"]
    assert lines == [
        "left out 1 file (README.md): notes about a data set, not its records",
        "left out 1 file (data/test.csv): of another split than train; give their own folder or file to take them",
    ]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "owner/name",
            r"has several configurations \(small, big\); give one of them, as in hf://owner/name/small",
        ),
        (
            "owner/name/huge",
            "no configuration or file 'huge'; give one of small, big, or a folder, a file or a glob",
        ),
        ("owner/nope", r"cannot read source 'hf://owner/nope' \(.*404"),
    ],
)
def test_a_wrong_address_on_the_hub_is_refused_with_the_way_out(hub: Web, address: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        taken(f"hf://{address}")


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        SourceError, match=r"cannot read source 'hf://owner/name' \(the hub cannot be reached"
    ):
        taken("hf://owner/name")


def test_the_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        SourceError, match=r"^hf:// needs the package huggingface_hub; install it \(pip install"
    ):
        taken("hf://owner/name")
