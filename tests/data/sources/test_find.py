from __future__ import annotations

import gzip
import os
import re
import socket
import sysconfig
from pathlib import Path

import pytest

from llama_ray.data.preparing.splits import number_of
from llama_ray.data.records.fields import TextFields
from llama_ray.data.records.pieces import read
from llama_ray.data.sources.files import SourceError
from llama_ray.data.sources.left_out import Tally
from llama_ray.storage import store
from tests.data.helpers import find_corpus, folder_without_root, taken, texts
from tests.object_store import s3_server, uri


def test_a_folder_gives_its_text_files_in_order_without_hidden_and_binary_ones(folder: Path) -> None:
    corpus = find_corpus(str(folder))
    assert [document.file.name for document in corpus.documents] == [
        "a.md",
        "b.txt",
        "sub/README",
        "sub/c.py",
    ]
    assert texts(folder) == ["é", "bee", "no suffix", "see()"]
    assert corpus.size == 2 + 3 + 9 + 5


def test_a_glob_gives_the_matching_text_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts(folder / "*.txt") == ["bee"]
    assert texts(folder / "**" / "*") == ["é", "bee", "no suffix", "see()"]
    monkeypatch.chdir(folder)
    assert texts("sub/*.py") == ["see()"]


def test_a_uri_gives_the_same_as_the_folder(folder: Path) -> None:
    assert texts(folder.as_uri()) == texts(folder)
    assert texts((folder / "b.txt").as_uri()) == ["bee"]
    names = [document.id for document in find_corpus(folder.as_uri()).documents]
    assert names == [document.id for document in find_corpus(str(folder)).documents]


def test_builtin_is_the_source_code_of_the_standard_library() -> None:
    corpus = find_corpus("builtin")
    names = [document.file.name for document in corpus.documents]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "dist-packages" in name]
    [document] = [document for document in corpus.documents if document.file.name == "os.py"]
    assert [text.text for text in read(document, TextFields(), Tally().add)] == [
        Path(sysconfig.get_path("stdlib"), "os.py").read_text(encoding="utf-8")
    ]


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", tmp_path / "*.txt", tmp_path / "empty", (tmp_path / "no").as_uri()):
        with pytest.raises(SourceError, match=r"no text found in .*; give 'builtin', a file"):
            find_corpus(str(source))
    with pytest.raises(SourceError, match="cannot read source 'gopher://a/b'"):
        find_corpus("gopher://a/b")


def reasons(source: Path | str) -> list[str]:
    """What is left out and why, without the way out."""
    return sorted(line.partition(";")[0] for line in taken(source)[1])


def test_all_that_is_not_taken_from_a_folder_is_named(folder: Path) -> None:
    (folder / "old.zip").write_bytes(b"PK")
    (folder / "old.tar.Xz").write_bytes(b"\xfd7z")
    (folder / "a link.txt").symlink_to(folder / "nowhere.txt")
    (folder / "another").symlink_to("nowhere")
    (folder / "round.md").symlink_to("round.md")
    os.mkfifo(folder / "fifo.txt")
    expected = [
        "left out 1 file (.hidden.txt): hidden, with a name that begins with a dot",
        "left out 1 file (empty.txt): empty",
        "left out 1 file (fifo.txt): a FIFO, socket or device",
        "left out 1 file (round.md): they cannot be read (Too many levels of symbolic links)",
        "left out 1 file (sub/latin.dat): not UTF-8",
        "left out 1 file (sub/photo.png): NUL characters in them, as in binary files and UTF-16",
        "left out 1 folder (sub/.git): hidden, with a name that begins with a dot",
        "left out 2 files (a link.txt, another): links that lead nowhere",
        "left out 2 files (old.tar.Xz, old.zip): archives, or compressed in a way that is not read",
    ]
    assert reasons(folder) == expected
    # One rule for all ways in.
    assert reasons(folder.as_uri()) == expected
    assert reasons(folder / "**" / "*") == expected
    assert reasons(folder / "*.txt") == [
        "left out 1 file (.hidden.txt): hidden, with a name that begins with a dot",
        "left out 1 file (a link.txt): links that lead nowhere",
        "left out 1 file (empty.txt): empty",
        "left out 1 file (fifo.txt): a FIFO, socket or device",
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fifo.txt", "a FIFO, socket or device; only files are read"),
        ("socket", "a FIFO, socket or device; only files are read"),
        ("link.txt", "links that lead nowhere"),
        ("x.tar.GZ", "archives, or compressed in a way that is not read; unpack them first"),
        ("empty.txt", "empty"),
    ],
)
def test_a_file_that_is_named_itself_is_refused_with_the_reason(
    folder: Path, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    os.mkfifo("fifo.txt")
    (folder / "link.txt").symlink_to("nowhere")
    (folder / "x.tar.GZ").write_bytes(b"\x1f\x8b")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket")
        for source in (name, str(folder / name), (folder / name).as_uri()):
            with pytest.raises(
                SourceError, match=re.escape(f"(left out 1 file ({name}): {reason}); give 'builtin'")
            ):
                find_corpus(source)


@pytest.mark.parametrize("name", ["DATA.JSONL", "data.JsonL", "data.ndjson"])
def test_the_suffix_of_json_lines_counts_in_any_case(folder: Path, name: str) -> None:
    (folder / name).write_text('{"text": "one"}\n{"text": "two"}')
    for source in (folder / name, (folder / name).as_uri(), folder / f"{name[:4]}*"):
        assert texts(source) == ["one", "two"]
    assert "one" in texts(folder)


def test_files_and_folders_without_access_are_named() -> None:
    with folder_without_root() as folder:
        (folder / "good.txt").write_text("good")
        for name in ("secret.txt", "secret"):
            (folder / name).write_text("secret")
            (folder / name).chmod(0)
        (folder / "closed").mkdir(mode=0)
        denied = "they cannot be read (Permission denied)"
        expected = [
            f"left out 1 folder (closed): {denied}",
            f"left out 2 files (secret, secret.txt): {denied}",
        ]
        for source in (folder, folder.as_uri(), folder / "**"):
            assert taken(source)[0] == ["good"]
            assert reasons(source) == expected
        with pytest.raises(SourceError, match=r"left out 1 file \(secret.txt\): they cannot be read"):
            find_corpus(str(folder / "secret.txt"))
        with pytest.raises(SourceError, match=r"cannot read source .*closed'.*Permission denied"):
            find_corpus(str(folder / "closed"))


def test_links_to_folders_are_followed_but_no_folder_is_taken_twice(tmp_path: Path) -> None:
    for name in ("source/a/deep", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.txt").write_text(name)
    source = tmp_path / "source"
    for name, target in {
        "a/up": "..",
        "b": "a",
        "above": "../..",
        "elsewhere": "../elsewhere",
        "elsewhere too": "../elsewhere/deep",
    }.items():
        (source / name).symlink_to(Path(target))
    (source / "above").unlink()
    (source / "above").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(source)
    for way_in in (source, source.as_uri(), source / "**" / "*"):
        assert sorted(texts(way_in)) == ["elsewhere/deep", "source/a/deep"]
        assert reasons(way_in) == [
            "left out 5 folders (a/up, above, b, ...): links to a folder that is taken already"
        ]


def test_a_glob_descends_only_where_it_can_match(folder: Path) -> None:
    assert reasons(folder / "*") == [
        "left out 1 file (.hidden.txt): hidden, with a name that begins with a dot",
        "left out 1 file (empty.txt): empty",
        "left out 1 folder (sub): matched by the glob, which takes files",
    ]
    assert texts(folder / "s?b" / "*.py") == ["see()"]
    assert texts(folder / "**" / "sub" / "**") == ["no suffix", "see()"]
    assert texts(folder / ".hid*") == ["hidden"]
    assert reasons(folder / "[ab]*") == []


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"two\nlines.txt", b"caf\xe9.jsonl"])
def test_a_file_may_have_any_name(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_text('{"text": "one"}')
    corpus = find_corpus(str(tmp_path))
    assert len(corpus.documents) == 1
    assert 0 <= number_of(0, corpus.documents[0].id) < 1
    assert len(texts(tmp_path)) == 1
    path.write_bytes(b"\xff")
    [line] = taken(tmp_path)[1]
    assert line.isprintable()
    assert name.decode("latin-1")[:3] in line
    path.unlink()
    with pytest.raises(SourceError) as raised:
        list(read(corpus.documents[0], TextFields(), Tally().add))
    assert str(raised.value).isprintable()


def test_secrets_of_a_source_are_not_shown() -> None:
    with pytest.raises(SourceError) as raised:
        find_corpus("gopher://user:hunter2@host/corpus")
    assert "hunter2" not in str(raised.value)


def test_a_bucket_follows_the_same_rules_as_a_folder() -> None:
    objects = {
        "DATA.JSONL": b'{"text": "one"}\n{"text": "\xe9"}',
        "a.txt": b"two",
        "more/README": b"three",
        "b.jsonl.GZ": gzip.compress(b'{"text": "zipped"}'),
        "c.tar": b"ustar",
        "empty.txt": b"",
        "more/photo": b"\x89PNG\0",
        ".hidden": b"hidden",
    }
    with s3_server() as port:
        for name, content in objects.items():
            with store.replacing(uri(port, f"corpus/{name}")) as stream:
                stream.write(content)
        assert texts(uri(port, "corpus")) == ["one", "two", "zipped", "three"]
        assert texts(uri(port, "corpus/[ab]*.*")) == ["two", "zipped"]
        assert reasons(uri(port, "corpus")) == [
            "left out 1 file (.hidden): hidden, with a name that begins with a dot",
            "left out 1 file (c.tar): archives, or compressed in a way that is not read",
            "left out 1 file (empty.txt): empty",
            "left out 1 file (more/photo): NUL characters in them, as in binary files and UTF-16",
            "left out 1 record (DATA.JSONL:2): not UTF-8",
        ]
        [document] = find_corpus(uri(port, "corpus/a.txt")).documents
        with store.replacing(uri(port, "corpus/a.txt")) as stream:
            stream.write(b"longer")
        with pytest.raises(SourceError, match=r"corpus/a\.txt changed while it was read"):
            list(read(document, TextFields(), Tally().add))
