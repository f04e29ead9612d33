"""Workers and drivers that are killed while a job runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llama_ray.batch_inference.evaluation import EvaluatorConfig, compute_on_cluster
from llama_ray.batch_inference.job import BatchJob
from llama_ray.batch_inference.partition_file import Counts
from llama_ray.batch_inference.pool import PoolSize
from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.evaluation.parts import PartedScorer
from llama_ray.evaluation.scoring import Scoring
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from tests.batch_inference.helpers import (
    SEED,
    answers,
    answers_of_one_engine,
    config,
    read_rows,
    run,
    write_rows,
)
from tests.ray_workers import ray_workers

GENERATE = Path(__file__).parents[2] / "jobs" / "generate.py"
TEXTS = [f"fox {i}" for i in range(130)]
PARAMS = SamplingParams(max_tokens=80, ignore_eos=True, temperature=0.8, top_k=40, top_p=0.9)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """The answers of a job that nothing disturbs."""
    return answers_of_one_engine(checkpoint, TEXTS, PARAMS)


def write_input(directory: Path) -> Path:
    return write_rows(directory / "in.jsonl", [{"prompt": text} for text in TEXTS])


def wait_for(condition: Callable[[], Any]) -> None:
    """Poll, for what another process does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_worker_loses_and_duplicates_no_row(
    ray_cluster: str, checkpoint: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    output = tmp_path / "out.jsonl"
    job = BatchJob(
        config(checkpoint, write_input(tmp_path), output, params=PARAMS, replicas=1, max_num_seqs=4)
    )
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, job)
        wait_for(lambda: running.done() or len(job.remaining) < len(job.input.partitions))
        assert not running.done()
        [victim] = ray_workers("MapWorker(Map(Replica))")
        victim.kill()
        assert running.result().rows == len(TEXTS)
    found = read_rows(output)
    assert [(row["row"], row["prompt"]) for row in found] == list(enumerate(TEXTS))
    assert answers(found) == expected


def kill_driver_midway(cluster: str, checkpoint: Path, source: Path, output: Path) -> None:
    """Run a job in a driver that is killed once a partition is finished, and wait until its replicas are gone."""
    driver = subprocess.Popen(
        [
            sys.executable, str(GENERATE), "--checkpoint", str(checkpoint), "--input", str(source),
            "--output", str(output), "--max_tokens", "80", "--ignore_eos", "--seed", str(SEED), "--replicas", "1",
            "--max_num_seqs", "4",
        ],
        env={**os.environ, "RAY_ADDRESS": cluster},
    )  # fmt: skip
    parts = Path(f"{output}.parts")
    wait_for(lambda: driver.poll() is not None or any(parts.glob("*/part-*.jsonl")))
    assert driver.poll() is None
    driver.kill()
    driver.wait()
    wait_for(lambda: not ray_workers("MapWorker(Map(Replica))"))


@dataclass(frozen=True)
class ContinuedJob:
    """A job whose first driver was killed and that a second one finished."""

    finished_before: list[dict[str, Any]]
    """The answers that the first driver left."""
    marked: list[dict[str, Any]]
    """What replaced one finished partition before the second driver started; no engine answers so."""
    seed: int
    counts: Counts
    log: list[str]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def continued(ray_cluster: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ContinuedJob:
    directory = tmp_path_factory.mktemp("killed-driver")
    source, output = write_input(directory), directory / "out.jsonl"
    kill_driver_midway(ray_cluster, checkpoint, source, output)
    assert not output.exists()
    job = BatchJob(config(checkpoint, source, output, params=PARAMS, seed=None))
    parts = Path(job.output.partitions_directory(job.record))
    finished = sorted(parts.glob("part-*.jsonl"))
    rows = [row for file in finished for row in read_rows(file)[1:]]
    [first, *_] = [partition for partition in job.input.partitions if partition not in job.remaining]
    marked = [{"row": first.first_row + i, "marked": True} for i in range(first.num_rows)]
    write_rows(parts / first.file, [{"counts": vars(Counts(rows=first.num_rows))}, *marked])
    # A file whose writer was killed.
    (parts / f".{job.remaining[0].file}.1234abcd").write_text('{"counts"')
    log: list[str] = []
    counts = job.run(log.append, lambda line: None)
    return ContinuedJob(rows, marked, job.record.made_from["seed"], counts, log, read_rows(output))


def test_a_killed_driver_loses_and_duplicates_no_row(
    continued: ContinuedJob, expected: list[list[int]]
) -> None:
    assert continued.counts.rows == len(TEXTS)
    assert [row["row"] for row in continued.rows] == list(range(len(TEXTS)))
    unmarked = [row for row in continued.rows if "marked" not in row]
    for row in (*unmarked, *continued.finished_before):
        assert row["prompt"] == TEXTS[row["row"]]
        assert row["completions"][0]["token_ids"] == expected[row["row"]]


def test_partitions_of_a_killed_driver_are_not_answered_again(continued: ContinuedJob) -> None:
    kept = len(continued.finished_before)
    assert kept >= len(continued.marked) == 32
    assert [row for row in continued.rows if "marked" in row] == continued.marked
    assert all(row in continued.rows for row in continued.finished_before[len(continued.marked) :])
    assert continued.log[0].endswith(f"{kept} of them answered before")
    assert f"; {len(TEXTS) - kept} rows in " in continued.log[-1]


def test_a_continued_job_keeps_the_seed(continued: ContinuedJob) -> None:
    assert continued.seed == SEED


def test_an_evaluation_whose_worker_is_killed_has_the_scores_of_one_engine_and_keeps_what_is_finished(
    ray_cluster: str, checkpoint: Path, tmp_path: Path
) -> None:
    requests = [Scoring(tuple((i * j) % 250 for j in range(100)), 60) for i in range(1, 1400)]
    with Engine.from_pretrained(checkpoint, device="cpu") as engine:
        scorer = EngineScorer(str(checkpoint), engine)
        expected = scorer.score(requests)
        worker = EvaluatorConfig(str(checkpoint), str(tmp_path), 1)
        compute = compute_on_cluster(worker, PoolSize(1, 0), {})
        spread = PartedScorer("m", scorer.tokenizer, scorer.max_seq_len, str(tmp_path), compute)
    killed = []

    def kill_first(done: int, total: int) -> None:
        if not killed:
            [victim] = ray_workers("MapWorker(Map(Evaluator))")
            victim.kill()
            killed.append(victim)

    assert spread.score(requests, kill_first) == expected
    assert killed
    first, *others = sorted(tmp_path.iterdir())
    assert len(others) == 2
    written = [file.stat().st_mtime_ns for file in others]
    first.unlink()
    assert spread.score(requests) == expected
    assert [file.stat().st_mtime_ns for file in others] == written
