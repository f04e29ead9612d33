"""One pass over the parts of a preparation, each in a task of its own, but for those that are done."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from llama_ray.data.preparing.bad_records import bad_file, too_many
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.part_record import STAGES, Stage, done_before, read_record
from llama_ray.data.preparing.part_task import Job, TaskResult, task_row
from llama_ray.data.preparing.parts import Part
from llama_ray.data.preparing.progress import Log, Progress
from llama_ray.data.preparing.ray_tasks import run_tasks
from llama_ray.data.sources.files import SourceError


class PartTask(Protocol):
    """A task of `part_task`."""

    def __call__(self, row: dict[str, Any], job: Job) -> dict[str, Any]:
        """Work on the part of a row from `task_row`, and return the fields of a `TaskResult`."""


def run_pass(
    stage: Stage,
    task: PartTask,
    config: PrepareConfig,
    parts: Sequence[Part],
    job: Job,
    log: Log,
) -> None:
    """Run `task`, which writes a record of this `stage`, for all parts that lack it.

    Raises SourceError for the first error of a task, and as soon as there are too many bad records.
    """
    staging = Path(job.directory)
    done: list[Part] = []
    waiting: list[Part] = []
    for part in parts:
        (done if done_before(staging, stage, part.index, job.limit) else waiting).append(part)
    progress = Progress(stage, len(parts), sum(part.size for part in parts), log)
    if done:
        log(f"going on: {len(done):,} of {len(parts):,} parts were {stage} before")
        progress.skip(len(done), sum(part.size for part in done))
    bad = sum(read_record(staging, stage, part.index).bad_records for part in done)
    _check_bad(bad, config, parts, staging)
    sizes = {part.index: part.size for part in waiting}
    tokens = 0
    results = run_tasks(
        functools.partial(task, job=job), [task_row(part) for part in waiting], config.workers
    )
    for result in (TaskResult(**row) for row in results):
        if result.error:
            raise SourceError(result.error)
        bad += result.bad_records
        _check_bad(bad, config, parts, staging)
        record = read_record(staging, stage, result.part)
        tokens += sum(shard.tokens for shard in record.shards.values())
        progress.add(sizes[result.part], f", {tokens:,} tokens" if tokens else "")


def bad_files(staging: Path, parts: Sequence[Part]) -> Iterator[Path]:
    """Yield the files that may hold the bad records of some parts."""
    for part in parts:
        for stage in STAGES:
            yield bad_file(staging / WORK, stage, part.index)


def _check_bad(bad: int, config: PrepareConfig, parts: Sequence[Part], staging: Path) -> None:
    if bad > config.max_bad_records:
        raise too_many(bad, config.max_bad_records, bad_files(staging, parts), Path(config.output))
