"""The tasks of a preparation: read and clean the texts of a part, tokenise them and write a shard a split."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from llama_ray.data.cleaning.drops import Drop
from llama_ray.data.cleaning.duplicates.groups import Duplicates
from llama_ray.data.cleaning.duplicates.keys import keys_of, write_keys
from llama_ray.data.conversations.config import ConversationConfig
from llama_ray.data.dataset.info import SPLITS
from llama_ray.data.dataset.shards import DatasetError, ShardWriter, shard_name, token_bytes
from llama_ray.data.preparing.bad_records import BadRecords, TooManyBadRecordsError, bad_file
from llama_ray.data.preparing.encoding import ConversationEncoder
from llama_ray.data.preparing.kept import KeptWriter, Taken, read_kept
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.part_record import PartRecord, Stage, read_record
from llama_ray.data.preparing.parts import Part
from llama_ray.data.preparing.reading import Reading, read_documents
from llama_ray.data.preparing.row_writer import RowWriter
from llama_ray.data.preparing.split_writer import SplitWriter
from llama_ray.data.preparing.splits import Range, number_of, split_of
from llama_ray.data.report.statistics import Statistics
from llama_ray.data.tokenizing.encoder import DocumentEncoder, EncoderChoice
from llama_ray.data.tokenizing.tokenizer import Tokenizer

COMPARED = "compared"
"""Folder of the second tokenizer in the staging directory."""


class Identified(Protocol):
    """What has an identifier within the dataset."""

    @property
    def id(self) -> str:
        """The identifier."""


D = TypeVar("D", bound=Identified)
D_contra = TypeVar("D_contra", contravariant=True)


class Writer(Protocol[D_contra]):
    """Writes the documents of one split of a part as a shard."""

    statistics: Statistics
    compared_tokens: int

    def add(self, document: D_contra, /) -> None:
        """Append a document."""

    def flush(self) -> None:
        """Write what waits; call it at the end."""


@dataclass(frozen=True)
class Job:
    """What all tasks of a preparation need: its settings, and the directory that holds its tokenizers.

    `compared` is the fingerprint of the second tokenizer, or empty. `conversations` says how those become rows; None
    where texts are prepared. With `pairs` they are pairs of answers.
    """

    directory: str
    reading: Reading
    limit: float
    max_bad_records: int
    tokenizer: str
    encoder: EncoderChoice
    compared: str = ""
    conversations: ConversationConfig | None = None
    pairs: bool = False


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


def clean_part(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """Write the cleaned texts of the part of a row from `task_row`, and their keys; runs in a Ray worker.

    Returns the fields of a `TaskResult`.
    """
    return _run("cleaned", row, job, _clean)


def tokenise_part(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """Write the shards of the part of a row from `task_row`; runs in a Ray worker.

    Returns the fields of a `TaskResult`.
    """
    return _run("tokenised", row, job, _tokenise)


def kept_file(work: Path, part: int) -> Path:
    """Return the file for the cleaned texts of a part."""
    return work / f"kept-{part:05d}.arrow"


def key_file(work: Path, part: int) -> Path:
    """Return the file for the keys of the cleaned texts of a part."""
    return work / f"keys-{part:05d}.npy"


def duplicates_file(work: Path) -> Path:
    """Return the file that says which texts are duplicates."""
    return work / "duplicates.npy"


def _run(
    stage: Stage,
    row: dict[str, Any],
    job: Job,
    work: Callable[[Part, Job, PartRecord, BadRecords], PartRecord],
) -> dict[str, Any]:
    """Do the `work` of a task, write its record, and turn errors that the user can correct into a result."""
    # A task has one CPU; the tokenizer would start a thread for each core of the machine.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    part = Part.from_json(row["part"])
    staging = Path(job.directory)
    bad_records, given_up, message = 0, False, ""
    try:
        with BadRecords(bad_file(staging / WORK, stage, part.index), job.max_bad_records) as bad:
            try:
                record = work(part, job, PartRecord(job.limit), bad)
            except TooManyBadRecordsError:
                given_up, bad_records = True, bad.count
        if not given_up:
            record.write(staging, stage, part.index)
            bad_records = record.bad_records
    except ValueError as error:
        message = str(error)
    except OSError as error:
        message = f"cannot write to {staging} on a worker ({error}); free space or choose another output"
    return TaskResult(part.index, bad_records, given_up, message)._asdict()


def _clean(part: Part, job: Job, record: PartRecord, bad: BadRecords) -> PartRecord:
    work = Path(job.directory) / WORK
    method: Any = job.reading.cleaning.dedup
    keys = []
    with KeptWriter(kept_file(work, part.index)) as kept:
        for taken in read_documents(part.source, part.pieces, job.reading, record, bad):
            keys.append(keys_of(taken.text, method))
            kept.add(taken)
    write_keys(key_file(work, part.index), keys, method)
    record.bad_records = bad.count
    return record


def _tokenise(part: Part, job: Job, record: PartRecord, bad: BadRecords) -> PartRecord:
    directory = Path(job.directory)
    if job.reading.cleaning.dedup == "none":
        documents = read_documents(part.source, part.pieces, job.reading, record, bad)
    else:
        record = replace(read_record(directory, "cleaned", part.index), limit=job.limit)
        documents = _without_duplicates(part, job, record)
    tokenizer = _load_tokenizer(job.directory, job.tokenizer)
    width = token_bytes(tokenizer.vocab_size)
    with ExitStack() as open:
        shards = {
            split: ShardWriter(
                directory / shard_name(split, part.index),
                width,
                source=part.source,
                masks=job.conversations is not None,
            )
            for split in SPLITS
        }
        for shard in shards.values():
            open.enter_context(shard)
        if job.conversations is None:
            _write(documents, _text_writers(part, job, shards), job, record)
        else:
            encoder = ConversationEncoder(part, tokenizer, job.conversations, record, bad, pairs=job.pairs)
            _write(encoder.encode(documents), _row_writers(part, encoder, shards), job, record)
    record.shards = {split: shard.shard for split, shard in shards.items() if shard.shard is not None}
    record.bad_records += bad.count
    return record


def _write(documents: Iterable[D], writers: Mapping[str, Writer[D]], job: Job, record: PartRecord) -> None:
    """Give each document to the writer of its split, and count them into `record`."""
    for document in documents:
        number = number_of(job.reading.seed, document.id)
        record.numbers = (record.numbers or Range()) | Range(number, number)
        writers[split_of(number, job.limit)].add(document)
    for split, writer in writers.items():
        writer.flush()
        record.statistics[split] = writer.statistics
    record.compared_tokens = writers["validation"].compared_tokens


def _text_writers(part: Part, job: Job, shards: Mapping[str, ShardWriter]) -> dict[str, SplitWriter]:
    encoder = _load_encoder(job.directory, job.tokenizer, job.encoder)
    compared = _load_encoder(str(Path(job.directory) / COMPARED), job.compared) if job.compared else None
    return {
        split: SplitWriter(shard, part.source, encoder, compared if split == "validation" else None)
        for split, shard in shards.items()
    }


def _row_writers(
    part: Part, encoder: ConversationEncoder, shards: Mapping[str, ShardWriter]
) -> dict[str, RowWriter]:
    return {
        split: RowWriter(shard, part.source, encoder.row_tokens, encoder.padding)
        for split, shard in shards.items()
    }


def _without_duplicates(part: Part, job: Job, record: PartRecord) -> Iterator[Taken]:
    """Yield the cleaned texts of a part that repeat no earlier one, and count the others into `record`."""
    work = Path(job.directory) / WORK
    repeated = Duplicates(duplicates_file(work)).of_part(part.index)
    for row, taken in enumerate(read_kept(kept_file(work, part.index))):
        if row in repeated:
            rule = f"dedup/{job.reading.cleaning.dedup}"
            record.drops.add(part.source, taken.id, Drop(rule, "text", 1, len(taken.text), taken.text))
        else:
            yield taken


@functools.lru_cache(maxsize=2)
def _load_encoder(directory: str, fingerprint: str, choice: EncoderChoice | None = None) -> DocumentEncoder:
    # The ids are the same without the fast library, of which a node may have another version, or none.
    fast = choice is not None and choice.fast and choice.is_installed
    return DocumentEncoder(_load_tokenizer(directory, fingerprint), fast)


@functools.lru_cache(maxsize=2)
def _load_tokenizer(directory: str, fingerprint: str) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    if tokenizer.fingerprint != fingerprint:
        raise DatasetError(
            f"{directory} holds another tokenizer on a worker; give an --output on storage that all nodes share"
        )
    return tokenizer
