"""What serves, kept over restarts of the follower, of the application and of the cluster."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from llama_ray.storage.atomic import write_text
from llama_ray.tracking.uri import identity
from llama_ray.utils.errors import first_line
from llama_ray.utils.redact import redact
from serve_app.registry.facts import Rejection, Remembered
from serve_app.registry.messages import ModelVersion

_log = logging.getLogger(__name__)


class Store(Protocol):
    """Where a record is kept, by a key that can name a file. Both methods may raise whatever the store raises."""

    def get(self, key: str) -> str | None:
        """Return what is kept, or None."""

    def put(self, key: str, text: str) -> None:
        """Replace what is kept."""


class FileStore:
    """Files in a folder of this machine: they survive the cluster."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.expanduser()

    def get(self, key: str) -> str | None:
        """Return the content of the file, or None if there is none."""
        file = self._folder / f"{key}.json"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def put(self, key: str, text: str) -> None:
        """Replace the file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / f"{key}.json", text)


class Record:
    """What an application serves of the registry at `tracking_uri`, in each of `stores`; the newest is read.

    `deployed` names the deployment of the application: the next one tries again what this one has rejected.
    """

    def __init__(
        self, stores: Sequence[Store], *, application: str, tracking_uri: str, deployed: str
    ) -> None:
        self._stores = stores
        self._owner = f"{application}\n{redact(identity(tracking_uri))}"
        self._deployed = deployed

    def read(self, model: str) -> Remembered | None:
        """Return what is kept of `model`; None where no store has it, or none can be read."""
        records = [record for store in self._stores if (record := self._read(store, model))]
        newest = max(records, key=lambda record: float(record["at"]), default=None)
        return None if newest is None else _remembered(newest, self._deployed)

    def write(self, model: str, remembered: Remembered) -> bool:
        """Keep what serves of `model`; return whether all stores have it. One that fails is logged."""
        record = {"at": time.time(), "deployed": self._deployed, **asdict(remembered)}
        kept = True
        for store in self._stores:
            try:
                store.put(self._key(model), json.dumps(record))
            except Exception as error:
                _log.warning("what serves of %s cannot be kept: %s", model, first_line(error))
                kept = False
        return kept

    def _read(self, store: Store, model: str) -> dict[str, Any] | None:
        try:
            text = store.get(self._key(model))
            record: dict[str, Any] | None = None if text is None else json.loads(text)
            if record is not None:
                _remembered(record, self._deployed)
        except Exception as error:
            _log.warning("the record of what served of %s cannot be read: %s", model, first_line(error))
            return None
        return record

    def _key(self, model: str) -> str:
        return hashlib.sha256(f"{self._owner}\n{model}".encode()).hexdigest()[:16]


def _remembered(record: dict[str, Any], deployed: str) -> Remembered:
    rejected = record["rejected"] if record["deployed"] == deployed else ()
    return Remembered(
        record["current"] and ModelVersion(**record["current"]),
        record["canary"] and ModelVersion(**record["canary"]),
        tuple(ModelVersion(**version) for version in record["previous"]),
        tuple(Rejection(**{**r, "version": ModelVersion(**r["version"])}) for r in rejected),
        record["standby"] and ModelVersion(**record["standby"]),
    )
