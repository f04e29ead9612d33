"""Replaces several files of a directory together, for example those of a saved model."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Self

from llama_ray.storage.atomic import sync


class Replacement:
    """Files that are written under temporary names, and then replace those of a directory.

        with Replacement(directory, marker="config.json") as new:
            new.write("config.json", content)
            new.commit(superseded=["old.bin"])

    Until `commit` the directory stays as it was, also if the process is killed. During the commit, some renames long,
    it lacks the file `marker`, which its readers need, so that none takes some old and some new files for a whole. A
    block that does not end with `commit` leaves nothing behind.
    """

    def __init__(self, directory: Path, marker: str) -> None:
        self._directory, self._marker = directory, marker
        self._staged: dict[str, Path] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Return the temporary name under which to write the file `name`."""
        self._staged[name] = self._directory / f".{name}.{uuid.uuid4().hex[:8]}"
        return self._staged[name]

    def write(self, name: str, content: str) -> None:
        """Write the whole text file `name`."""
        self.path(name).write_text(content, encoding="utf-8")

    def commit(self, superseded: Collection[str]) -> None:
        """Let the files take their names, the marker last, and delete those of `superseded` that are not among them.

        A file that has not changed is left alone; if only one has, and nothing is deleted, it is replaced atomically.
        """
        for file in self._staged.values():
            sync(file)
        changed = [name for name, file in self._staged.items() if not self._is_unchanged(name, file)]
        gone = [name for name in superseded if name not in self._staged and self._lexists(name)]
        if len(changed) + len(gone) > 1:
            (self._directory / self._marker).unlink(missing_ok=True)
            sync(self._directory)
            changed = [*(name for name in changed if name != self._marker), self._marker]
        for name in gone:
            (self._directory / name).unlink()
        for name in changed:
            if name == changed[-1]:
                # A power cut keeps the order, too.
                sync(self._directory)
            self._staged.pop(name).replace(self._directory / name)
        sync(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._staged.values():
            file.unlink(missing_ok=True)

    def _is_unchanged(self, name: str, new: Path) -> bool:
        old = self._directory / name
        # Weights are too large to read again, and seldom the same.
        small = new.stat().st_size <= _LARGEST_COMPARED
        return small and old.is_file() and old.read_bytes() == new.read_bytes()

    def _lexists(self, name: str) -> bool:
        path = self._directory / name
        return path.exists() or path.is_symlink()


_LARGEST_COMPARED = 2**24
