"""What a job makes of its rows, and how it treats an output that exists; whole jobs on the session's cluster."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llama_ray.batch_inference.config import BatchError
from llama_ray.batch_inference.job import BatchJob
from llama_ray.batch_inference.partition_file import Counts
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.storage import store
from llama_ray.storage.store import StorageError
from tests.batch_inference.helpers import answers, config, read_rows, run, write_rows
from tests.object_store import s3_server, uri

NUM_ROWS = 100
# Row number -> row. Bad rows with the error that they get; several kinds share a partition.
BAD_ROWS: dict[int, tuple[Any, str]] = {
    3: ('{"prompt": "cut', "in.jsonl:4 is not JSON"),
    10: ({"prompt": "fox " * 300}, "shorten the prompt"),
    20: ({"prompt": "x", "sampling_params": {"temprature": 0}}, "'temprature' is not known"),
    30: ({"prompt": "x", "sampling_params": {"max_tokens": 1000}}, "set max_tokens to at most"),
    40: ('{"prompt": "\\ud800"}', "lone surrogate"),
    50: ({"id": "no prompt"}, "neither of 'prompt'"),
}
SEEDED, CONSTRAINED, TOKEN_IDS, EARLIER_OUTPUT, UNICODE = 5, 31, 33, 34, 99
DIGITS = {"regex": "[0-9]{3}", "max_tokens": 9, "ignore_eos": False}
GOOD_ROWS: dict[int, dict[str, Any]] = {
    SEEDED: {"prompt": "fox", "sampling_params": {"seed": 7}},
    CONSTRAINED: {"prompt": "x", "sampling_params": DIGITS},
    TOKEN_IDS: {"token_ids": [5, 6], "sampling_params": {"n": 2, "logprobs": 1, "temperature": 0}},
    EARLIER_OUTPUT: {"prompt": "x", "row": 99, "error": "old", "completions": []},
    UNICODE: {"prompt": "漢字 🙂", "nested": {"kept": [1, 2.5, None, "\u2028\x85"]}},
}
PLAIN_ROWS = set(range(NUM_ROWS)) - set(BAD_ROWS) - set(GOOD_ROWS)


@dataclass(frozen=True)
class Finished:
    """A job that ran to its end in `directory`, and what it logged."""

    directory: Path
    job: BatchJob
    counts: Counts
    log: list[str]

    @property
    def output(self) -> Path:
        return self.directory / "out.jsonl"

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.output)


@pytest.fixture(scope="module")
def mixed(ray_cluster: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """All kinds of rows, answered by one replica."""
    rows: list[Any] = [{"prompt": "fox", "i": i} for i in range(NUM_ROWS)]
    for row, given in (GOOD_ROWS | {row: given for row, (given, _) in BAD_ROWS.items()}).items():
        rows[row] = given
    directory = tmp_path_factory.mktemp("mixed")
    source = write_rows(directory / "in.jsonl", rows)
    job = BatchJob(config(checkpoint, source, directory / "out.jsonl", replicas=1, max_num_seqs=4))
    log: list[str] = []
    return Finished(directory, job, job.run(log.append, log.append), log)


@pytest.fixture
def finished(mixed: Finished, tmp_path: Path) -> Finished:
    """A copy of `mixed`, for a test that changes it."""
    shutil.copytree(mixed.directory, tmp_path, dirs_exist_ok=True)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    job = BatchJob(config(Path(mixed.job.config.checkpoint), source, output))
    return Finished(tmp_path, job, mixed.counts, mixed.log)


def test_the_output_has_one_row_for_each_input_row_in_order(mixed: Finished) -> None:
    assert [row["row"] for row in mixed.rows] == list(range(NUM_ROWS))
    assert [row["i"] for row in mixed.rows if "i" in row] == sorted(PLAIN_ROWS)


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_row_that_cannot_be_answered_has_an_error_and_no_completions(mixed: Finished, row: int) -> None:
    found = mixed.rows[row]
    assert BAD_ROWS[row][1] in found["error"]
    assert "completions" not in found


def test_only_rows_that_cannot_be_answered_have_errors(mixed: Finished) -> None:
    assert [row["row"] for row in mixed.rows if "error" in row] == list(BAD_ROWS)


def test_a_line_that_is_not_json_is_kept_as_text(mixed: Finished) -> None:
    assert mixed.rows[3]["line"] == BAD_ROWS[3][0]


def test_fields_are_kept_whatever_characters_they_hold(mixed: Finished) -> None:
    assert mixed.rows[40]["prompt"] == "\ud800"
    assert mixed.rows[UNICODE].items() >= GOOD_ROWS[UNICODE].items()


def test_fields_of_an_earlier_output_are_replaced(mixed: Finished) -> None:
    found = mixed.rows[EARLIER_OUTPUT]
    assert "error" not in found
    assert found["completions"]


def test_a_seeded_row_has_the_engines_answer(mixed: Finished, checkpoint: Path) -> None:
    engine = Engine.from_pretrained(checkpoint, device="cpu")
    [expected] = engine.generate("fox", SamplingParams(max_tokens=6, ignore_eos=True, seed=7))
    assert mixed.rows[SEEDED]["completions"] == [
        {"text": expected.text, "finish_reason": "length", "token_ids": expected.token_ids}
    ]


def test_rows_without_a_seed_have_different_seeds(mixed: Finished) -> None:
    plain = [mixed.rows[row] for row in sorted(PLAIN_ROWS)]
    assert len({tuple(tokens) for tokens in answers(plain)}) > 0.9 * len(plain)


def test_a_row_may_constrain_its_text(mixed: Finished) -> None:
    assert re.fullmatch("[0-9]{3}", mixed.rows[CONSTRAINED]["completions"][0]["text"])


def test_a_row_may_ask_for_several_completions_with_logprobs(mixed: Finished) -> None:
    completions = mixed.rows[TOKEN_IDS]["completions"]
    assert len(completions) == 2
    for completion in completions:
        assert [entry["token_id"] for entry in completion["logprobs"]] == completion["token_ids"]


def test_rows_errors_and_tokens_are_counted(mixed: Finished) -> None:
    assert mixed.counts.rows == NUM_ROWS
    assert mixed.counts.errors == len(BAD_ROWS)
    [digits] = answers([mixed.rows[CONSTRAINED]])
    # Every other answered row has one completion of six tokens, and `TOKEN_IDS` has two.
    completions = NUM_ROWS - len(BAD_ROWS) - 1 + 1
    assert mixed.counts.generated_tokens == 6 * completions + len(digits)


def test_the_log_tells_rows_and_errors(mixed: Finished) -> None:
    progress, result = mixed.log[-2:]
    assert "100 of 100 rows, 6 errors" in progress
    assert "100 rows, 6 of them errors" in result


def test_nothing_but_the_output_and_its_record_remains(mixed: Finished) -> None:
    assert sorted(path.name for path in mixed.directory.iterdir()) == [
        "in.jsonl", "out.jsonl", "out.jsonl.job.json",
    ]  # fmt: skip


def test_two_replicas_on_an_object_store_give_the_same_answers(mixed: Finished, checkpoint: Path) -> None:
    with s3_server() as port:
        store.upload(mixed.directory / "in.jsonl", uri(port, "in/in.jsonl"))
        remote = config(
            checkpoint, uri(port, "in"), uri(port, "answers/out.jsonl"), replicas=2, max_num_seqs=16
        )
        job = BatchJob(remote)
        assert run(job) == mixed.counts
        assert store.read_text(remote.output) == mixed.output.read_text()
        assert store.list_files(uri(port, "answers")) == ["out.jsonl", "out.jsonl.job.json"]
        assert BatchJob(remote).finished == job.finished


def test_a_complete_output_stays_as_it_is(finished: Finished, checkpoint: Path) -> None:
    before = finished.output.stat().st_mtime_ns
    assert finished.job.finished == finished.counts
    assert run(finished.job) == finished.counts
    other_replicas = config(
        checkpoint, finished.directory / "in.jsonl", finished.output, replicas=2, max_num_seqs=2
    )
    assert BatchJob(other_replicas).finished == finished.counts
    assert finished.output.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"params": SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.5)},
            r"another temperature \(1.0, now 0.5\); .* --overwrite",
        ),
        ({"seed": 2}, r"another seed \(1, now 2\)"),
        ({"dtype": "bfloat16"}, "another dtype"),
        ({"prompt_field": "text"}, "another prompt_field"),
    ],
)
def test_an_output_of_another_job_is_refused(
    finished: Finished, checkpoint: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BatchError, match=message):
        BatchJob(config(checkpoint, finished.directory / "in.jsonl", finished.output, **change))


def test_an_output_of_another_input_is_refused(finished: Finished, checkpoint: Path) -> None:
    source = write_rows(finished.directory / "in.jsonl", [{"prompt": "other"}])
    with pytest.raises(
        BatchError, match="made with another input; choose another --output, or give --overwrite"
    ):
        BatchJob(config(checkpoint, source, finished.output))


def test_an_output_that_was_changed_is_refused(finished: Finished) -> None:
    with finished.output.open("a") as file:
        file.write("{}\n")
    with pytest.raises(BatchError, match="it was changed afterwards; choose another --output"):
        BatchJob(finished.job.config)


def test_a_record_that_cannot_be_read_is_refused(finished: Finished) -> None:
    Path(f"{finished.output}.job.json").write_text("{")
    with pytest.raises(StorageError, match=r"cannot be read .* --overwrite"):
        BatchJob(finished.job.config)


def test_a_deleted_output_is_made_again(finished: Finished) -> None:
    finished.output.unlink()
    job = BatchJob(finished.job.config)
    assert job.finished is None
    assert job.remaining == list(job.input.partitions)


def test_overwrite_replaces_an_output_only_when_the_job_can_run(finished: Finished, checkpoint: Path) -> None:
    source = write_rows(finished.directory / "in.jsonl", [{"prompt": "other"}])
    with pytest.raises(ValueError, match="replicas is 5"):
        run(BatchJob(config(checkpoint, source, finished.output, overwrite=True, replicas=5)))
    assert len(finished.rows) == NUM_ROWS
    assert run(BatchJob(config(checkpoint, source, finished.output, overwrite=True))).rows == 1
    assert [row["prompt"] for row in finished.rows] == ["other"]
