"""The place of this worker among those of a run."""

from __future__ import annotations

import os

import torch.distributed as dist


def rank() -> int:
    """Return the number of this worker; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of workers that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size(world_size: int) -> int:
    """Return the number of workers on this machine.

    torchrun and Ray Train set LOCAL_WORLD_SIZE; without it, all `world_size` workers count as local.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
