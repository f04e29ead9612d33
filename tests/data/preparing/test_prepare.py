from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Literal

import pytest

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.conversations.config import ConversationConfig
from llama_ray.data.dataset.info import DatasetInfo, read_info
from llama_ray.data.dataset.shards import DatasetError, open_shard
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.prepare import prepare
from llama_ray.data.sources.files import SourceError
from llama_ray.data.tokenizing.tokenizer import Tokenizer, TokenizerError
from tests.data.chat_templates import CHATML, tokenizer_with
from tests.ray_workers import ray_workers

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


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
    return PrepareConfig([str(corpus)], str(tmp_path / "data"), vocab_size=300, validation_fraction=0.2)


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


def test_each_text_of_each_source_is_in_one_split(config: PrepareConfig, corpus: Path) -> None:
    records = [json.dumps({"body": {"text": f"record {number} of many"}}) for number in range(60)]
    (corpus.parent / "many.jsonl").write_text("\n".join(records))
    lines: list[str] = []
    sources = [f"web={corpus.parent / 'many.jsonl'}", str(corpus)]
    other = dataclasses.replace(config, source=sources, text_field="body.text", shard_bytes=2000)
    info = prepare(other, lines.append)
    directory = Path(config.output)
    train, validation = documents(directory, "train"), documents(directory, "validation")
    texts = [path.read_text() for path in corpus.iterdir()]
    assert sorted(train + validation) == sorted([*texts, *(f"record {n} of many" for n in range(60))])
    assert 8 <= len(validation) <= 35
    assert info == read_info(directory)
    assert (info.documents("train"), info.documents("validation")) == (len(train), len(validation))
    assert [(source.name, source.files, source.texts) for source in info.sources] == [
        ("web", 1, 60),
        ("corpus", 40, 40),
    ]
    assert info.sources[1].text_bytes == sum(len(text) for text in texts)
    assert {shard.source for shard in info.splits["train"]} == {"web", "corpus"}
    assert info.tokenizer.fingerprint == Tokenizer.load(directory).fingerprint
    tokens = info.tokens("train") + info.tokens("validation")
    assert f"{len(info.splits['train']):,} of" not in lines[-1]
    assert any(line.startswith("tokenised") and f", {tokens:,} tokens, " in line for line in lines)


def test_any_number_of_workers_writes_the_same_files(config: PrepareConfig, corpus: Path) -> None:
    (corpus / "damaged.jsonl").write_text('{"text": "good"}\nbad\n{"text": 1}\n')
    config = dataclasses.replace(config, shard_bytes=5000, max_bad_records=2)
    infos = [
        prepare(dataclasses.replace(config, output=f"{config.output}{n}", workers=n), lambda line: None)
        for n in (1, 2, 4)
    ]
    assert len(infos[0].splits["train"]) > 3
    expected = files(Path(config.output + "1"))
    assert {"dataset.json", "tokenizer.json", "bad_records.jsonl", "report.html"} < expected.keys()
    assert files(Path(config.output + "2")) == files(Path(config.output + "4")) == expected


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


@pytest.mark.parametrize("dedup", ["exact", "minhash"])
def test_the_first_of_duplicates_stays_and_evaluations_are_kept_out(
    config: PrepareConfig, tmp_path: Path, dedup: Literal["exact", "minhash"]
) -> None:
    random, words = Random(0), ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"]
    texts = [" ".join(random.choices(words, k=40)) for _ in range(30)]
    evaluation = "one two three four five six seven eight nine ten eleven twelve thirteen"
    given = [*texts, texts[3], texts[5].upper(), texts[3], f"It says {evaluation}."]
    for name, rows in (("a", given[:12]), ("b", given[12:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (tmp_path / "evaluation.txt").write_text(evaluation)
    cleaning = CleanConfig(dedup=dedup, decontaminate=(str(tmp_path / "evaluation.txt"),), clean=())
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    config = dataclasses.replace(config, source=sources, cleaning=cleaning, shard_bytes=1000)
    infos = [
        prepare(dataclasses.replace(config, output=f"{config.output}{n}", workers=n), lambda line: None)
        for n in (1, 4)
    ]
    assert infos[0] == infos[1]
    kept = [text for split in ("train", "validation") for text in documents(Path(config.output + "1"), split)]
    assert sorted(kept) == sorted(texts)
    dropped = {name: found.count for source in infos[0].sources for name, found in source.dropped.items()}
    assert dropped == {f"dedup/{dedup} (texts)": 3, "contaminated (texts)": 1}


def test_two_texts_are_enough(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for fraction in (0.001, 0.999):
        two = dataclasses.replace(
            config, source=[str(tmp_path / "two.jsonl")], validation_fraction=fraction, overwrite=True
        )
        info = prepare(two, lambda line: None)
        assert (info.documents("train"), info.documents("validation")) == (1, 1)
        assert sorted(documents(tmp_path / "data", "train") + documents(tmp_path / "data", "validation")) == [
            "one",
            "two",
        ]


def test_a_given_tokenizer_is_used_as_it_is(config: PrepareConfig, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(iter(["other text"]), 260)
    tokenizer.save(tmp_path / "tokenizer")
    given = dataclasses.replace(config, tokenizer=str(tmp_path / "tokenizer"))
    better = Tokenizer.train(iter(["says hello to the world"] * 9), 300)
    better.save(tmp_path / "better")
    lines: list[str] = []
    info = prepare(dataclasses.replace(given, compare_tokenizer=str(tmp_path / "better")), lines.append)
    assert info.tokenizer.fingerprint == tokenizer.fingerprint == Tokenizer.load(config.output).fingerprint
    texts = documents(Path(config.output), "validation")
    size = sum(len(text) for text in texts)
    expected = [size / sum(len(each.encode(text)) for text in texts) for each in (tokenizer, better)]
    assert [info.tokenizer.bytes_per_token, info.tokenizer.compared_bytes_per_token] == pytest.approx(
        expected
    )
    assert f"{expected[0]:.2f} bytes a token" in "\n".join(lines)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"bos_token": null}')
    with pytest.raises(TokenizerError, match="has no bos_token"):
        prepare(given, lambda line: None)


def test_bad_records_are_counted_and_listed_and_too_many_are_refused_early(
    config: PrepareConfig, corpus: Path
) -> None:
    (corpus / "latin.txt").write_bytes(b"caf\xe9")
    (corpus / "photo.bin").write_bytes(b"\x89PNG\0\0")
    good = [json.dumps({"text": f"record {number}"}).encode() for number in range(60)]
    for number in (3, 10, 20, 30):
        good[number] = b'{"text": "\xff"}'
    (corpus / "records.jsonl").write_bytes(b"\n".join(good))
    report = Path(config.output + ".bad_records.jsonl")
    with pytest.raises(
        SourceError, match=r"1 bad record so far \(.*; max_bad_records is 0; .*bad_records.jsonl lists them"
    ) as raised:
        prepare(config, lambda line: None)
    assert "\n" not in str(raised.value)
    assert report.exists()
    assert not list(Path(config.output).iterdir())

    lines: list[str] = []
    info = prepare(dataclasses.replace(config, max_bad_records=5), lines.append)
    assert info.documents("train") + info.documents("validation") == 40 + 56
    assert not report.exists()
    listed = [
        json.loads(line) for line in (Path(config.output) / "bad_records.jsonl").read_text().splitlines()
    ]
    assert [(bad["source"], bad["record"]) for bad in listed] == [
        ("corpus", "latin.txt:1"),
        *(("corpus", f"records.jsonl:{line}") for line in (4, 11, 21, 31)),
    ]
    summary = [line.partition(";")[0] for line in lines if line.startswith("left out")]
    assert set(summary) == {
        "left out 1 document (latin.txt:1): not UTF-8",
        "left out 4 records (records.jsonl:4, records.jsonl:11, records.jsonl:21, ...): not UTF-8",
        "left out 1 file (photo.bin): NUL characters in them, as in binary files and UTF-16",
    }
    assert sum(bad.count for bad in info.sources[0].bad_records.values()) == 5


def test_text_that_is_no_text_is_refused(config: PrepareConfig, corpus: Path) -> None:
    for path in corpus.iterdir():
        path.write_bytes(b"{}")
        path.rename(path.with_suffix(".jsonl"))
    message = r"has no text \(left out 40 records .*; training and validation need"
    with pytest.raises(SourceError, match=message) as raised:
        prepare(dataclasses.replace(config, max_bad_records=1000), lambda line: None)
    assert "\n" not in str(raised.value)


def test_a_file_that_changes_on_the_way_ends_the_preparation(config: PrepareConfig, corpus: Path) -> None:
    def change(line: str) -> None:
        if line.startswith("tokenizer:"):
            (corpus / "7.txt").write_text("something else")

    with pytest.raises(SourceError, match=r"7\.txt changed while it was read; start again") as raised:
        prepare(config, change)
    assert "\n" not in str(raised.value)
    assert not list(Path(config.output).iterdir())


def test_a_part_whose_worker_is_killed_is_made_again(config: PrepareConfig, corpus: Path) -> None:
    for path in corpus.iterdir():
        path.write_text(path.read_text() * 10)
    config = dataclasses.replace(config, shard_bytes=60_000, workers=1)
    whole = prepare(dataclasses.replace(config, output=config.output + "2"), lambda line: None)
    killed: list[int] = []

    def kill(line: str) -> None:
        if line.startswith("tokenised 1 of"):
            while not killed:
                for process in ray_workers("tokenise_part"):
                    process.kill()
                    killed.append(process.pid)

    assert len(whole.splits["train"]) > 3
    assert prepare(config, kill) == whole
    assert len(killed) == 1


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


def test_files_of_another_preparation_are_replaced(config: PrepareConfig) -> None:
    output = Path(config.output)
    (output / ".partial-0123").mkdir(parents=True)
    (output / ".partial-0123" / "train-00007.bin").write_text("half")
    (output / "train-00009.bin").write_text("moved before the end")
    (output / ".dataset.json.0123abcd").write_text("half")
    (output / ".lock").write_text("")
    lines: list[str] = []
    prepare(config, lines.append)
    assert f"removed {output / '.partial-0123'}, which another preparation left unfinished" in lines
    assert {path.name for path in output.iterdir()} == {
        "dataset.json",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
        "train-00000.bin",
        "validation-00000.bin",
    }


def test_a_cluster_without_cpus_is_refused_at_once(config: PrepareConfig) -> None:
    lines = """
import sys
import ray
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.prepare import prepare
ray.init(address="local", num_cpus=0, include_dashboard=False)
prepare(PrepareConfig(source=[sys.argv[1]], output=sys.argv[2]))
"""
    done = subprocess.run(
        [sys.executable, "-c", lines, config.source[0], config.output],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "this cluster has 0 CPUs; preparing data needs 1; add a node with CPUs" in done.stderr
    assert not list(Path(config.output).glob("*"))


def test_conversations_become_the_same_rows_for_any_workers_and_report_what_is_learned(
    tmp_path: Path,
) -> None:
    (tmp_path / "chat").mkdir()
    for file in range(4):
        records = [{"prompt": f"Is it {file}.{n}?", "completion": "Yes. " * (n % 3 + 1)} for n in range(30)]
        (tmp_path / "chat" / f"{file}.jsonl").write_text("\n".join(map(json.dumps, records)))
    tokenizer_with(tmp_path / "model", CHATML)
    given = PrepareConfig(
        [str(tmp_path / "chat")],
        "",
        task="sft",
        tokenizer=str(tmp_path / "model"),
        validation_fraction=0.1,
        shard_bytes=1,
        conversations=ConversationConfig(seq_len=256),
    )
    lines: list[str] = []
    found = []
    for workers in (1, 3):
        output = tmp_path / f"out-{workers}"
        info = prepare(dataclasses.replace(given, output=str(output), workers=workers), lines.append)
        found.append({name: digest for name, digest in files(output).items() if name.endswith(".bin")})
    assert found[0] == found[1]
    assert len(found[0]) > 4
    assert (info.task, info.row_tokens) == ("sft", 256)
    assert sum(map(info.documents, info.splits)) == 120
    tokenizer = Tokenizer.load(output)
    assert tokenizer.chat_template is not None
    assert set(info.end_of_turn_ids) == tokenizer.end_of_turn_ids()
    assert info.settings["template_date"] == "2024-07-26"
    [told] = {line for line in lines if "are learned" in line}
    assert re.fullmatch(
        r"[\d,]+ of [\d,]+ training tokens are learned \(\d+\.\d%\); they fill \d+\.\d% of \d+ rows of 256",
        told,
    )
