"""The checkpoints of a run: their names, which one to continue from, and which ones to delete."""

from __future__ import annotations

from llama_ray.storage import run_directory, store
from llama_ray.training.hosts.group import HostGroup
from llama_ray.training.parallel.process_group import rank, world_size


def checkpoint_name(step: int) -> str:
    """Return the directory name of a step's checkpoint; names sort as steps do."""
    return f"step_{step:08d}"


def latest_valid_checkpoint(run: str, timeout_s: int) -> str | None:
    """Return the newest checkpoint of `run` whose files are all as they were written; every worker must call it.

    The workers divide the files among themselves to read them. A damaged checkpoint is skipped with a warning and
    loses its marker, so that it is never considered again. `timeout_s` limits how long workers wait for each other.
    """
    group = HostGroup(timeout_s)
    # One list for all workers: a directory may look different from another machine.
    for checkpoint in group.broadcast(run_directory.list_checkpoints(run)):
        damage = run_directory.missing_or_truncated(checkpoint)
        if damage is None:
            files = sorted((run_directory.read_marker(checkpoint) or {"files": {}})["files"])
            damage = run_directory.changed_content(checkpoint, files[rank() :: world_size()])
        if not group.any(damage is not None):
            return checkpoint
        if rank() == 0:
            store.delete(store.join(checkpoint, run_directory.MARKER))
    return None


def prune(run: str, step: int, keep: int) -> None:
    """Delete the checkpoints of `run` up to `step`, except the newest `keep` and the one with the best validation loss.

    If several checkpoints followed the same validation, the earliest counts: its weights are nearest to those measured.
    """
    done = [c for c in run_directory.list_checkpoints(run) if store.name_of(c) <= checkpoint_name(step)]
    losses: dict[str, float] = {}
    for checkpoint in done:
        loss = (run_directory.read_marker(checkpoint) or {}).get("validation_loss")
        if loss is not None:
            losses[checkpoint] = loss
    best = min(losses, key=lambda c: (losses[c], c), default=None)
    for checkpoint in done[keep:]:
        if checkpoint != best:
            run_directory.remove_checkpoint(checkpoint)
