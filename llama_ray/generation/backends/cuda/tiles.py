"""What the programs of a kernel compute at a time, and with how many threads.

`benchmarks/gpu/sweep.py` measures the choices on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llama_ray.utils.integers import ceil_div

ROWS = 16
"""Rows of the smallest tile: the least that tensor cores compute."""
PROGRAMS_PER_PROCESSOR = 2
"""Programs that a few decoding sequences are split into, for each processor: their loads hide each other's latency."""
_LEAST_PART = 256
"""Keys of the longest context that are worth a program of their own."""
MOST_SPLITS = 64
"""Programs that may share a context; a power of two."""


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
        1, min(PROGRAMS_PER_PROCESSOR * processors // units, ceil_div(longest, _LEAST_PART), MOST_SPLITS)
    )


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; without one, a number for Triton's interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


class ProductTile(NamedTuple):
    """Launch parameters of a matrix product."""

    rows: int
    """Rows of the input that a program multiplies."""
    outputs: int
    step: int
    """Inputs that it loads at a time; a multiple of 128 for int4."""
    warps: int
    stages: int
    """How many such loads are under way or in use at once."""


INVARIANT_ROWS = 64
"""Number of rows whose tile batch-invariant products always have."""
_SHARED_BYTES = 96 * 1024
"""Shared memory that a program can use on every GPU since Ampere."""
_OUTPUTS = ((6144, 32), (12288, 64))
"""(limit, tile): weights with fewer than `limit` outputs are divided into tiles of `tile` outputs, so that each
processor of a large GPU gets about one tile, or several."""
_MOST_OUTPUTS = 128


def product_tile(weight: Tensor, rows: int, dtype: torch.dtype) -> ProductTile:
    """Return the tile that multiplies `rows` rows of `dtype` by a weight in the layout of `multiply`."""
    tile_rows = ROWS if rows <= ROWS else INVARIANT_ROWS
    # Without tensor cores, small tiles are faster.
    height = next((tile for limit, tile in _OUTPUTS if len(weight) < limit), _MOST_OUTPUTS)
    height = _OUTPUTS[0][1] if dtype is torch.float32 else height
    quantized = weight.dtype != dtype
    step = 128 if quantized else 64
    stage = height * step * (1 if quantized else dtype.itemsize) + tile_rows * step * dtype.itemsize
    return ProductTile(tile_rows, height, step, 4, max(2, min(5, _SHARED_BYTES // stage)))
