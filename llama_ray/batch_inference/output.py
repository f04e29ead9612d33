"""What a job leaves on storage: its record, the files of finished partitions, and the one file with all answers.

Beside the output `out.jsonl` there are `out.jsonl.job.json`, which says what the output is made from, and
`out.jsonl.parts/` until it is complete. The content of a partition's file depends only on the job, so it does not
matter which replica writes it, how often, or which one was killed in between.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pyarrow import fs

from llama_ray.batch_inference import partition_file
from llama_ray.batch_inference.partition_file import Counts
from llama_ray.batch_inference.partitions import Partition
from llama_ray.storage import store
from llama_ray.storage.store import StorageError
from llama_ray.utils.errors import first_line

_RECORD, _PARTS = ".job.json", ".parts"
_FLUSH_EVERY = 64
"""Partitions between two flushes: an object store's stream sends in the background and buffers without a limit."""


@dataclass(frozen=True)
class JobRecord:
    """What an output is made from (name -> value that determines its content), and its counts once it is complete."""

    made_from: dict[str, Any]
    counts: Counts | None = None
    size_bytes: int = 0

    @property
    def key(self) -> str:
        """A name for the job that changes with its input, model and parameters."""
        return hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()[:16]


class Output:
    """The output of one job at `location`, a path or URI."""

    def __init__(self, location: str) -> None:
        self.location = location

    @cached_property
    def _path(self) -> str:
        return store.open_storage(self.location)[1]

    def owns(self, path: str) -> bool:
        """Whether the file with this path on its storage is the output or one of the job's files beside it."""
        own = self._path
        return path in (own, own + _RECORD) or path.startswith(f"{own}{_PARTS}/")

    def record(self) -> JobRecord | None:
        """Return the record beside the output, None if there is none. Raises StorageError if it cannot be read."""
        file = store.beside(self.location, _RECORD)
        try:
            text = store.read_text(file)
            if text is None:
                return None
            content = json.loads(text)
            counts = content["counts"]
            return JobRecord(content["made_from"], counts and Counts(**counts), content["size_bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{file} cannot be read ({first_line(error)}); give --overwrite to start from scratch, or another "
                "--output"
            ) from error

    def size(self) -> int | None:
        """Return the bytes of the output, None if there is none. Raises StorageError if it cannot be used."""
        with self._errors("write to", "choose another --output"):
            filesystem, path = store.open_storage(self.location)
            info = filesystem.get_file_info(path)
        if info.type == fs.FileType.Directory:
            raise StorageError(f"output {self.location} is a directory; give a file in it, such as out.jsonl")
        return int(info.size) if info.type == fs.FileType.File else None

    def start(self, record: JobRecord) -> None:
        """Write the record of a new job; remove the output and partitions of an earlier one. Raises StorageError."""
        with self._errors("write to", "choose another --output"):
            self._remove_partitions()
            self._write_record(record)
            filesystem, path = store.open_storage(self.location)
            if filesystem.get_file_info(path).type == fs.FileType.File:
                filesystem.delete_file(path)

    def partitions_directory(self, record: JobRecord) -> str:
        """Return the directory for the partitions of one job. Late writers of another job use another one."""
        return store.beside(self.location, f"{_PARTS}/{record.key}")

    def finish(self, record: JobRecord, partitions: Sequence[Partition]) -> Counts:
        """Join all partitions in order and return the counts of all. Raises StorageError if one is not whole.

        The record says that the output is complete only once it is; a job that is killed before does this again.
        """
        total, size = Counts(), 0
        directory = self.partitions_directory(record)
        with self._errors("complete", "start the job again"):
            with store.replacing(self.location) as stream:
                for partition in partitions:
                    counts, content = partition_file.read(directory, partition)
                    stream.write(content)
                    total += counts
                    size += len(content)
                    if partition.index % _FLUSH_EVERY == 0:
                        stream.flush()
            self._write_record(JobRecord(record.made_from, total, size))
            self._remove_partitions()
        return total

    def _write_record(self, record: JobRecord) -> None:
        text = json.dumps(asdict(record), indent=2, sort_keys=True) + "\n"
        store.write_text(store.beside(self.location, _RECORD), text)

    def _remove_partitions(self) -> None:
        filesystem, path = store.open_storage(store.beside(self.location, _PARTS))
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            filesystem.delete_dir(path)

    @contextmanager
    def _errors(self, verb: str, way_out: str) -> Iterator[None]:
        """Raise errors of the storage as StorageErrors that say what could not be done with the output."""
        try:
            yield
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            raise StorageError(
                f"cannot {verb} output {self.location} ({first_line(error)}); {way_out}"
            ) from error
