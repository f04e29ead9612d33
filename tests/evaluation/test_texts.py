from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.evaluation.results import EvaluationError
from llama_ray.evaluation.texts import located, read_data, read_text
from tests.data.sources.web_server import web_server
from tests.small_models import small_tokenizer
from tests.token_data import TEXTS, write_dataset, write_documents


def ignore(line: str) -> None:
    pass


def test_documents_of_files_and_records_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("later")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")))
    corpus = read_text(str(tmp_path), None, ignore)
    assert corpus.documents == ("one", "two", "later")
    assert corpus.name == tmp_path.name
    limited = read_text(f"mine={tmp_path}/*", 2, ignore)
    assert (limited.name, limited.documents) == ("mine", ("one", "two"))
    assert limited.fingerprint != corpus.fingerprint
    (tmp_path / "c.txt").write_text("more")
    (tmp_path / "a.jsonl").rename(tmp_path / "0.jsonl")
    (tmp_path / "c.txt").unlink()
    assert read_text(str(tmp_path), None, ignore).fingerprint == corpus.fingerprint


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nnot json\n')
    told: list[str] = []
    assert read_text(str(tmp_path), None, told.append).documents == ("one",)
    assert len(told) == 1
    assert "not JSON" in told[0]


def test_documents_of_prepared_data_are_the_texts_of_the_validation_split(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")
    assert read_data(str(data), None).documents == tuple(TEXTS[50:])
    limited = read_data(f"mine={data}", 3)
    assert (limited.name, limited.documents) == ("mine", tuple(TEXTS[50:53]))


def test_conversations_are_no_text(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path)
    write_documents(tmp_path, {"validation": [[[1, 2, 3, 4]]]}, row_tokens=4)
    with pytest.raises(EvaluationError, match="are for the task sft; bits per byte need text"):
        read_data(str(tmp_path), None)


@pytest.mark.parametrize("name", ["nothing.txt", "empty"])
def test_a_source_without_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").write_text("")
    with pytest.raises(EvaluationError, match="holds no text"):
        read_text(str(tmp_path / name), None, ignore)


def test_equals_signs_of_paths_and_uris_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lang=en").mkdir()
    (tmp_path / "lang=en" / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    for given in ("lang=en/a.txt", f"{tmp_path}/lang=en/a.txt"):
        assert located(given) == f"{tmp_path}/lang=en/a.txt"
        assert read_text(located(given), None, ignore).documents == ("one",)
    assert located("mine=b.txt") == f"mine={tmp_path}/b.txt"
    assert located(f"mine={tmp_path}/lang=en/a.txt") == f"mine={tmp_path}/lang=en/a.txt"
    for given in (
        "builtin",
        "mine=builtin",
        "https://host/b.txt?sig=HUSH",
        "mine=https://host/b.txt?sig=HUSH",
    ):
        assert located(given) == given


def test_the_name_of_a_text_holds_no_secret_of_its_uri() -> None:
    with web_server({"/book.txt": b"one two"}) as web:
        assert read_text(web.url("/book.txt?sig=HUSH"), None, ignore).name == "book.txt"
