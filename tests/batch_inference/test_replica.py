"""A replica without Ray: crashes of its engine and process, and partitions that are answered at once."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llama_ray.batch_inference import replica as module
from llama_ray.batch_inference.output import JobRecord, Output
from llama_ray.batch_inference.partition_file import finished_files
from llama_ray.batch_inference.partitions import PartitionedInput, partition_input
from llama_ray.batch_inference.replica import Replica, ReplicaConfig
from llama_ray.generation.engine import Engine
from llama_ray.generation.request import Request
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.model.stored_config import load_config
from tests.batch_inference.helpers import read_rows, write_rows
from tests.generation.adapters.helpers import save_random_adapter
from tests.processes import fresh_processes

POISON = 280


class CrashingEngine(Engine):
    """Crashes at the second step after it was given the token POISON; records loads and sequences at once."""

    max_running = loads = 0
    steps_left: int | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        type(self).loads += 1

    def add(self, request: Request) -> int:
        if POISON in request.prompt:
            self.steps_left = 2
        return super().add(request)

    def step(self) -> list[Delta]:
        deltas = super().step()
        CrashingEngine.max_running = max(CrashingEngine.max_running, self.stats.running)
        if self.steps_left is not None:
            self.steps_left -= 1
            if not self.steps_left:
                raise RuntimeError("device-side assert")
        return deltas


class KillingEngine(Engine):
    """Kills its process at the first step after it was given the token POISON."""

    poisoned = False

    def add(self, request: Request) -> int:
        self.poisoned = self.poisoned or POISON in request.prompt
        return super().add(request)

    def step(self) -> list[Delta]:
        deltas = super().step()
        if self.poisoned:
            os.kill(os.getpid(), signal.SIGKILL)
        return deltas


def use_crashing_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let replicas load a CrashingEngine, with its records at zero."""
    monkeypatch.setattr(module, "Engine", CrashingEngine)
    monkeypatch.setattr(CrashingEngine, "loads", 0)
    monkeypatch.setattr(CrashingEngine, "max_running", 0)


def input_of(directory: Path, rows: list[dict[str, Any]]) -> PartitionedInput:
    return partition_input(str(write_rows(directory / "in.jsonl", rows)), lambda path: False)


def poisoned_input(directory: Path, num_rows: int, poisoned: set[int]) -> PartitionedInput:
    return input_of(
        directory,
        [{"id": f"r{i}", "token_ids": [i + 1, POISON if i in poisoned else 2]} for i in range(num_rows)],
    )


def answer(
    checkpoint: Path,
    given: PartitionedInput,
    location: Path,
    max_num_seqs: int = 8,
    adapters: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Answer all unfinished partitions at once through one replica, and return the output's rows."""
    output, record = Output(str(location)), JobRecord({})
    directory = output.partitions_directory(record)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    engine_options = {"device": "cpu", "max_num_seqs": max_num_seqs}
    config = ReplicaConfig(str(checkpoint), directory, params, 3, "prompt", 1, engine_options, adapters or {})
    replica = Replica(config)
    remaining = [p for p in given.partitions if p.file not in finished_files(directory)]
    with ThreadPoolExecutor(len(given.partitions)) as pool:
        results = list(pool.map(replica, [{"partition": p.to_json()} for p in remaining]))
    assert [result["failure"] for result in results] == [""] * len(remaining)
    counts = output.finish(record, given.partitions)
    if remaining == list(given.partitions):
        assert counts.rows == sum(result["rows"] for result in results)
        assert counts.generated_tokens == sum(result["generated_tokens"] for result in results)
    return read_rows(location)


def check_only_poisoned_rows_failed(
    found: list[dict[str, Any]], healthy: list[dict[str, Any]], poisoned: set[int], message: str
) -> None:
    """Rows in `poisoned` have `message` as their error; all others are as in `healthy`."""
    assert [row["row"] for row in found] == list(range(len(healthy)))
    for row, whole in zip(found, healthy, strict=True):
        if row["row"] in poisoned:
            assert message in row.pop("error")
            assert row == {k: v for k, v in whole.items() if k != "completions"}
        else:
            assert row == whole


def test_only_the_row_that_crashes_the_engine_fails(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = {5, 40, 41}
    given = poisoned_input(tmp_path, 100, poisoned)
    assert len(given.partitions) == 4
    healthy = answer(checkpoint, given, tmp_path / "healthy.jsonl")
    use_crashing_engine(monkeypatch)
    found = answer(checkpoint, given, tmp_path / "crashed.jsonl")
    message = "RuntimeError: device-side assert (twice"
    check_only_poisoned_rows_failed(found, healthy, poisoned, message)
    assert CrashingEngine.loads >= 4


def answer_with_killing_engine(checkpoint: Path, given: PartitionedInput, location: Path) -> None:
    """Run in a process of its own."""
    module.Engine = KillingEngine  # type: ignore[misc]
    answer(checkpoint, given, location)


def test_only_the_row_that_kills_its_process_fails(checkpoint: Path, tmp_path: Path) -> None:
    """Processes die, each followed by a new one, until all rows have an answer."""
    poisoned = {5, 40}
    given = poisoned_input(tmp_path, 50, poisoned)
    healthy = answer(checkpoint, given, tmp_path / "healthy.jsonl")
    context = fresh_processes()
    arguments = (checkpoint, given, tmp_path / "out.jsonl")
    exit_codes: list[int | None] = []
    while not exit_codes or exit_codes[-1]:
        process = context.Process(target=answer_with_killing_engine, args=arguments)
        process.start()
        process.join()
        exit_codes.append(process.exitcode)
        assert exit_codes[-1] in (0, -signal.SIGKILL)
        # At most three deaths of each partition's shared attempts, and two of each poisoned row alone.
        assert len(exit_codes) <= 11
    message = "the process died 2 times while this row ran alone"
    check_only_poisoned_rows_failed(read_rows(tmp_path / "out.jsonl"), healthy, poisoned, message)
    assert not list(tmp_path.rglob("attempts-*"))


def test_rows_of_several_partitions_fill_one_batch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_crashing_engine(monkeypatch)
    given = input_of(tmp_path, [{"prompt": "fox"} for _ in range(70)])
    found = answer(checkpoint, given, tmp_path / "out.jsonl", max_num_seqs=64)
    assert CrashingEngine.max_running > max(partition.num_rows for partition in given.partitions)
    assert len({tuple(row["completions"][0]["token_ids"]) for row in found}) > 60


def test_a_missing_model_is_returned_as_a_failure(tmp_path: Path) -> None:
    [partition] = input_of(tmp_path, [{"prompt": "x"}]).partitions
    checkpoint = str(tmp_path / "nowhere")
    config = ReplicaConfig(checkpoint, str(tmp_path), SamplingParams(), 0, "prompt", 1, {"device": "cpu"})
    result = Replica(config)({"partition": partition.to_json()})
    assert "nowhere is not a directory" in result["failure"]


def test_rows_may_name_adapters(checkpoint: Path, tmp_path: Path) -> None:
    adapter = str(save_random_adapter(tmp_path / "adapter", load_config(checkpoint), 1))
    asked = [None, "support", None, "support", "other"]
    rows = [{"token_ids": [5, 6, 7], "sampling_params": {"seed": 1}, "adapter": name} for name in asked]
    found = answer(
        checkpoint, input_of(tmp_path, rows), tmp_path / "out.jsonl", adapters={"support": adapter}
    )
    assert found[4]["error"] == "'adapter' is 'other'; it must be one of support, or left out"
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
    with Engine.from_pretrained(checkpoint, device="cpu", adapters={"support": adapter}) as engine:
        expected = engine.generate([[5, 6, 7]] * 4, params, adapter=asked[:4])
    assert [row["completions"][0]["token_ids"] for row in found[:4]] == [c.token_ids for c in expected]
    assert expected[0].token_ids != expected[1].token_ids
    assert [row["adapter"] for row in found] == asked
