"""From the pieces of a corpus to a dataset in the output directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llama_ray.data.cleaning.contamination import write_evaluations
from llama_ray.data.dataset.info import SPLITS, DatasetInfo
from llama_ray.data.dataset.shards import token_bytes
from llama_ray.data.preparing.bad_records import BAD_RECORDS_FILE, join
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.corpus import Corpus, reasons
from llama_ray.data.preparing.deduplicating import find_duplicates
from llama_ray.data.preparing.output_directory import WORK, publish, remove
from llama_ray.data.preparing.part_record import any_done, read_record
from llama_ray.data.preparing.part_task import Job, tokenise_part
from llama_ray.data.preparing.parts import Part, divide
from llama_ray.data.preparing.passes import bad_files, run_pass
from llama_ray.data.preparing.progress import Log
from llama_ray.data.preparing.reading import Reading
from llama_ray.data.preparing.splits import changes_split, limit_for
from llama_ray.data.preparing.summary import Summary, settings, versions
from llama_ray.data.preparing.tokenizer_sample import TokenizerSample
from llama_ray.data.preparing.tokenizers import GivenTokenizers, make_tokenizer
from llama_ray.data.report.page import write_report
from llama_ray.data.sources.files import SourceError
from llama_ray.data.tokenizing.tokenizer import Tokenizer
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
    with _kept_if_begun(staging, log):
        job, tokenizer = _plan(config, corpus, given, staging, log)
        parts = divide(corpus, config.shard_bytes)
        summary = _run(config, corpus, parts, job, log)
        join(bad_files(staging, parts), staging / BAD_RECORDS_FILE)
        info = DatasetInfo(
            fingerprint=fingerprint,
            seed=config.seed,
            token_bytes=token_bytes(tokenizer.vocab_size),
            tokenizer=summary.tokenizer(config, tokenizer, job.encoder),
            sources=summary.sources(),
            splits={split: tuple(summary.shards[split]) for split in SPLITS},
            settings=settings(config),
            versions=versions(),
            task=config.task,
            row_tokens=config.row_tokens,
            end_of_turn_ids=tuple(sorted(tokenizer.end_of_turn_ids())) if config.row_tokens else (),
        )
        for line in summary.lines(info):
            log(line)
        write_report(staging, info, summary.statistics, summary.drops)
        return publish(staging, Path(config.output), info)


def _plan(
    config: PrepareConfig, corpus: Corpus, given: GivenTokenizers, staging: Path, log: Log
) -> tuple[Job, Tokenizer]:
    """Return what all tasks need to know, and the tokenizer, which `staging` then holds."""
    reading = Reading(config.fields(), config.cleaning, config.seed, _evaluations(config, staging, log))
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
        encoder=encoder,
        compared=given.compared.fingerprint if given.compared else "",
        conversations=None if config.row_tokens is None else config.conversations,
        pairs=config.task == "dpo",
    )
    return job, tokenizer


@contextmanager
def _kept_if_begun(staging: Path, log: Log) -> Iterator[None]:
    """Remove `staging` where the block fails before a part is done, and say how to go on where it is stopped."""
    try:
        yield
    except KeyboardInterrupt:
        log(f"stopped; the same command goes on from {staging}")
        raise
    except Exception:
        if not any_done(staging):
            remove(staging)
        raise


def _evaluations(config: PrepareConfig, staging: Path, log: Log) -> str:
    """Write what the evaluations hold, of which texts must be clean, and return the file's path; empty without any."""
    if not config.cleaning.decontaminate:
        return ""
    file = staging / WORK / "evaluations.npy"
    if not file.exists():
        found = write_evaluations(
            config.cleaning.decontaminate, config.cleaning.decontaminate_words, file, config.cleaning.unicode
        )
        log(found.line())
    return str(file)


def _run(config: PrepareConfig, corpus: Corpus, parts: Sequence[Part], job: Job, log: Log) -> Summary:
    """Tokenise all parts, and those again of which both splits must have a text."""
    if config.cleaning.dedup != "none":
        find_duplicates(config, parts, job, log)
    run_pass("tokenised", tokenise_part, config, parts, job, log)
    directory = Path(job.directory)
    summary = _summed(corpus, parts, directory)
    try:
        limit = limit_for(job.limit, summary.numbers)
    except ValueError as error:
        texts = sum(summary.documents(split) for split in SPLITS)
        raise SourceError(
            f"{printable(', '.join(config.source))!r} has {'1' if texts else 'no'} {config.unit}"
            f"{reasons(summary.left_out)}; training and validation need one each; give more"
        ) from error
    if limit == job.limit:
        return summary
    changed = [
        part
        for part in parts
        if (numbers := read_record(directory, "tokenised", part.index).numbers)
        and changes_split(numbers, job.limit, limit)
    ]
    run_pass("tokenised", tokenise_part, config, changed, replace(job, limit=limit), lambda line: None)
    return _summed(corpus, parts, directory)


def _summed(corpus: Corpus, parts: Sequence[Part], directory: Path) -> Summary:
    summary = Summary(corpus)
    for part in parts:
        summary.add(part, read_record(directory, "tokenised", part.index))
    return summary
