"""The conversations of a part become rows of a shard, and those that do not are told with their place."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.cleaning.duplicates.groups import resolve
from llama_ray.data.conversations.config import ConversationConfig
from llama_ray.data.dataset.info import SPLITS
from llama_ray.data.dataset.shards import open_shard
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.corpus import find_corpus
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.part_record import PartRecord, read_record
from llama_ray.data.preparing.part_task import (
    Job,
    TaskResult,
    clean_part,
    duplicates_file,
    task_row,
    tokenise_part,
)
from llama_ray.data.preparing.parts import Part, divide
from llama_ray.data.preparing.reading import Reading
from llama_ray.data.preparing.tokenizers import GivenTokenizers
from llama_ray.data.tokenizing.encoder import EncoderChoice
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from tests.data.chat_templates import CHATML, tokenizer_with

ROW = 256


def pair(number: int, answer: str = "Yes.") -> dict[str, Any]:
    return {"prompt": f"Is it {number}?", "completion": answer}


def config(tmp_path: Path, **conversations: Any) -> PrepareConfig:
    if not (tmp_path / "model").exists():
        tokenizer_with(tmp_path / "model", CHATML)
    return PrepareConfig(
        [f"chat={tmp_path / 'chat'}"],
        str(tmp_path / "out"),
        task="sft",
        tokenizer=str(tmp_path / "model"),
        validation_fraction=0.2,
        conversations=ConversationConfig(seq_len=ROW, **conversations),
    )


def parts_of(config: PrepareConfig) -> tuple[list[Part], Job]:
    """Return the parts of a preparation, and the job, whose directory holds the tokenizer."""
    staging = Path(config.output)
    (staging / WORK).mkdir(parents=True)
    tokenizer = GivenTokenizers.load(config).tokenizer
    assert tokenizer is not None
    tokenizer.save(staging)
    job = Job(
        str(staging), Reading(config.fields(), config.cleaning, 0), config.validation_fraction, 9,
        tokenizer.fingerprint, EncoderChoice(False, "", ""), conversations=config.conversations,
    )  # fmt: skip
    return divide(find_corpus(config.sources(), config.fields()), config.shard_bytes), job


def tokenised(config: PrepareConfig) -> PartRecord:
    [part], job = parts_of(config)
    result = TaskResult(**tokenise_part(task_row(part), job))
    assert result.error == ""
    assert not result.given_up
    return read_record(Path(job.directory), "tokenised", 0)


def bad_lines(config: PrepareConfig, stage: str = "tokenised") -> list[tuple[str, str]]:
    file = Path(config.output) / WORK / f"bad-{stage}-00000.jsonl"
    lines = map(json.loads, file.read_text().splitlines())
    return [(line["record"], line["reason"]) for line in lines]


def test_each_conversation_is_whole_in_one_row_of_one_split(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    records = [pair(n, "Yes. " * (1 + n % 5)) for n in range(60)]
    (tmp_path / "chat" / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    made = config(tmp_path)
    record = tokenised(made)
    tokenizer = Tokenizer.load(made.output)
    found = []
    for split in SPLITS:
        shard = record.shards[split]
        opened = open_shard(Path(made.output) / shard.file)
        assert shard.tokens % ROW == 0
        assert set(range(0, shard.tokens, ROW)) <= set(opened.starts.tolist())
        assert opened.mask is not None
        assert shard.trained == np.count_nonzero(opened.mask)
        masks = np.split(opened.mask, opened.starts[1:].astype(np.int64))
        for ids, mask in zip(opened.documents(), masks, strict=True):
            answer = tokenizer.decode(ids[mask].tolist(), skip_special=False)
            question = tokenizer.decode(ids.tolist(), skip_special=False)
            found.append((split, question.partition("user\n")[2].partition("<|im_end|>")[0], answer))
    assert sorted(each[1:] for each in found) == sorted(
        (each["prompt"], f"{each['completion']}<|im_end|>") for each in records
    )
    assert 4 <= sum(split == "validation" for split, *_ in found) <= 25
    assert sum(statistics.sources["chat"].documents for statistics in record.statistics.values()) == 60


def test_what_is_no_example_is_told_with_its_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    good = [json.dumps(pair(n)) for n in range(3)]
    long = json.dumps(pair(0, "long " * ROW))
    weightless = json.dumps({"messages": [{"role": "assistant", "content": "x", "weight": 0}]})
    (tmp_path / "chat" / "a.jsonl").write_text("\n".join([*good, long, "{", weightless]))
    (tmp_path / "chat" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join([good[0], "", long]).encode()))
    (tmp_path / "chat" / "c.json").write_text(f"[{good[1]}, {long}]")
    made = config(tmp_path)
    assert tokenised(made).bad_records == 5
    found = dict(bad_lines(made))
    assert found["a.jsonl:5"] == "not JSON"
    assert found["a.jsonl:6"].startswith("no answer to learn")
    for place in ("a.jsonl:4", "b.jsonl.gz:3", "c.json record 2"):
        assert found[place].startswith("longer than a row; give a larger --seq_len, or --too_long drop (")
        assert found[place].endswith(" tokens, rows have 256)")


def test_what_is_too_long_can_be_dropped_and_is_counted(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    records = [*map(pair, range(20)), pair(99, "long " * ROW)]
    (tmp_path / "chat" / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    record = tokenised(config(tmp_path, too_long="drop"))
    assert record.bad_records == 0
    [row] = record.drops.rows()
    assert (row.rule, row.count, row.source) == ("too_long", 1, "chat")
    assert sum(shard.documents for shard in record.shards.values()) == 20


def test_both_stages_tell_of_bad_records_where_duplicates_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    lines = [json.dumps(pair(0)), "{", json.dumps(pair(1, "long " * ROW))]
    (tmp_path / "chat" / "a.jsonl").write_text("\n".join(lines))
    made = replace(config(tmp_path), cleaning=CleanConfig(dedup="exact"))
    [part], job = parts_of(made)
    clean_part(task_row(part), job)
    resolve([], duplicates_file(Path(job.directory) / WORK))
    result = TaskResult(**tokenise_part(task_row(part), job))
    assert (result.error, result.bad_records) == ("", 2)
    assert [place for stage in ("cleaned", "tokenised") for place, _ in bad_lines(made, stage)] == [
        "a.jsonl:2",
        "a.jsonl:3",
    ]


def test_a_given_template_replaces_that_of_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    file = tmp_path / "template.jinja"
    file.write_text(CHATML.replace("SmolLM", "Otto"))
    given = GivenTokenizers.load(config(tmp_path, chat_template=str(file)))
    own = GivenTokenizers.load(config(tmp_path))
    assert given.tokenizer is not None
    assert given.tokenizer.chat_template is not None
    assert "Otto" in given.tokenizer.chat_template.templates["default"]
    # It makes another dataset.
    assert given.identities() != own.identities()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "tokenizer is missing; task sft needs the tokenizer of the model to tune; give --"),
        ({"conversations": ConversationConfig()}, "seq_len is missing; task sft needs the length of its rows"),
        ({"text_field": "body"}, "text_field is given; it has an effect on texts"),
        ({"cleaning": CleanConfig(clean=("c4",))}, "clean is given; it has an effect on texts"),
        ({"task": "pretrain"}, "seq_len is given; it has an effect on conversations"),
    ],
)  # fmt: skip
def test_settings_of_another_task_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made = config(tmp_path)
    with pytest.raises(ValueError, match=message):
        replace(made, **changes)


def test_a_date_that_is_none_is_refused() -> None:
    with pytest.raises(
        ValueError, match="template_date is '2024-02-30'; it must be a date, such as 2024-07-26"
    ):
        ConversationConfig(template_date="2024-02-30")
