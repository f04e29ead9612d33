from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.preparing.config import named_sources
from llama_ray.data.preparing.corpus import find_corpus
from llama_ray.data.preparing.reading import Reading
from llama_ray.data.preparing.tokenizer_job import TrainTokenizerConfig, run_tokenizer_job
from llama_ray.data.preparing.tokenizer_sample import TokenizerSample
from llama_ray.data.records.fields import TextFields
from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.data.tokenizing.training import TrainingOptions
from tests.data.sources.web_server import web_server


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Two sources of the same size, one of letters and one of digits."""
    for name, line in (("letters", "abcdefgh ijklmnop"), ("digits", "123 456 789 123 4")):
        lines = [json.dumps({"text": f"{line} {number % 7}"}) for number in range(600)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [f"{name}={tmp_path / name}.jsonl" for name in ("letters", "digits")]


def config(sources: list[str], output: Path, **options: object) -> TrainTokenizerConfig:
    values = {"source": sources, "output": str(output), "vocab_size": 270} | options
    return TrainTokenizerConfig(**values)


def test_weights_decide_which_texts_the_vocabulary_is_for(tmp_path: Path, sources: list[str]) -> None:
    lines: list[str] = []
    of_letters = run_tokenizer_job(
        config(sources, tmp_path / "a", weights=["letters=9", "digits=1"], sample_characters=8000),
        lines.append,
    )
    of_digits = run_tokenizer_job(
        config(sources, tmp_path / "b", weights=["letters=0.1", "digits=0.9"], sample_characters=8000),
        lambda line: None,
    )
    assert Tokenizer.load(tmp_path / "a").fingerprint == of_letters.fingerprint
    assert len(of_letters.encode("abcdefgh")) < len(of_digits.encode("abcdefgh"))
    assert len(of_digits.encode("123 456 789")) < len(of_letters.encode("123 456 789"))
    assert any("270 entries from 0.0 MB" in line for line in lines)


def test_the_same_text_gives_the_same_bytes(tmp_path: Path, sources: list[str]) -> None:
    for name in ("a", "b"):
        run_tokenizer_job(config(sources, tmp_path / name, sample_characters=6000), lambda line: None)
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b"))
    assert one == two


def test_tokenizers_are_compared_on_texts_that_were_held_out(tmp_path: Path, sources: list[str]) -> None:
    run_tokenizer_job(config(sources, tmp_path / "a"), lambda line: None)
    lines: list[str] = []
    options = TrainingOptions(split_digits=1)
    run_tokenizer_job(
        config(sources, tmp_path / "b", compare=[str(tmp_path / "a")], training=options), lines.append
    )
    header, this, other = lines[-3:]
    assert header.split()[0] == "tokenizer"
    assert this.startswith("this one ")
    assert other.startswith(str(tmp_path)[:20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights": ["letters=1", "words=1"]},
            "weights is 'words=1'; it must be NAME=SHARE with a positive share",
        ),
        ({"weights": ["letters=0"]}, "weights is 'letters=0'; it must be NAME=SHARE"),
        ({"vocab_size": 257}, "vocab_size is 257; it must be at least 258"),
        ({"sample_characters": 0}, "sample_characters is 0; it must be at least 1"),
        ({"compare": ["/nowhere"]}, "no tokenizer at /nowhere"),
        ({"text_field": "body"}, "letters.jsonl:1: no field 'body'"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, sources: list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises((TokenizerError, ValueError)) as error:
        run_tokenizer_job(config(sources, tmp_path / "out", **options), lambda line: None)
    assert message in str(error.value)


def test_a_tokenizer_is_replaced_only_if_asked_for(tmp_path: Path, sources: list[str]) -> None:
    output = tmp_path / "out"
    run_tokenizer_job(config(sources, output), lambda line: None)
    with pytest.raises(ValueError, match="holds a tokenizer; choose another output, or give --overwrite"):
        run_tokenizer_job(config(sources, output), lambda line: None)
    run_tokenizer_job(config(sources, output, overwrite=True, vocab_size=260), lambda line: None)
    assert Tokenizer.load(output).vocab_size == 260


def test_bad_records_within_the_limit_are_told(tmp_path: Path, sources: list[str]) -> None:
    with (tmp_path / "letters.jsonl").open("a") as file:
        file.write("\n{")
    lines: list[str] = []
    run_tokenizer_job(config(sources, tmp_path / "out", max_bad_records=1), lines.append)
    assert "left out 1 bad records, which bad_records.jsonl lists" in lines
    (bad,) = map(json.loads, (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines())
    assert bad["record"] == "letters.jsonl:601"


def test_a_source_without_a_weight_is_not_trained_on(tmp_path: Path, sources: list[str]) -> None:
    (tmp_path / "digits.jsonl").write_text(json.dumps({"text": "zq " * 99}))
    tokenizer = run_tokenizer_job(
        config(sources, tmp_path / "out", weights=["letters=1"], vocab_size=400), lambda line: None
    )
    assert len(tokenizer.encode(" zq")) == 3


def test_an_output_that_cannot_be_is_refused_before_training(tmp_path: Path, sources: list[str]) -> None:
    lines: list[str] = []
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TokenizerError, match=r"cannot write to .*file \(File exists\); choose another output"
    ):
        run_tokenizer_job(config(sources, tmp_path / "file"), lines.append)
    assert lines == []


def test_bad_records_are_told_also_where_the_output_is_in_a_new_folder(
    tmp_path: Path, sources: list[str]
) -> None:
    (tmp_path / "letters.jsonl").write_text("{")
    with pytest.raises(ValueError, match="1 bad record so far"):
        run_tokenizer_job(config(sources, tmp_path / "new" / "out"), lambda line: None)
    assert (tmp_path / "new" / "out.bad_records.jsonl").exists()


def test_a_source_of_unknown_size_is_trained_on_as_much_as_the_largest(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": f"line {number}"}).encode() + b"\n" for number in range(400))
    (tmp_path / "local.jsonl").write_bytes(lines)
    fields = TextFields()
    (tmp_path / "work").mkdir()
    with web_server({"/remote.jsonl": lines}) as web:
        web.ranges = web.says_length = False
        named = named_sources([str(tmp_path / "local.jsonl"), web.url("/remote.jsonl")])
        sample = TokenizerSample(
            find_corpus(named, fields),
            Reading(fields, CleanConfig(), seed=0),
            tmp_path,
            tmp_path / "out",
            limit=0,
            size=2000,
        )
        found = list(sample)
    assert len(found) == 2 * found.index("line 0", 1)


def test_a_bad_record_counts_once_where_all_texts_seem_to_be_for_validation(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{')
    (tmp_path / "work").mkdir()
    fields = TextFields()
    sample = TokenizerSample(
        find_corpus(named_sources([str(tmp_path / "a.jsonl")]), fields),
        Reading(fields, CleanConfig(), seed=0),
        tmp_path,
        tmp_path / "out",
        limit=1,
        max_bad_records=1,
    )
    assert list(sample) == ["one"]
