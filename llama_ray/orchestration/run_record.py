"""The file `run.json` of a run's directory: its MLflow run, and what came of it once it has finished."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from llama_ray.storage import store
from llama_ray.tracking.runs import Run
from llama_ray.utils.redact import redact
from llama_ray.utils.typed_json import from_json

_FILE = "run.json"


@dataclass(frozen=True)
class Finished:
    """The end of a run: its last step and that checkpoint, and `version`, such as `models:/name/7`, if registered."""

    step: int
    checkpoint: str
    validation_loss: float
    epochs: dict[str, float]
    register_as: str
    version: str | None


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds; `finished` is None while there are steps to take."""

    run_id: str
    tracking_uri: str
    finished: Finished | None = None

    @classmethod
    def of(cls, run: Run, finished: Finished | None = None) -> RunRecord:
        """Return the record of `run`, without the secrets of its URI."""
        return cls(run.run_id, redact(run.uri), finished)

    @classmethod
    def read(cls, directory: str) -> RunRecord | None:
        """Return the record of the run in `directory`; None without one."""
        text = store.read_text(store.join(directory, _FILE))
        return from_json(cls, json.loads(text)) if text else None

    def write(self, directory: str) -> None:
        """Replace the record of the run in `directory`."""
        store.write_text(store.join(directory, _FILE), json.dumps(asdict(self)))
