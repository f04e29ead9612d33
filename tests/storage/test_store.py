"""Files at local locations; `test_object_store` has those in object stores."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.storage import store

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@pytest.mark.parametrize(
    ("location", "joined"),
    [
        ("/runs", "/runs/first"),
        ("s3://bucket", "s3://bucket/first"),
        ("s3://bucket/runs/", "s3://bucket/runs/first"),
        ("s3://bucket/runs?scheme=http&region=x", "s3://bucket/runs/first?scheme=http&region=x"),
    ],
)
def test_join_appends_a_name_before_the_options_of_a_uri(location: str, joined: str) -> None:
    assert store.join(location, "first") == joined


@pytest.mark.parametrize("location", ["/runs", "s3://bucket/runs?region=x"])
@given(names=st.lists(NAMES, min_size=1))
def test_name_of_gives_the_name_that_was_joined_last(location: str, names: list[str]) -> None:
    for name in names:
        location = store.join(location, name)
    assert store.name_of(location) == names[-1]


@settings(deadline=None, max_examples=30)
@given(content=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    file = f"{tmp_path_factory.getbasetemp()}/new/directory/file"
    store.write_text(file, content)
    assert store.read_text(file) == content


def test_a_file_may_be_named_like_a_compressed_one(tmp_path: Path) -> None:
    store.write_text(f"{tmp_path}/rows.gz", "plain")
    assert (tmp_path / "rows.gz").read_text() == "plain"


def test_what_does_not_exist_is_empty_and_may_be_deleted(tmp_path: Path) -> None:
    nowhere = f"{tmp_path}/nowhere"
    store.delete(nowhere)
    assert store.read_text(nowhere) is None
    assert store.list_files(nowhere) == []
    assert store.list_directories(nowhere) == []


def test_a_deleted_file_is_gone(tmp_path: Path) -> None:
    file = f"{tmp_path}/file"
    store.write_text(file, "x")
    store.delete(file)
    assert store.read_text(file) is None


def test_files_and_directories_are_listed_sorted_and_apart(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        store.make_directory(f"{tmp_path}/{name}-directory/below")
        store.write_text(f"{tmp_path}/{name}-file", "")
    assert store.list_files(str(tmp_path)) == ["a-file", "b-file", "c-file"]
    assert store.list_directories(str(tmp_path)) == ["a-directory", "b-directory", "c-directory"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    file = f"{tmp_path}/file"
    store.write_text(file, "old")

    def fail() -> None:
        with store.replacing(file) as stream:
            stream.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert store.read_text(file) == "old"
    assert store.list_files(str(tmp_path)) == ["file"]


@pytest.mark.parametrize("size", [0, 1, 2**22, 2**22 + 1])
def test_upload_and_download_keep_the_content(tmp_path: Path, size: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    store.make_directory(f"{tmp_path}/there")
    store.upload(source, f"{tmp_path}/there/file")
    (tmp_path / "back").mkdir()
    store.download(f"{tmp_path}/there", tmp_path / "back")
    assert (tmp_path / "back" / "file").read_bytes() == source.read_bytes()
    assert store.sha256(f"{tmp_path}/there/file") == hashlib.sha256(source.read_bytes()).hexdigest()


def test_a_path_is_local_and_a_relative_one_is_refused(tmp_path: Path) -> None:
    assert store.is_local(str(tmp_path))
    with pytest.raises(ValueError, match="relative"):
        store.open_storage("relative/path")


def test_a_name_beside_a_location_comes_before_its_options() -> None:
    assert store.beside("/runs/what?.jsonl", ".job.json") == "/runs/what?.jsonl.job.json"
    assert store.beside("s3://b/out.jsonl?region=x", ".parts/a") == "s3://b/out.jsonl.parts/a?region=x"


@pytest.mark.parametrize("folder", ["run#3", "what?", "a%20b", "a b", "Übung", "a;b&c=d", "file:x", "x@y:z"])
def test_a_folder_may_have_any_name_as_a_path_and_quoted_as_a_uri(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    file = tmp_path / folder / "name"
    for location, content in ((str(tmp_path), "path"), (tmp_path.as_uri(), "uri")):
        store.write_text(store.join(store.join(location, folder), "name"), content)
        assert file.read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    assert store.list_directories(tmp_path.as_uri()) == [folder]


def test_a_uri_that_an_unquoted_character_would_cut_is_refused() -> None:
    with pytest.raises(
        store.StorageError, match=r"s3://\*\*\*@bucket/run#3 is a URI with '#'; write it as %23"
    ):
        store.open_storage("s3://key:secret@bucket/run#3")
