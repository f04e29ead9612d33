"""What a job checks before it starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_ray.batch_inference.config import BatchError
from llama_ray.batch_inference.job import BatchJob
from llama_ray.storage.store import StorageError
from tests.batch_inference.helpers import config, read_rows, run, write_rows


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 5}, "replicas is 5, but this cluster has at most 4 CPUs"),
        ({"device": "cuda"}, "device is cuda, but this cluster has no GPU"),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    checkpoint: Path, prompts: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(BatchJob(config(checkpoint, prompts, tmp_path / "out.jsonl", **options)))


def test_a_file_that_is_not_a_batch_jobs_output_is_refused(
    checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    taken = write_rows(tmp_path / "taken.jsonl", [{"precious": 1}])
    with pytest.raises(BatchError, match="exists and is not a batch job's"):
        BatchJob(config(checkpoint, prompts, taken))
    assert read_rows(taken) == [{"precious": 1}]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (lambda directory: directory, "is a directory"),
        (lambda directory: write_rows(directory / "file", []) / "below.jsonl", "cannot write to output"),
        (lambda directory: "nowhere://x/out.jsonl", "cannot write to output"),
    ],
    ids=["directory", "below a file", "unknown scheme"],
)
def test_a_location_that_cannot_be_written_is_refused(
    checkpoint: Path, prompts: Path, tmp_path: Path, location: Callable[[Path], object], message: str
) -> None:
    with pytest.raises(StorageError, match=message):
        BatchJob(config(checkpoint, prompts, str(location(tmp_path))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:1"}, r"device is 'cuda:1'.* it must be cpu or cuda"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be at least 1"),
        ({"replicas": 0}, "replicas is 0; it must be at least 1"),
    ],
)
def test_a_bad_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(Path("c"), "i", "o", **options)


def test_a_checkpoint_with_other_weights_is_another_job(
    checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    mine, output = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "out.jsonl"
    BatchJob(config(mine, prompts, output))
    # A copy elsewhere is the same checkpoint.
    BatchJob(config(checkpoint, prompts, output))
    weights = next(mine.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BatchError, match="partly made with another checkpoint; "):
        BatchJob(config(mine, prompts, output))


def test_a_job_without_a_seed_draws_one_and_keeps_it(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    def drawn_seed(name: str) -> int:
        output = tmp_path / name
        BatchJob(config(checkpoint, prompts, output, seed=None))
        return json.loads(Path(f"{output}.job.json").read_text())["made_from"]["seed"]

    first = drawn_seed("a.jsonl")
    assert drawn_seed("a.jsonl") == first
    assert drawn_seed("b.jsonl") != first
