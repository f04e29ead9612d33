"""Where a run goes on from: its own newest checkpoint, that of another run which it branches off, or nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from llama_ray.model.weight_files import CheckpointError
from llama_ray.storage import run_directory
from llama_ray.storage.paths import is_model_ref
from llama_ray.training.checkpointing.files import local_copy
from llama_ray.training.checkpointing.progress import Progress, load_progress
from llama_ray.training.config import TrainConfig
from llama_ray.utils.errors import printable


@dataclass(frozen=True)
class StartingPoint:
    """A local directory with the files of a checkpoint, and what it is called in messages.

    `branch_of` is where it is, if it is that of another run.
    """

    directory: Path
    name: str = ""
    branch_of: str | None = None

    def progress(self, run_id: str | None = None) -> Progress:
        """Return how far the run is; `run_id` is that of a branch. Raises CheckpointError for no checkpoint."""
        found = load_progress(self.directory)
        return found if self.branch_of is None else found.branch(self.branch_of, run_id)


@contextmanager
def starting_point(
    config: TrainConfig,
    checkpoint: str | Path | None,
    open_checkpoint: Callable[[str], AbstractContextManager[Path]] = local_copy,
) -> Iterator[StartingPoint | None]:
    """Yield where a run goes on whose own newest checkpoint is `checkpoint`; None if it begins.

    With `open_checkpoint` local_description only what the checks of a run read is fetched. Raises CheckpointError for
    a `branch_from` that is no whole checkpoint of a run.
    """
    if checkpoint is not None:
        where = str(checkpoint.resolve()) if isinstance(checkpoint, Path) else checkpoint
        with open_checkpoint(where) as own:
            yield StartingPoint(own, where)
    elif config.branch_from is not None:
        _check(config.branch_from)
        with open_checkpoint(config.branch_from) as other:
            yield StartingPoint(other, config.branch_from, config.branch_from)
    else:
        yield None


def _check(ref: str) -> None:
    what = f"branch_from is {printable(ref)}"
    if is_model_ref(ref) or ref.startswith("hf://"):
        raise CheckpointError(
            f"{what}, which has weights alone; it must be a checkpoint of a run, such as .../step_00001000; begin with "
            "the weights with --init_from"
        )
    if run_directory.read_marker(ref) is None:
        raise CheckpointError(
            f"{what}, which is no checkpoint of a run (no {run_directory.MARKER}); name a step_* directory of one, or "
            "begin with weights alone with --init_from"
        )
    if damage := run_directory.missing_or_truncated(ref):
        raise CheckpointError(f"{what}, which is damaged ({damage}); name another checkpoint")
