"""Which rows were under way when a process died: a note beside the parts, for whoever takes up the part next."""

from __future__ import annotations

import json

from llama_ray.batch_inference.rows import Part
from llama_ray.storage import store

TOGETHER = 3
"""So often a part's rows are tried together; somebody else's death may have been the cause, or a lost node."""
ALONE = 2
"""So often a row is then tried with nothing beside it, before it is held to be what kills the process."""


class Attempts:
    """The attempts at one part that nobody has finished, as far as they were noted in `directory`.

    A note is written before an attempt and outlives the process. It is safe to lose: then an attempt is made again.
    """

    def __init__(self, directory: str, part: Part) -> None:
        self._file = store.join(directory, f"attempts-{part.index:06}.json")
        self._together, self._alone = 0, dict[int, int]()
        try:
            if (text := store.read_text(self._file)) is not None:
                note = json.loads(text)
                self._together = int(note["together"])
                self._alone = {int(row): int(count) for row, count in note["alone"].items()}
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ):  # cut, where storage does not replace in one step
            pass

    @property
    def may_go_together(self) -> bool:
        """Whether the rows have not died together too often yet."""
        return self._together < TOGETHER

    def kills(self, row: int) -> bool:
        """Whether the process died each time when it had nothing to do but this row."""
        return self._alone.get(row, 0) >= ALONE

    def begin_together(self) -> None:
        """All rows of the part are about to be answered, perhaps with those of other parts."""
        self._together += 1
        self._write()

    def begin_alone(self, row: int) -> None:
        """Nothing but this row is about to be answered."""
        self._alone[row] = self._alone.get(row, 0) + 1
        self._write()

    def survived(self, row: int) -> None:
        """The process still lives: the row is not the cause."""
        del self._alone[row]  # written with the next one's beginning

    def forget(self) -> None:
        """The part is finished."""
        store.delete(self._file)

    def _write(self) -> None:
        store.write_text(self._file, json.dumps({"together": self._together, "alone": self._alone}))
