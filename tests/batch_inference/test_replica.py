"""A replica without Ray around it: crashes of the engine, and parts that are answered at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llama_ray.batch_inference import replica as module
from llama_ray.batch_inference.output import Output, Record, committed
from llama_ray.batch_inference.replica import Replica, Setup
from llama_ray.batch_inference.rows import Rows, find_rows
from llama_ray.generation.engine import Engine, Prompt
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from tests.batch_inference.conftest import read_rows, write_rows

POISON = 280


class Fragile(Engine):
    """An engine that crashes at the second step after it was given the token POISON; counts what it runs at once."""

    most = loads = 0
    doomed: int | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        type(self).loads += 1

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        if POISON in prompt:
            self.doomed = 2
        return super().submit(prompt, sampling_params)

    def step(self) -> list[Delta]:
        deltas = super().step()
        Fragile.most = max(Fragile.most, self.stats.running)
        if self.doomed is not None:
            self.doomed -= 1
            if not self.doomed:
                raise RuntimeError("device-side assert")
        return deltas


def answer(checkpoint: Path, rows: Rows, output: Path, max_num_seqs: int = 8) -> list[dict[str, Any]]:
    """All parts that are not finished, at once, through one replica -> the output's rows."""
    where, record = Output(str(output)), Record({})
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    setup = Setup(
        str(checkpoint), where.parts_of(record), params, 3, "prompt", 1,
        {"device": "cpu", "max_num_seqs": max_num_seqs},
    )  # fmt: skip
    replica = Replica(setup)
    parts = [part for part in rows.parts if part.file not in committed(where.parts_of(record))]
    with ThreadPoolExecutor(len(rows.parts)) as pool:
        results = list(pool.map(replica, [{"part": part.to_json()} for part in parts]))
    assert [result["failure"] for result in results] == [""] * len(parts)
    counts = where.finish(record, rows.parts).counts
    assert counts is not None
    if parts == list(rows.parts):
        assert counts.rows == sum(result["rows"] for result in results)
        assert counts.generated_tokens == sum(result["generated_tokens"] for result in results)
    return read_rows(output)


def test_a_row_that_crashes_the_engine_is_the_only_one_that_fails(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {5, 40, 41}
    given = [{"id": f"r{i}", "token_ids": [i + 1, POISON if i in bad else 2]} for i in range(100)]
    rows = find_rows(str(write_rows(tmp_path / "in.jsonl", given)), lambda path: False)
    assert len(rows.parts) == 4
    healthy = answer(checkpoint, rows, tmp_path / "healthy.jsonl")
    monkeypatch.setattr(module, "Engine", Fragile)
    monkeypatch.setattr(Fragile, "loads", 0)
    survived = answer(checkpoint, rows, tmp_path / "survived.jsonl")
    assert [row["row"] for row in survived] == list(range(100))
    for row, whole in zip(survived, healthy, strict=True):
        if row["row"] in bad:
            assert "RuntimeError: device-side assert (twice" in row.pop("error")
            assert row == {k: v for k, v in whole.items() if k != "completions"}
        else:
            assert row == whole
    assert Fragile.loads >= 4


class Deadly(Engine):
    """An engine whose process is killed at the second step after it was given the token POISON."""

    doomed = False

    def submit(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        self.doomed = self.doomed or POISON in prompt
        return super().submit(prompt, sampling_params)

    def step(self) -> list[Delta]:
        deltas = super().step()
        if self.doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        return deltas


def answer_with_deadly_engine(checkpoint: Path, rows: Rows, output: Path) -> None:
    module.Engine = Deadly  # type: ignore[misc]  # in a process of its own
    answer(checkpoint, rows, output)


def test_a_row_that_kills_its_process_is_the_only_one_that_fails(checkpoint: Path, tmp_path: Path) -> None:
    """Processes that die, each with a new one after it, until all rows have an answer."""
    given = [{"id": f"r{i}", "token_ids": [i + 1, POISON if i in (5, 40) else 2]} for i in range(50)]
    rows = find_rows(str(write_rows(tmp_path / "in.jsonl", given)), lambda path: False)
    healthy = answer(checkpoint, rows, tmp_path / "healthy.jsonl")
    context, exits = multiprocessing.get_context("forkserver"), list[int | None]()
    context.set_forkserver_preload(["tests.batch_inference.test_replica"])
    while not exits or exits[-1]:
        process = context.Process(
            target=answer_with_deadly_engine, args=(checkpoint, rows, tmp_path / "out.jsonl")
        )
        process.start()
        process.join()
        exits.append(process.exitcode)
        # At most three deaths of each part together and two of each row alone.
        assert exits[-1] in (0, -signal.SIGKILL)
        assert len(exits) <= 11
    survived = read_rows(tmp_path / "out.jsonl")
    assert [row["row"] for row in survived] == list(range(50))
    for row, whole in zip(survived, healthy, strict=True):
        if row["row"] in (5, 40):
            assert row.pop("error") == "the process died 2 times when it answered this row and nothing else"
            assert row == {k: v for k, v in whole.items() if k != "completions"}
        else:
            assert row == whole
    assert not list(tmp_path.rglob("attempts-*"))


def test_rows_of_several_parts_fill_one_batch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Engine", Fragile)
    monkeypatch.setattr(Fragile, "most", 0)
    given = [{"prompt": "fox"} for _ in range(70)]
    rows = find_rows(str(write_rows(tmp_path / "in.jsonl", given)), lambda path: False)
    answered = answer(checkpoint, rows, tmp_path / "out.jsonl", max_num_seqs=64)
    assert Fragile.most > max(part.rows for part in rows.parts)
    assert len({tuple(row["completions"][0]["token_ids"]) for row in answered}) > 60


def test_a_model_that_is_not_there_is_a_value_not_an_exception(tmp_path: Path) -> None:
    rows = find_rows(str(write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])), lambda path: False)
    setup = Setup(
        str(tmp_path / "nowhere"), str(tmp_path), SamplingParams(), 0, "prompt", 1, {"device": "cpu"}
    )
    result = Replica(setup)({"part": rows.parts[0].to_json()})
    assert "nowhere is not a directory" in result["failure"]
