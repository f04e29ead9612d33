"""Which directory of this machine holds a registered version: known also while the registry is out of reach."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from llama_ray.storage.atomic import write_text
from llama_ray.storage.paths import MODEL_CACHE
from llama_ray.tracking.manifest import changed_size, sizes, unreadable_weights
from llama_ray.tracking.uri import identity
from llama_ray.utils.errors import first_line

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedVersion:
    """Where version `version` of `name` in the registry at `uri` is kept, or was found, on this machine.

    `folder` holds the directories of all versions that were downloaded, and a note of where each is. Nothing removes
    them; any of them may be deleted by hand, and is downloaded again when it is needed.
    """

    folder: Path
    name: str
    version: int
    uri: str

    @classmethod
    def of(cls, name: str, version: int, uri: str | None, cache_dir: Path | None) -> CachedVersion:
        """Return the entry in `cache_dir`, by default `MODEL_CACHE`."""
        return cls((cache_dir or MODEL_CACHE).expanduser() / name, name, version, identity(uri))

    def directory_for(self, location: str) -> Path:
        """Return where to download to what is stored at `location`.

        A new database starts again at version 1. The location contains a random id, so its directory differs.
        """
        return self.folder / f"{self.version}-{self._key(location)}"

    def find(self) -> Path | None:
        """Return the directory that was noted last if it is whole still; None if there is none."""
        noted = self._read()
        return noted[0] if noted and self.is_whole(noted[0]) else None

    def is_whole(self, directory: Path) -> bool:
        """Whether the files in `directory` are there, of the sizes that were noted, and its weights can be read."""
        noted = self._read()
        expected = noted[1] if noted and noted[0] == directory else {}
        return directory.is_dir() and not (changed_size(directory, expected) or unreadable_weights(directory))

    def note(self, directory: Path) -> None:
        """Remember that the version is in `directory`, whole. Where that cannot be written, nothing is remembered."""
        content = json.dumps({"directory": str(directory), "files": sizes(directory)})
        try:
            if not self._note.is_file() or self._note.read_text(encoding="utf-8") != content:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self._note, content)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._note, first_line(error))

    @property
    def _note(self) -> Path:
        return self.folder / f".{self.version}-{self._key()}.json"

    def _read(self) -> tuple[Path, dict[str, int]] | None:
        try:
            noted = json.loads(self._note.read_text(encoding="utf-8"))
            return Path(noted["directory"]), dict(noted["files"])
        # A note that a crash has damaged is as good as none.
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _key(self, *more: str) -> str:
        text = "\n".join((self.uri, self.name, str(self.version), *more))
        return hashlib.sha256(text.encode()).hexdigest()[:12]
