"""What the programs of a kernel compute at a time, and with how many threads.

`benchmarks/gpu/sweep.py` measures the choices on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llama_ray.utils.integers import ceil_div

ROWS = 16
"""Rows of the smallest tile: the least that tensor cores compute."""
PROGRAMS_PER_PROCESSOR = 2
"""Programs that a few decoding sequences are split into, for each processor: their loads hide each other's latency."""
_LEAST_PART = 256
"""Keys of the longest context that are worth a program of their own."""
_MOST_SPLITS = 64


class AttentionTile(NamedTuple):
    """Launch parameters of attention."""

    rows: int
    """Queries x heads of a group that a program attends with: at least 16, and at least one query."""
    keys: int
    """Keys that it loads at a time."""
    warps: int
    stages: int
    """How many such loads are under way or in use at once."""


def decode_tile(dim: int, dtype: torch.dtype) -> AttentionTile:
    """Return the tile of steps in which each sequence has one query; `dim` is the size of a head."""
    if dtype is torch.float32:
        return AttentionTile(ROWS, 32, 4, 2)
    return AttentionTile(ROWS, 64, 4, 3)


def prompt_tile(dim: int, dtype: torch.dtype) -> AttentionTile:
    """Return the tile of steps with prompts; `dim` is the size of a head."""
    if dtype is torch.float32:
        return AttentionTile(64, 32, 4, 2)
    return AttentionTile(128, 64, 8 if dim > 64 else 4, 3 if dim <= 128 else 2)


def splits(units: int, longest: int, processors: int) -> int:
    """Return how many programs share each of `units` contexts (sequences x key-value heads) of up to `longest` keys."""
    return max(
        1, min(PROGRAMS_PER_PROCESSOR * processors // units, ceil_div(longest, _LEAST_PART), _MOST_SPLITS)
    )


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; without one, a number for Triton's interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
