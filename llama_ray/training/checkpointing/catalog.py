"""The checkpoints of a run: which one to continue from, and which ones to delete."""

from __future__ import annotations

import math
from typing import Any

from llama_ray.storage import run_directory, store
from llama_ray.training.hosts.group import HostGroup
from llama_ray.training.parallel.process_group import rank, world_size


def latest_valid_checkpoint(run: str, timeout_s: int) -> str | None:
    """Return the newest checkpoint of `run` whose files are all as they were written; every worker must call it.

    The workers divide the files among themselves to read them. A damaged checkpoint is skipped with a warning and set
    aside, so that it is never considered again. `timeout_s` limits how long workers wait for each other.
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
            run_directory.set_aside(checkpoint)
    return None


def prune(run: str, step: int, keep: int) -> None:
    """Delete the checkpoints of `run` up to `step`, except the newest `keep` and the one with the best validation loss.

    A loss that is not finite is never the best one, and only losses on the data of the newest checkpoint compare. If
    several checkpoints followed the same validation, the earliest counts: its weights are nearest to those measured.
    """
    markers = {c: run_directory.read_marker(c) or {} for c in run_directory.list_checkpoints(run)}
    done = [c for c in markers if (run_directory.checkpoint_step(store.name_of(c)) or 0) <= step]
    best = _best({c: markers[c] for c in done})
    for checkpoint in done[keep:]:
        if checkpoint != best:
            run_directory.remove_checkpoint(checkpoint)


def _best(markers: dict[str, dict[str, Any]]) -> str | None:
    """Return the checkpoint with the lowest finite validation loss; `markers` is from the newest to the oldest."""
    losses: dict[str, float] = {}
    newest = next(iter(markers.values()), {})
    for checkpoint, marker in reversed(markers.items()):
        loss = marker.get("validation_loss")
        if loss is not None and math.isfinite(loss) and _data(marker) == _data(newest):
            losses[checkpoint] = loss
    # The first of equals, which is the oldest.
    return min(losses, key=lambda c: losses[c], default=None)


def _data(marker: dict[str, Any]) -> object:
    """Return what the validation loss of a checkpoint depends on beside the model: the sources, and their windows."""
    return (marker.get("loader") or {}).get("sources")
