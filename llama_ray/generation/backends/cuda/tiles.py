"""What the programs of a kernel compute at a time, and with how many threads.

`benchmarks/on_gpu/sweep.py` measures the choices on a GPU. All of them fit into the shared memory of any GPU since
Ampere, 99 KiB a program.
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
        return AttentionTile(ROWS, 32 if dim <= 64 else 16, 4, 2)
    return AttentionTile(ROWS, 64 if dim <= 128 else 32, 4, 3)


def prompt_tile(dim: int, dtype: torch.dtype) -> AttentionTile:
    """Return the tile of steps with prompts; `dim` is the size of a head."""
    if dtype is torch.float32:
        # Without tensor cores, larger tiles do not fit into registers.
        return AttentionTile(32, 32, 4, 2) if dim <= 64 else decode_tile(dim, dtype)
    if dim > 128:
        return AttentionTile(64, 32, 4, 2)
    return AttentionTile(128, 64, 4, 3) if dim <= 64 else AttentionTile(128, 64, 8, 2)


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
    """Inputs that it loads at a time; 128 for int4."""
    warps: int
    stages: int
    """How many such loads are under way or in use at once."""
    splits: int = 1
    """Programs that share the inputs of a tile; a power of two."""


WIDEN_ROWS = 512
"""From this number of rows on, a quantised weight is converted to the dtype of the rows, for cuBLAS."""
SMALLEST_OUTPUTS = 32
_MANY_ROWS = ((128, 128, 8), (128, 64, 8), (64, 64, 4))
"""(rows, outputs, warps) of tiles for more than 64 rows: the largest of which there is one for most processors."""
_PROGRAMS_OF_FEW_ROWS = 4
"""Programs for each processor that a product of few rows is split into, if its weight is small."""


def product_tile(weight: Tensor, rows: int, dtype: torch.dtype, processors: int) -> ProductTile:
    """Return the tile that multiplies `rows` rows of `dtype` by an int8 or int4 weight in the layout of `multiply`."""
    outputs, packed = len(weight), weight.dtype is torch.uint8
    if dtype is torch.float32:
        # Without tensor cores, small tiles are faster.
        return ProductTile(ROWS if rows <= ROWS else 64, 32, 128, 4, 2)
    if rows > 64:
        most = processors * 3 // 4
        large = (t for t in _MANY_ROWS if ceil_div(rows, t[0]) * ceil_div(outputs, t[1]) >= most)
        height, width, warps = next(large, _MANY_ROWS[-1])
        return (
            ProductTile(height, width, 128, warps, 2) if packed else ProductTile(height, width, 64, warps, 4)
        )
    height = next(n for n in (16, 32, 64) if rows <= n)
    width = SMALLEST_OUTPUTS if outputs < 4096 else 64
    steps = weight.shape[1] * (2 if packed else 1) // 128
    # The parts of few rows take little memory beside the weight; a part of fewer than three steps is not worth it.
    splits = min(_PROGRAMS_OF_FEW_ROWS * processors // ceil_div(outputs, width), steps // 3, 128 // height)
    return ProductTile(height, width, 128, 4 if height == 64 else 2, 4, _power_of_2_up_to(splits))


def invariant_tile(weight: Tensor, dtype: torch.dtype) -> ProductTile:
    """Return the tile that multiplies any number of rows in the same way."""
    outputs = len(weight)
    step = 128 if weight.dtype != dtype else 64
    if dtype is torch.float32:
        return ProductTile(64, 32, step, 4, 2)
    width = next((width for limit, width in ((6144, 32), (12288, 64)) if outputs < limit), 128)
    return ProductTile(64, width, step, 8 if width == 128 else 4, 3)


def _power_of_2_up_to(limit: int) -> int:
    return 1 << max(limit, 1).bit_length() - 1
