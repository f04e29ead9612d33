"""How far a run is, as its checkpoints record it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llama_ray.data.mixtures.position import Position
from llama_ray.model.weight_files import CheckpointError
from llama_ray.storage.run_directory import MARKER
from llama_ray.utils.redact import redact

FileRecord = Mapping[str, int | str]
"""The length and SHA-256 of a file: `{"bytes": ..., "sha256": ...}`."""


@dataclass
class Progress:
    """How far a run is. The learning rate is not part of it: it is a function of the step."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens of the sequences trained on, by all workers."""
    validation_loss: float | None = None
    """The last one measured, in nats per token."""
    validation_step: int | None = None
    """The step whose weights it was measured on."""
    skipped_steps: int = 0
    """Steps without an update, because the loss or a gradient was not finite."""
    skipped_in_a_row: int = 0
    """Those among them that came last, without a step in between that was not skipped."""
    loader: Position | None = None
    """The position in the data; None before the first checkpoint."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """The loss scale of fp16, see `LossScaler.state_dict`; empty in other precisions."""
    run_id: str | None = None
    """The MLflow run that the steps were logged to."""
    parent: str | None = None
    """The reference of the weights that the run began with; None for random ones."""
    branched_at: int = 0
    """The step of `parent`, if the run went on with its optimizer and its position in the data, too; else 0."""
    unsent: list[Any] = field(default_factory=list)
    """Metrics that MLflow had not accepted when the checkpoint was made, see `Observer.unsent`."""

    def branch(self, parent: str, run_id: str | None) -> Progress:
        """Return how far a new run is that goes on from this checkpoint, which is at `parent`."""
        return replace(self, parent=parent, branched_at=self.step, run_id=run_id, unsent=[])

    def marker(self, run: str, attempt: int, files: Mapping[str, FileRecord]) -> str:
        """Return the content of `training.json`: this, who wrote it, and the records of other files.

        `run` is the name of the run's directory, `attempt` the number of the attempt.
        """
        written = {
            "parent": self.parent and redact(self.parent),
            "run": run,
            "attempt": attempt,
            "files": files,
        }
        return json.dumps(asdict(self) | written, indent=2) + "\n"


def load_progress(directory: str | Path) -> Progress:
    """Read the progress of a checkpoint. Raises CheckpointError if the directory is not a training checkpoint."""
    path = Path(directory) / MARKER
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not a training checkpoint (no {MARKER}); name a step_* directory of a run"
        )
    content = json.loads(path.read_text())
    return Progress(**{f.name: content[f.name] for f in fields(Progress) if f.name in content})
