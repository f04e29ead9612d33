from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ray.data.dataset.info import INFO_FILE, Counted, SourceInfo, read_info, write_info
from llama_ray.data.dataset.shards import DatasetError
from tests.data.conftest import MakeDataset
from tests.token_data import INFO, write_documents


def test_info_is_read_as_it_was_written(tmp_path: Path) -> None:
    source = SourceInfo(
        name="web",
        location="s3://bucket/*.parquet",
        files=7,
        texts=100,
        text_bytes=12345,
        left_out={"hidden": Counted(3, (".a", ".b", ".c"))},
        bad_records={"not UTF-8": Counted(1, ("a.jsonl:17",))},
        dropped={"gopher_quality: too short": Counted(2)},
        languages={"en": 90, "de": 10},
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    written = write_info(tmp_path, replace(INFO, sources=(source,), settings={"seed": 0, "language": None}))
    assert read_info(tmp_path) == written
    assert written.sources == (source,)
    assert written.files["tokenizer.json"].sha256 == hashlib.sha256(b"{}").hexdigest()


def test_totals_are_those_of_the_shards(make_dataset: MakeDataset) -> None:
    directory = make_dataset([100, 50], [20])
    info = read_info(directory)
    assert (info.tokens("train"), info.documents("train"), info.tokens("validation")) == (150, 2, 20)
    assert [shard.file for shard in info.splits["train"]] == ["train-00000.bin", "train-00001.bin"]
    totals = json.loads((directory / INFO_FILE).read_text())["totals"]
    assert totals["train"] == {"tokens": 150, "documents": 2}


def test_equal_tokens_have_one_fingerprint_whatever_they_were_made_from(tmp_path: Path) -> None:
    tokens = {"train": [[[1, 2, 3]]], "validation": [[[4, 5]]]}
    first = read_info(write_documents(tmp_path / "a", tokens))
    second = read_info(write_documents(tmp_path / "b", tokens))
    assert first.content_fingerprint == second.content_fingerprint
    second = replace(second, fingerprint="other", seed=7, sources=())
    assert first.content_fingerprint == second.content_fingerprint


@pytest.mark.parametrize(
    "other",
    [
        {"train": [[[1, 2, 4]]], "validation": [[[4, 5]]]},
        {"train": [[[1, 2], [3]]], "validation": [[[4, 5]]]},
        {"train": [[[4, 5]]], "validation": [[[1, 2, 3]]]},
        {"train": [[[1, 2, 3]]], "validation": []},
    ],
)
def test_other_tokens_or_documents_have_another_fingerprint(
    tmp_path: Path, other: dict[str, list[list[list[int]]]]
) -> None:
    first = write_documents(tmp_path / "a", {"train": [[[1, 2, 3]]], "validation": [[[4, 5]]]})
    second = write_documents(tmp_path / "b", other)
    assert read_info(first).content_fingerprint != read_info(second).content_fingerprint


def test_missing_or_damaged_info_is_refused(tmp_path: Path, make_dataset: MakeDataset) -> None:
    with pytest.raises(DatasetError, match=r"is not a prepared dataset \(no dataset.json\)"):
        read_info(tmp_path)
    directory = make_dataset([100])
    text = (directory / INFO_FILE).read_text()
    for content, message in (
        (text[:-10], "is damaged"),
        (text.replace('"splits"', '"spilt"'), "is damaged .*spilt is not known"),
        (
            text.replace('"tokens": 100', '"tokens": "100"'),
            r"splits.train\[0\].tokens is '100'; it must be int",
        ),
        (
            text.replace('"format_version": 2', '"format_version": 1'),
            "has format version 1; it must have version 2; prepare the data again",
        ),
        ("[]", "is damaged"),
        ("\xff", "is damaged"),
    ):
        (directory / INFO_FILE).write_text(content, encoding="latin-1")
        with pytest.raises(DatasetError, match=message):
            read_info(directory)
