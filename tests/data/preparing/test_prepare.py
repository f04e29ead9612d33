from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_ray.data.dataset.info import DatasetInfo, read_info
from llama_ray.data.dataset.shards import DatasetError, open_shard
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.preparing import prepare as module
from llama_ray.data.preparing.prepare import PrepareConfig, prepare
from llama_ray.data.sources.files import SourceError
from llama_ray.data.tokenizing.tokenizer import Tokenizer, TokenizerError
from tests.data.helpers import texts

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


FILES = [
    "dataset.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "train-00000.bin",
    "validation-00000.bin",
]


def files(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Document {number} says hello to the world.\n" * (number + 1))
    return folder


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> PrepareConfig:
    return PrepareConfig(str(corpus), str(tmp_path / "data"), vocab_size=300, validation_fraction=0.2)


def documents(directory: Path, split: str) -> list[str]:
    """The decoded documents of a split, each of which is between bos and eos."""
    tokenizer = Tokenizer.load(directory)
    found = []
    for shard in read_info(directory).splits[split]:
        tokens = open_shard(directory / shard.file).tokens.tolist()
        while tokens:
            assert tokens[0] == tokenizer.bos_id
            end = tokens.index(tokenizer.eos_id)
            found.append(tokenizer.decode(tokens[1:end]))
            tokens = tokens[end + 1 :]
    return found


def test_each_document_is_in_one_split(config: PrepareConfig, corpus: Path) -> None:
    lines: list[str] = []
    info = prepare(config, lines.append)
    directory = Path(config.output)
    train, validation = documents(directory, "train"), documents(directory, "validation")
    assert sorted(train + validation) == sorted(path.read_text() for path in corpus.iterdir())
    assert 2 <= len(validation) <= 16
    assert info == read_info(directory)
    assert (info.documents("train"), info.documents("validation")) == (len(train), len(validation))
    assert info.tokens("train") == len(TokenDataset(directory, "train"))
    assert info.tokenizer.fingerprint == Tokenizer.load(directory).fingerprint
    assert sorted(files(directory)) == FILES
    assert lines[0].startswith("40 documents")
    assert "tokenised 2 of 2 shards" in "\n".join(lines)


def test_the_same_text_gives_the_same_files(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GROUP_BYTES", 5000)
    again = dataclasses.replace(config, output=config.output + "2")
    info = prepare(config, lambda line: None)
    prepare(again, lambda line: None)
    assert len(info.splits["train"]) > 3
    assert files(Path(config.output)) == files(Path(again.output))


def test_a_finished_dataset_is_reused_and_a_different_one_is_not_replaced(
    config: PrepareConfig, corpus: Path
) -> None:
    first = prepare(config, lambda line: None)
    before = files(Path(config.output))
    lines: list[str] = []
    assert prepare(config, lines.append) == first
    assert "already holds this dataset" in lines[-1]

    other = dataclasses.replace(config, seed=7)
    with pytest.raises(DatasetError, match="choose another --output, or give --overwrite"):
        prepare(other, lambda line: None)
    (corpus / "0.txt").write_text("changed")
    with pytest.raises(DatasetError, match="made from other text or settings; choose another --output"):
        prepare(config, lambda line: None)
    assert files(Path(config.output)) == before

    replaced = prepare(dataclasses.replace(other, overwrite=True), lambda line: None)
    assert replaced != first
    assert read_info(config.output) == replaced
    assert prepare(other, lambda line: None) == replaced


def test_a_given_tokenizer_is_used_as_it_is(config: PrepareConfig, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(iter(["other text"]), 260)
    tokenizer.save(tmp_path / "tokenizer")
    info = prepare(dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer")), lambda line: None)
    assert info.tokenizer.fingerprint == tokenizer.fingerprint == Tokenizer.load(config.output).fingerprint
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"bos_token": null}')
    with pytest.raises(TokenizerError, match="has no bos_token"):
        prepare(dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer")), lambda line: None)


def test_a_summary_names_what_was_left_out_and_why(config: PrepareConfig, corpus: Path) -> None:
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "more.tar.GZ").write_bytes(b"\x1f\x8b")
    good = [json.dumps({"text": f"record {number}"}).encode() for number in range(60)]
    for number in (3, 10, 20, 30):
        good[number] = b'{"text": "\xff"}'
    (corpus / "records.jsonl").write_bytes(b"\n".join(good))
    lines: list[str] = []
    info = prepare(config, lines.append)
    assert info.documents("train") + info.documents("validation") == 40 + 56
    summary = [line.partition(";")[0] for line in lines[-5:-1]]
    assert summary[0].startswith(f"took {info.documents('train')} texts for training")
    assert sorted(summary[1:]) == [
        "left out 1 document (latin.txt:1): not UTF-8",
        "left out 1 file (more.tar.GZ): archives, or compressed in a way that is not read",
        "left out 4 records (records.jsonl:4, records.jsonl:11, records.jsonl:21, ...): not UTF-8",
    ]
    # What is left out whole is known, and said, before the work begins.
    assert (
        "left out 1 file (more.tar.GZ): archives, or compressed in a way that is not read; unpack them first"
        in lines[:2]
    )


def test_a_failed_preparation_leaves_no_files(config: PrepareConfig, corpus: Path) -> None:
    for path in corpus.iterdir():
        path.rename(path.with_suffix(".jsonl"))
    with pytest.raises(
        SourceError, match=r"has no document \(left out 820 records \(0.jsonl:1, .*not JSON"
    ) as raised:
        prepare(config, lambda line: None)
    assert "\n" not in str(raised.value)
    assert not list(Path(config.output).iterdir())
    for path in corpus.iterdir():
        path.rename(path.with_suffix(".txt"))
    prepare(config, lambda line: None)


def test_a_file_that_changes_on_the_way_ends_the_preparation(config: PrepareConfig, corpus: Path) -> None:
    def change(line: str) -> None:
        if line.startswith("tokenizer:"):
            (corpus / "7.txt").write_text("something else")

    with pytest.raises(SourceError, match=r"7\.txt changed while it was read; start again") as raised:
        prepare(config, change)
    assert "\n" not in str(raised.value)
    assert not list(Path(config.output).iterdir())


@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_of_two_preparations_at_once_one_waits_for_the_other(config: PrepareConfig, same: bool) -> None:
    second = config if same else dataclasses.replace(config, seed=1)
    waiting = threading.Event()
    heard: list[str] = []

    def hear(line: str) -> None:
        heard.append(line)
        waiting.set()

    with ThreadPoolExecutor(1) as threads:
        futures: list[Future[DatasetInfo]] = []

        def begin_second(line: str) -> None:
            if line.startswith("training a tokenizer"):
                futures.append(threads.submit(prepare, second, hear))
                assert waiting.wait(60)

        info = prepare(config, begin_second)
        if same:
            assert futures[0].result() == info
            assert "already holds this dataset" in heard[1]
        else:
            with pytest.raises(DatasetError, match="made from other text or settings"):
                futures[0].result()
    assert heard[0] == f"another process is writing to {config.output}; waiting for it to end"
    assert read_info(config.output) == info
    assert sorted(files(Path(config.output))) == FILES


def test_files_of_a_killed_preparation_are_replaced(config: PrepareConfig) -> None:
    output = Path(config.output)
    (output / ".partial").mkdir(parents=True)
    (output / ".partial" / "train-00007.bin").write_text("half")
    (output / "train-00009.bin").write_text("moved before the end")
    (output / ".dataset.json.0123abcd").write_text("half")
    (output / ".lock").write_text("")
    prepare(config, lambda line: None)
    assert sorted(files(output)) == FILES


def test_one_large_file_is_divided_into_documents(config: PrepareConfig, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Paragraph {number}, and a few words more.\n\n" for number in range(20_000)))
    prepare(dataclasses.replace(config, source=str(path)), lambda line: None)
    parts = texts(path)
    directory = Path(config.output)
    assert sorted(documents(directory, "train") + documents(directory, "validation")) == sorted(parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "{tmp}/nowhere"}, "no text found in"),
        ({"source": "{tmp}/corpus/1.txt"}, "has 1 document; training and validation need one each"),
        ({"output": "{tmp}/corpus"}, r"holds other files \(.*.txt\)"),
        ({"output": "{tmp}/corpus/1.txt"}, "is a file; give a directory"),
        ({"output": "{tmp}/corpus/1.txt/data"}, "cannot write to .*; choose another output"),
        ({"output": "{tmp}/caf\udce9"}, r"output is '.*/caf\\xe9'; it must be text in UTF-8"),
        ({"output": "s3://bucket/data"}, "give a directory on storage that all nodes share"),
        ({"tokenizer": "{tmp}/corpus"}, "no tokenizer at"),
        ({"vocab_size": 257}, "vocab_size is 257; it must be at least 258"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; it must be at most 16777216"),
        *(
            (
                {"validation_fraction": fraction},
                f"validation_fraction is {fraction}; it must be above 0 and below 1",
            )
            for fraction in (1.0, 0.0, 2.0, -1.0, math.nan, math.inf)
        ),
        ({"max_bytes": 0}, "max_bytes is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be at most"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(
    config: PrepareConfig, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    filled = {
        key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in changes.items()
    }
    with pytest.raises(ValueError, match=message) as raised:
        prepare(dataclasses.replace(config, **filled), lambda line: None)
    assert "\n" not in str(raised.value)


def test_a_cluster_without_cpus_is_refused_at_once(config: PrepareConfig) -> None:
    lines = """
import sys
import ray
from llama_ray.data.preparing.prepare import PrepareConfig, prepare
ray.init(address="local", num_cpus=0, include_dashboard=False)
prepare(PrepareConfig(source=sys.argv[1], output=sys.argv[2]))
"""
    done = subprocess.run(
        [sys.executable, "-c", lines, config.source, config.output],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "this cluster has 0 CPUs; preparing data needs 1; add a node with CPUs" in done.stderr
    assert not list(Path(config.output).iterdir())
