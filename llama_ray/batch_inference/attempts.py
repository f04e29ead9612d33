"""A file beside each unfinished partition that counts attempts, so that a row that kills its process is found."""

from __future__ import annotations

import json
from contextlib import suppress

from llama_ray.batch_inference.partitions import Partition
from llama_ray.storage import store

MAX_SHARED_ATTEMPTS = 3
"""Attempts at a whole partition before its rows run one by one: a row of another partition, or a lost node, may have
ended the earlier ones."""
MAX_SOLO_ATTEMPTS = 2
"""Attempts at a row that runs alone before it counts as the one that kills the process."""


class Attempts:
    """The attempts at one unfinished partition, as noted in `directory`.

    Each is noted before it begins, so the count survives the process. A lost note only costs further attempts.
    """

    def __init__(self, directory: str, partition: Partition) -> None:
        self._file = store.join(directory, f"attempts-{partition.index:06}.json")
        self._shared, self._solo = 0, dict[int, int]()
        # Storage that does not replace a file in one step may hold a truncated note.
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            if (text := store.read_text(self._file)) is not None:
                note = json.loads(text)
                self._shared = int(note["together"])
                self._solo = {int(row): int(count) for row, count in note["alone"].items()}

    @property
    def may_share(self) -> bool:
        """Whether the partition's rows may still run together, and beside other partitions."""
        return self._shared < MAX_SHARED_ATTEMPTS

    def is_fatal(self, row: int) -> bool:
        """Whether the process died each time that `row` ran alone."""
        return self._solo.get(row, 0) >= MAX_SOLO_ATTEMPTS

    def begin_shared(self) -> None:
        """Note that all rows of the partition are about to run, perhaps beside other partitions."""
        self._shared += 1
        self._write()

    def begin_solo(self, row: int) -> None:
        """Note that `row` is about to run alone."""
        self._solo[row] = self._solo.get(row, 0) + 1
        self._write()

    def survived(self, row: int) -> None:
        """Forget the attempts at `row`: the process is still alive. Written with the next note."""
        del self._solo[row]

    def delete(self) -> None:
        """Delete the note of a finished partition."""
        store.delete(self._file)

    def _write(self) -> None:
        store.write_text(self._file, json.dumps({"together": self._shared, "alone": self._solo}))
