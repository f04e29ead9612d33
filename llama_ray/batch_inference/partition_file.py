"""The file with the answers of one partition; it appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from llama_ray.batch_inference.partitions import Partition
from llama_ray.storage import store
from llama_ray.storage.store import StorageError


@dataclass(frozen=True)
class Counts:
    """Rows, rows with an `error`, and tokens read and generated."""

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        """Return the sum of both."""
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def finished_files(directory: str) -> set[str]:
    """Return the names of the finished partitions' files in `directory`."""
    # A file that was being written when its writer was killed has a name that begins with a dot.
    return {name for name in store.list_files(directory) if name.startswith("part-")}


def commit(directory: str, partition: Partition, rows: Sequence[Mapping[str, Any]], counts: Counts) -> None:
    """Write the answers of a partition, with its counts in the first line; from then on it is finished."""
    text = "".join(f"{_to_line(row)}\n" for row in ({"counts": asdict(counts)}, *rows))
    store.write_text(store.join(directory, partition.file), text)


def read(directory: str, partition: Partition) -> tuple[Counts, bytes]:
    """Return the counts and the answers, one a line. Raises StorageError if the file is not whole."""
    file = store.join(directory, partition.file)
    filesystem, path = store.open_storage(file)
    with filesystem.open_input_stream(path, compression=None) as stream:
        head, _, content = stream.readall().partition(b"\n")
    found = content.count(b"\n")
    if found != partition.num_rows:
        raise StorageError(
            f"{file} has {found} rows, not {partition.num_rows}; delete it and start the job again"
        )
    return Counts(**json.loads(head)["counts"]), content


# Line ends in Unicode but not in JSON: many readers, such as str.splitlines, would split a row there.
_LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


def _to_line(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False).translate(_LINE_ENDS)
    try:
        text.encode()
    except UnicodeEncodeError:  # A lone surrogate, which JSON can hold only as an escape.
        return json.dumps(row)
    return text
