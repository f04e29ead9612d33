"""One task of a preparation: read the texts of a part, clean them, tokenise them and write a shard a split."""

from __future__ import annotations

import functools
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama_ray.data.dataset.info import SPLITS
from llama_ray.data.dataset.shards import DatasetError, ShardWriter, shard_name, token_bytes
from llama_ray.data.preparing.bad_records import BadRecords, TooManyBadRecordsError, bad_file
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.part_record import PartRecord
from llama_ray.data.preparing.parts import Part
from llama_ray.data.preparing.reading import Reading, read_documents
from llama_ray.data.preparing.split_writer import SplitWriter
from llama_ray.data.preparing.splits import split_of
from llama_ray.data.tokenizing.encoder import DocumentEncoder
from llama_ray.data.tokenizing.tokenizer import Tokenizer

COMPARED = "compared"
"""Folder of the second tokenizer in the staging directory."""


@dataclass(frozen=True)
class Job:
    """What all tasks of a preparation need: its settings, and the directory that holds its tokenizers.

    `compared` is the fingerprint of the second tokenizer, or empty. `fast` is that of `EncoderChoice`.
    """

    directory: str
    reading: Reading
    limit: float
    max_bad_records: int
    tokenizer: str
    fast: bool
    compared: str = ""


class TaskResult(NamedTuple):
    """What the driver learns at once of a part; the rest is in its `PartRecord`.

    `error` is a message for the user, or empty: Ray would wrap an exception into a page of traceback. `bad_records`
    counts those that were found, also where the part was given up because of them.
    """

    part: int
    bad_records: int = 0
    given_up: bool = False
    error: str = ""


def task_row(part: Part) -> dict[str, str]:
    """Return a row of Ray Data: a part."""
    # JSON, because Ray Data would turn nested values into Arrow types.
    return {"part": part.to_json()}


def write_part(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """Make the part of a row from `task_row` into shards and a record; runs in a Ray worker.

    Returns the fields of a `TaskResult`.
    """
    # A task has one CPU; the tokenizer would start a thread for each core of the machine.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    part = Part.from_json(row["part"])
    record = PartRecord(job.limit)
    directory = Path(job.directory)
    result = TaskResult(part.index)
    try:
        with BadRecords(bad_file(directory / WORK, part.index), job.max_bad_records) as bad:
            try:
                _write_shards(part, job, record, bad)
            except TooManyBadRecordsError:
                return result._replace(bad_records=bad.count, given_up=True)._asdict()
        record.bad_records = bad.count
        record.write(directory, part.index)
        result = result._replace(bad_records=bad.count)
    except ValueError as error:
        result = result._replace(error=str(error))
    except OSError as error:
        result = result._replace(
            error=f"cannot write to {directory} on a worker ({error}); free space or choose another output"
        )
    return result._asdict()


def _write_shards(part: Part, job: Job, record: PartRecord, bad: BadRecords) -> None:
    directory = Path(job.directory)
    tokenizer, encoder = _load_encoder(job.directory, job.tokenizer, job.fast)
    compare = _load_encoder(str(directory / COMPARED), job.compared, False)[1] if job.compared else None
    width = token_bytes(tokenizer.vocab_size)
    with ExitStack() as open:
        shards = {
            split: ShardWriter(directory / shard_name(split, part.index), width, source=part.source)
            for split in SPLITS
        }
        writers = {
            split: SplitWriter(
                open.enter_context(shard), part.source, encoder, compare if split == "validation" else None
            )
            for split, shard in shards.items()
        }
        for number, id, text, language in read_documents(part.source, part.pieces, job.reading, record, bad):
            writers[split_of(number, job.limit)].add(id, text, language)
        for writer in writers.values():
            writer.flush()
    record.shards = {split: shard.shard for split, shard in shards.items() if shard.shard is not None}
    record.statistics = {split: writer.statistics for split, writer in writers.items()}
    record.compared_tokens = writers["validation"].compared_tokens


@functools.lru_cache(maxsize=2)
def _load_encoder(directory: str, fingerprint: str, fast: bool) -> tuple[Tokenizer, DocumentEncoder]:
    tokenizer = Tokenizer.load(directory)
    if tokenizer.fingerprint != fingerprint:
        raise DatasetError(
            f"{directory} holds another tokenizer on a worker; give an --output on storage that all nodes share"
        )
    return tokenizer, DocumentEncoder(tokenizer, fast)
