from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import pytest

from llama_ray.data.sources import DOCUMENT_BYTES, NotUTF8Error, SourceError, find, read, sample


def texts(source: Path | str) -> list[str]:
    return [text for document in find(str(source)).documents for text in read(document)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name, content in {
        "b.txt": b"bee",
        "a.md": "é".encode(),
        "sub/c.py": b"see()",
        "sub/README": b"no suffix",
        "sub/photo.png": b"\x89PNG\0\0",
        "sub/latin.dat": b"caf\xe9 ole",
        "sub/.git/config": b"hidden",
        ".hidden.txt": b"hidden",
        "empty.txt": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_folder_gives_its_text_files_in_order_without_hidden_and_binary_ones(folder: Path) -> None:
    corpus = find(str(folder))
    assert [document.name for document in corpus.documents] == ["a.md", "b.txt", "sub/README", "sub/c.py"]
    assert texts(folder) == ["é", "bee", "no suffix", "see()"]
    assert corpus.size == 2 + 3 + 9 + 5


def test_glob(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts(folder / "*.txt") == ["bee"]
    assert texts(folder / "**" / "*") == ["é", "bee", "no suffix", "see()"]
    monkeypatch.chdir(folder)
    assert texts("sub/*.py") == ["see()"]


def test_uri_gives_the_same_as_the_folder(folder: Path) -> None:
    assert texts(folder.as_uri()) == texts(folder)
    assert texts((folder / "b.txt").as_uri()) == ["bee"]
    names = [document.id for document in find(folder.as_uri()).documents]
    assert names == [document.id for document in find(str(folder)).documents]


def test_a_folder_that_moved_keeps_its_document_ids(folder: Path) -> None:
    before = find(str(folder)).documents
    moved = folder.rename(folder.with_name("moved"))
    after = find(str(moved)).documents
    assert [document.id for document in before] == [document.id for document in after]
    assert [document.draw(3) for document in before] == [document.draw(3) for document in after]


def test_builtin_is_the_standard_library() -> None:
    corpus = find("builtin")
    names = [document.name for document in corpus.documents]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "dist-packages" in name]
    [document] = [document for document in corpus.documents if document.name == "os.py"]
    assert list(read(document)) == [Path(sysconfig.get_path("stdlib"), "os.py").read_text(encoding="utf-8")]


def test_jsonl_has_one_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"text": "one\ntwo"}, {"text": ""}, {"text": "é🎉", "id": 3}, {"text": "last"}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert texts(path) == ["one\ntwo", "é🎉", "last"]
    assert len(find(str(path)).documents) >= 2  # so that even a small file can be split by document


def test_large_jsonl_is_cut_between_lines_into_few_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [f"{n} " + "x" * (n * 37 % 900) for n in range(5000)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    assert texts(path) == lines
    assert 500 < len(find(str(path)).documents) <= 1001


def test_half_a_surrogate_pair_in_json_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83cb \\ud83c\\udf89"}')
    assert texts(tmp_path / "a.jsonl") == ["a\ufffdb 🎉"]


@pytest.mark.parametrize("line", ["{", '"text"', "[1]", '{"content": "a"}', '{"text": 3}', '{"text": null}'])
def test_bad_jsonl_lines_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(SourceError, match=r'a.jsonl: a line behind byte 0 is not \{"text": "..."\}'):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("line", "end"),
    [
        ("é" * 50 + "\n\n", "\n\n"),
        ("é" * 50 + "\r\n\r\n", "\n\r\n"),
        ("é" * 50 + "\n", "\n"),
        ("é日🎉" * 3, ""),
    ],
    ids=["blank lines", "crlf", "lines", "no lines"],
)
def test_long_file_is_cut_at_the_best_place(tmp_path: Path, line: str, end: str) -> None:
    path = tmp_path / "a.txt"
    content = line * (3 * DOCUMENT_BYTES // len(line.encode()))
    path.write_bytes(content.encode())
    parts = texts(path)
    assert "".join(parts) == content
    assert 3 <= len(parts) <= 5
    assert all(len(part.encode()) <= DOCUMENT_BYTES and part.endswith(end) for part in parts)


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path / "a.txt") == ["hello"]


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 ole")
    with pytest.raises(NotUTF8Error, match=r"a.txt is not UTF-8 at byte 3: convert it"):
        texts(tmp_path / "a.txt")


def test_nothing_found_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", tmp_path / "*.txt", tmp_path / "empty", (tmp_path / "no").as_uri()):
        with pytest.raises(SourceError, match=r"no text found in .*: give 'builtin', a text or .jsonl file"):
            find(str(source))
    with pytest.raises(SourceError, match="cannot read source 'gopher://a/b'"):
        find("gopher://a/b")


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    [document] = find(str(tmp_path)).documents
    (tmp_path / "a.txt").write_text("he")
    with pytest.raises(SourceError, match="became shorter"):
        list(read(document))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(SourceError, match=r"cannot read .*a\.txt"):
        list(read(document))


def test_max_bytes_chooses_by_seed_and_not_by_name() -> None:
    everything = find("builtin").documents
    chosen = find("builtin", max_bytes=1_000_000, seed=1)
    assert 900_000 < chosen.size <= 1_000_000
    assert chosen.documents == find("builtin", max_bytes=1_000_000, seed=1).documents
    assert chosen.documents != find("builtin", max_bytes=1_000_000, seed=2).documents
    positions = [everything.index(document) for document in chosen.documents]
    assert positions == sorted(positions)
    assert positions[-1] > len(everything) * 0.8
    assert sample(everything, 10**12, 0) == everything
    with pytest.raises(SourceError, match="max_bytes is 1, less than any document"):
        find("builtin", max_bytes=1)


def test_fingerprint_follows_names_sizes_and_times(folder: Path) -> None:
    seen = {find(str(folder)).fingerprint}
    assert find(str(folder)).fingerprint in seen
    (folder / "b.txt").write_bytes(b"more")
    seen.add(find(str(folder)).fingerprint)
    os.utime(folder / "b.txt", (1, 1))
    seen.add(find(str(folder)).fingerprint)
    (folder / "b.txt").rename(folder / "c.txt")
    seen.add(find(str(folder)).fingerprint)
    assert len(seen) == 4
