"""From the pieces of a corpus to a dataset in the output directory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llama_ray.data.dataset.info import SPLITS, DatasetInfo
from llama_ray.data.dataset.shards import token_bytes
from llama_ray.data.preparing.bad_records import BAD_RECORDS_FILE, bad_file, join, too_many
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.corpus import Corpus, reasons
from llama_ray.data.preparing.output_directory import WORK, publish, remove
from llama_ray.data.preparing.part_record import any_done, done_before, read_record
from llama_ray.data.preparing.part_task import Job, TaskResult, task_row, write_part
from llama_ray.data.preparing.parts import Part, divide
from llama_ray.data.preparing.progress import Log, Progress
from llama_ray.data.preparing.ray_tasks import run_tasks
from llama_ray.data.preparing.reading import Reading
from llama_ray.data.preparing.splits import changes_split, limit_for
from llama_ray.data.preparing.summary import Summary, settings, versions
from llama_ray.data.preparing.tokenizer_sample import TokenizerSample
from llama_ray.data.preparing.tokenizers import GivenTokenizers, make_tokenizer
from llama_ray.data.report.page import write_report
from llama_ray.data.sources.files import SourceError
from llama_ray.utils.errors import printable


def make_dataset(
    config: PrepareConfig,
    corpus: Corpus,
    given: GivenTokenizers,
    fingerprint: str,
    staging: Path,
    log: Log,
) -> DatasetInfo:
    """Make and publish a dataset by way of `staging`, and go on with what is done there.

    If it fails before a part is done, `staging` is removed; else the same preparation, started again, goes on.
    """
    try:
        return _make(config, corpus, given, fingerprint, staging, log)
    except KeyboardInterrupt:
        log(f"stopped; the same command goes on from {staging}")
        raise
    except Exception:
        if not any_done(staging):
            remove(staging)
        raise


def _make(
    config: PrepareConfig,
    corpus: Corpus,
    given: GivenTokenizers,
    fingerprint: str,
    staging: Path,
    log: Log,
) -> DatasetInfo:
    reading = Reading(config.fields(), config.cleaning, config.seed)
    sample = TokenizerSample(
        corpus,
        reading,
        staging,
        Path(config.output),
        limit=config.validation_fraction,
        max_bad_records=config.max_bad_records,
        shares=config.weights(),
    )
    tokenizer, encoder = make_tokenizer(config, given, sample, staging, log)
    job = Job(
        directory=str(staging),
        reading=reading,
        limit=config.validation_fraction,
        max_bad_records=config.max_bad_records,
        tokenizer=tokenizer.fingerprint,
        fast=encoder.fast,
        compared=given.compared.fingerprint if given.compared else "",
    )
    parts = divide(corpus, config.shard_bytes)
    summary = _run(config, corpus, parts, job, log)
    join((bad_file(staging / WORK, part.index) for part in parts), staging / BAD_RECORDS_FILE)
    info = DatasetInfo(
        fingerprint=fingerprint,
        seed=config.seed,
        token_bytes=token_bytes(tokenizer.vocab_size),
        tokenizer=summary.tokenizer(config, tokenizer, encoder),
        sources=summary.sources(),
        splits={split: tuple(summary.shards[split]) for split in SPLITS},
        settings=settings(config),
        versions=versions(),
    )
    for line in summary.lines(info):
        log(line)
    write_report(staging, info, summary.statistics, summary.drops)
    return publish(staging, Path(config.output), info)


def _run(config: PrepareConfig, corpus: Corpus, parts: Sequence[Part], job: Job, log: Log) -> Summary:
    """Write all parts, and those again of which both splits must have a text."""
    _write(config, parts, job, log)
    directory = Path(job.directory)
    summary = _summed(corpus, parts, directory)
    try:
        limit = limit_for(job.limit, summary.numbers)
    except ValueError as error:
        texts = sum(summary.documents(split) for split in SPLITS)
        raise SourceError(
            f"{printable(', '.join(config.source))!r} has {'1 text' if texts else 'no text'}"
            f"{reasons(summary.left_out)}; training and validation need one each; give more text"
        ) from error
    if limit == job.limit:
        return summary
    changed = [
        part
        for part in parts
        if (numbers := read_record(directory, part.index).numbers)
        and changes_split(numbers, job.limit, limit)
    ]
    _write(config, changed, replace(job, limit=limit), lambda line: None)
    return _summed(corpus, parts, directory)


def _write(config: PrepareConfig, parts: Sequence[Part], job: Job, log: Log) -> None:
    """Write the shards and records of those parts that are not done."""
    directory = Path(job.directory)
    done: list[Part] = []
    waiting: list[Part] = []
    for part in parts:
        (done if done_before(directory, part.index, job.limit) else waiting).append(part)
    progress = Progress("tokenised", len(parts), sum(part.size for part in parts), log)
    if done:
        log(f"going on: {len(done):,} of {len(parts):,} parts were done before")
        progress.skip(len(done), sum(part.size for part in done))
    bad = sum(read_record(directory, part.index).bad_records for part in done)
    by_index = {part.index: part for part in waiting}
    tokens = 0
    results = run_tasks(
        functools.partial(write_part, job=job), [task_row(part) for part in waiting], config.workers
    )
    for result in (TaskResult(**row) for row in results):
        if result.error:
            raise SourceError(result.error)
        bad += result.bad_records
        if bad > config.max_bad_records:
            files = (bad_file(directory / WORK, part.index) for part in parts)
            raise too_many(bad, config.max_bad_records, files, Path(config.output))
        record = read_record(directory, result.part)
        tokens += sum(shard.tokens for shard in record.shards.values())
        progress.add(by_index[result.part].size, f", {tokens:,} tokens")


def _summed(corpus: Corpus, parts: Sequence[Part], directory: Path) -> Summary:
    summary = Summary(corpus)
    for part in parts:
        summary.add(part, read_record(directory, part.index))
    return summary
