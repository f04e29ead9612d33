"""Whole jobs on the session's cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_ray.batch_inference.config import BatchConfig, BatchError
from llama_ray.batch_inference.job import BatchJob
from llama_ray.batch_inference.output import Counts
from llama_ray.batch_inference.rows import row_seed
from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.storage import store
from llama_ray.storage.store import StorageError
from tests.batch_inference.conftest import read_rows, write_rows
from tests.object_store import s3_server, uri

JOBS = Path(__file__).parents[2] / "jobs"
DIGITS = {"regex": "[0-9]{3}", "max_tokens": 9, "ignore_eos": False}
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def config(
    checkpoint: Path, source: Path | str, output: Path | str, max_num_seqs: int = 64, **more: Any
) -> BatchConfig:
    engine = EngineOptions(max_num_seqs=max_num_seqs)
    given = {"params": PARAMS, "seed": 1, "engine": engine} | more
    return BatchConfig(str(checkpoint), str(source), str(output), **given)


def silent(line: str) -> None:
    pass


def finished(job: BatchJob) -> Counts:
    return job.run(silent, silent)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"id": f"r{i}", "prompt": f"The quick {i}"} for i in range(100)]
    return write_rows(tmp_path / "in" / "prompts.jsonl", rows)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_one_row_for_each_row_in_order_whatever_is_in_it(checkpoint: Path, tmp_path: Path) -> None:
    rows: list[Any] = [{"id": i, "prompt": "fox", "sampling_params": {"seed": 7}} for i in range(70)]
    rows[3] = '{"prompt": "cut'
    rows[10] = {"id": "long", "prompt": "fox " * 300}
    rows[20] = {"id": "typo", "prompt": "x", "sampling_params": {"temprature": 0}}
    rows[30] = {"id": "huge", "prompt": "x", "sampling_params": {"max_tokens": 1000}}
    rows[33] = {
        "id": "ids",
        "token_ids": [5, 6],
        "sampling_params": {"n": 2, "logprobs": 1, "temperature": 0},
    }
    rows[31] = {"id": "digits", "prompt": "x", "sampling_params": DIGITS}
    rows[34] = {"id": "again", "prompt": "x", "row": 99, "error": "old", "completions": []}
    rows[40] = '{"id": "surrogate", "prompt": "\\ud800"}'
    rows[50] = {"id": "none"}
    rows[69] = {"id": "漢", "prompt": "漢字 🙂", "nested": {"kept": [1, 2.5, None, "\u2028\x85"]}}
    output = tmp_path / "out.jsonl"
    said: list[str] = []
    job = BatchJob(config(checkpoint, write_rows(tmp_path / "in.jsonl", rows), output, replicas=1))
    counts = job.run(said.append, said.append)
    found = read_rows(output)
    assert [row["row"] for row in found] == list(range(70))
    errors = {row["row"]: row["error"] for row in found if "error" in row}
    assert list(errors) == [3, 10, 20, 30, 40, 50]
    for row, message in {
        3: "in.jsonl:4 is not JSON", 10: "shorten the prompt", 20: "'temprature' is not known",
        30: "set max_tokens to at most", 40: "lone surrogate", 50: "neither of 'prompt'",
    }.items():  # fmt: skip
        assert message in errors[row]
        assert "completions" not in found[row]
    assert found[3]["line"] == rows[3]
    assert found[40]["prompt"] == "\ud800"
    assert found[69].items() >= rows[69].items()
    assert "error" not in found[34]
    engine = Engine.from_pretrained(checkpoint, device="cpu")
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=7)
    (expected,) = engine.generate("fox", params)
    assert [row["completions"] for row in found if row["id" if "id" in row else "row"] == 5] == [
        [{"text": expected.text, "finish_reason": "length", "token_ids": expected.token_ids}]
    ]
    assert re.fullmatch("[0-9]{3}", found[31]["completions"][0]["text"])
    both = found[33]["completions"]
    assert len(both) == 2
    assert [entry["token_id"] for entry in both[0]["logprobs"]] == both[0]["token_ids"]
    assert counts.rows == 70
    assert counts.errors == 6
    assert counts.generated_tokens == 64 * 6 + len(found[31]["completions"][0]["token_ids"])
    assert "70 of 70 rows, 6 errors" in said[-2]
    assert "70 rows, 6 of them errors" in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.job.json"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_answers_are_the_same_for_any_number_of_replicas(
    checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    contents = []
    for replicas, batch in ((1, 4), (3, 16)):
        output = tmp_path / f"{replicas}.jsonl"
        finished(BatchJob(config(checkpoint, prompts, output, replicas=replicas, max_num_seqs=batch)))
        contents.append(output.read_bytes())
    assert contents[0] == contents[1]
    answers = {row["completions"][0]["text"] for row in read_rows(tmp_path / "1.jsonl")}
    assert len(answers) > 90  # no two rows have one seed


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_worker_costs_no_row_and_doubles_none(checkpoint: Path, tmp_path: Path) -> None:
    texts = [f"fox {i}" for i in range(130)]
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": text} for text in texts])
    params = SamplingParams(max_tokens=80, ignore_eos=True)
    output = tmp_path / "out.jsonl"
    job = BatchJob(config(checkpoint, source, output, params=params, replicas=1, max_num_seqs=4))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(finished, job)
        wait_for(lambda: running.done() or len(job.remaining) < len(job.rows.parts))
        assert not running.done()
        (victim,) = replicas_of_this_session()
        victim.kill()
        assert running.result().rows == 130
    assert [(row["row"], row["prompt"]) for row in read_rows(output)] == list(enumerate(texts))
    assert [row["completions"][0]["token_ids"] for row in read_rows(output)] == alone(
        checkpoint, texts, params
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_rows_and_answers_on_an_object_store(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"The {i}"} for i in range(50)]
    local = tmp_path / "out.jsonl"
    here = write_rows(tmp_path / "in.jsonl", rows)
    finished(BatchJob(config(checkpoint, here, local)))
    with s3_server() as port:
        store.upload(here, uri(port, "in/a.jsonl"))
        remote = config(checkpoint, uri(port, "in"), uri(port, "answers/out.jsonl"))
        job = BatchJob(remote)
        assert finished(job).rows == 50
        assert store.read_text(remote.output) == local.read_text()
        assert store.list_files(uri(port, "answers")) == ["out.jsonl", "out.jsonl.job.json"]
        assert BatchJob(remote).finished == job.finished


@pytest.mark.ray
def test_a_killed_driver_costs_no_row_and_doubles_none(
    checkpoint: Path, tmp_path: Path, ray_cluster: str
) -> None:
    texts = [f"fox {i}" for i in range(130)]
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": text} for text in texts])
    params = SamplingParams(max_tokens=80, ignore_eos=True, temperature=0.8, top_k=40, top_p=0.9)
    output = tmp_path / "out.jsonl"
    driver = subprocess.Popen(
        [
            sys.executable, str(JOBS / "generate.py"), "--checkpoint", str(checkpoint), "--input", str(source),
            "--output", str(output), "--max_tokens", "80", "--ignore_eos", "--seed", "1", "--replicas", "1",
            "--max_num_seqs", "4",
        ],
        env={**os.environ, "RAY_ADDRESS": ray_cluster},
    )  # fmt: skip
    parts = Path(f"{output}.parts")
    wait_for(lambda: driver.poll() is not None or any(parts.glob("*/part-*.jsonl")))
    assert driver.poll() is None
    driver.kill()
    driver.wait()
    assert not output.exists()
    kept = [json.loads(row) for file in parts.glob("*/part-*") for row in file.read_text().splitlines()[1:]]
    assert len(kept) >= 32
    job = BatchJob(config(checkpoint, source, output, params=params))
    assert sum(part.rows for part in job.remaining) <= 130 - len(kept)
    assert finished(job).rows == 130
    found = read_rows(output)
    assert [(row["row"], row["prompt"]) for row in found] == list(enumerate(texts))
    assert all(found[row["row"]] == row for row in kept)
    assert [row["completions"][0]["token_ids"] for row in found] == alone(checkpoint, texts, params)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_only_what_is_missing_is_done_again(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    finished(BatchJob(config(checkpoint, prompts, first, seed=None)))
    seed = json.loads(Path(f"{first}.job.json").read_text())["made_from"]["seed"]
    # Parts of a job that was killed: made by the library, with a mark that only a kept part can still have.
    job = BatchJob(config(checkpoint, prompts, second, seed=seed))
    done = Path(job.output.parts_of(job.record))
    kept = job.rows.parts[1]
    marked = [{"row": kept.first_row + i, "kept": True} for i in range(kept.rows)]
    write_rows(done / kept.file, [{"counts": vars(Counts(rows=kept.rows))}, *marked])
    (done / f".{job.rows.parts[2].file}.1234abcd").write_text('{"counts"')  # its writer was killed
    said: list[str] = []
    again = BatchJob(config(checkpoint, prompts, second, seed=None))
    assert [part.index for part in again.remaining] == [0, 2, 3]
    again.run(said.append, silent)
    assert said[0].endswith("32 of them answered before")
    assert "; 68 rows in " in said[-1]
    found, expected = read_rows(second), read_rows(first)
    assert found[32:64] == marked
    assert found[:32] + found[64:] == expected[:32] + expected[64:]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_is_complete_stays_and_what_is_another_job_is_refused(
    checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    plain = config(checkpoint, prompts, output)
    counts = finished(BatchJob(plain))
    before = output.stat().st_mtime_ns
    assert BatchJob(plain).finished == counts
    assert BatchJob(config(checkpoint, prompts, output, replicas=2, max_num_seqs=2)).finished == counts
    assert output.stat().st_mtime_ns == before
    hotter = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.5)
    for other, message in (
        ({"params": hotter}, r"another temperature \(1.0, now 0.5\): .* --overwrite"),
        ({"seed": 2}, r"another seed \(1, now 2\)"),
        ({"dtype": "bfloat16"}, "another dtype"),
        ({"prompt_field": "text"}, "another prompt_field"),
    ):
        with pytest.raises(BatchError, match=message):
            BatchJob(config(checkpoint, prompts, output, **other))
    write_rows(prompts, [{"prompt": "other"}])
    with pytest.raises(
        BatchError, match=r"made with another input: choose another --output, or give --overwrite"
    ):
        BatchJob(plain)
    with pytest.raises(ValueError, match="replicas is 5"):
        finished(BatchJob(config(checkpoint, prompts, output, overwrite=True, replicas=5)))
    assert len(read_rows(output)) == 100  # what cannot run replaces nothing
    Path(f"{output}.job.json").write_text("{")
    with pytest.raises(StorageError, match=r"cannot be read .* --overwrite"):
        BatchJob(config(checkpoint, prompts, output))
    assert finished(BatchJob(config(checkpoint, prompts, output, overwrite=True))).rows == 1
    assert [row["prompt"] for row in read_rows(output)] == ["other"]


def test_outputs_that_cannot_be_used(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    taken = write_rows(tmp_path / "taken.jsonl", [{"precious": 1}])
    with pytest.raises(BatchError, match="exists and is not a batch job's"):
        BatchJob(config(checkpoint, prompts, taken))
    assert read_rows(taken) == [{"precious": 1}]
    with pytest.raises(StorageError, match="is a directory"):
        BatchJob(config(checkpoint, prompts, tmp_path))
    with pytest.raises(StorageError, match="cannot write to output"):
        BatchJob(config(checkpoint, prompts, taken / "below.jsonl"))
    with pytest.raises(StorageError, match="cannot write to output"):
        BatchJob(config(checkpoint, prompts, "nowhere://x/out.jsonl"))


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(BatchError, match=r"device is 'cuda:1'.* it must be cpu or cuda"):
        config(Path("c"), "i", "o", device="cuda:1")
    with pytest.raises(ValueError, match="max_num_seqs is 0; it must be at least 1"):
        config(Path("c"), "i", "o", max_num_seqs=0)
    with pytest.raises(BatchError, match="replicas is 0; it must be at least 1"):
        config(Path("c"), "i", "o", replicas=0)


def test_another_checkpoint_in_the_same_place_is_another_job(
    checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(checkpoint, tmp_path / "model")
    BatchJob(config(mine, prompts, tmp_path / "out.jsonl"))
    BatchJob(config(checkpoint, prompts, tmp_path / "out.jsonl"))  # a copy is no other one
    weights = next(mine.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BatchError, match="partly made with another checkpoint: "):
        BatchJob(config(mine, prompts, tmp_path / "out.jsonl"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_more_than_the_cluster_has_is_refused(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="replicas is 5, but this cluster has at most 4 CPUs"):
        finished(BatchJob(config(checkpoint, prompts, tmp_path / "a.jsonl", replicas=5)))
    with pytest.raises(BatchError, match="device is cuda, but this cluster has no GPU"):
        finished(BatchJob(config(checkpoint, prompts, tmp_path / "a.jsonl", device="cuda")))


def alone(checkpoint: Path, texts: list[str], params: SamplingParams) -> list[list[int]]:
    """The token ids of each row from one engine that nobody disturbs."""
    engine = Engine.from_pretrained(checkpoint, device="cpu")
    ids = [engine.submit(text, replace(params, seed=row_seed(1, row))) for row, text in enumerate(texts)]
    tokens: dict[int, list[int]] = defaultdict(list)
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    return [tokens[request_id] for request_id in ids]


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def replicas_of_this_session() -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "MapWorker(Map(Replica))" in " ".join(process.cmdline())]
