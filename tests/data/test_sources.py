from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from llama_ray.data.corpus import find_corpus
from llama_ray.data.documents import read
from llama_ray.data.sources import SourceError
from tests.data.helpers import texts


def test_a_folder_gives_its_text_files_in_order_without_hidden_and_binary_ones(folder: Path) -> None:
    corpus = find_corpus(str(folder))
    assert [document.name for document in corpus.documents] == ["a.md", "b.txt", "sub/README", "sub/c.py"]
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
    names = [document.name for document in corpus.documents]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "dist-packages" in name]
    [document] = [document for document in corpus.documents if document.name == "os.py"]
    assert list(read(document)) == [Path(sysconfig.get_path("stdlib"), "os.py").read_text(encoding="utf-8")]


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", tmp_path / "*.txt", tmp_path / "empty", (tmp_path / "no").as_uri()):
        with pytest.raises(SourceError, match=r"no text found in .*; give 'builtin', a text or .jsonl file"):
            find_corpus(str(source))
    with pytest.raises(SourceError, match="cannot read source 'gopher://a/b'"):
        find_corpus("gopher://a/b")
