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
MOST_SPLITS = 32
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


WIDEN_ROWS = 129
"""From this number of rows on, a quantised weight is converted to the dtype of the rows, for cuBLAS.

The conversion takes as long as reading the weight in that dtype, and cuBLAS is twice as fast as `multiply`.
"""
SMALLEST_OUTPUTS = 32


class _FewRows(NamedTuple):
    """The tile of a product whose rows fit into one tile, and into how many programs it is split."""

    outputs: int
    warps: int
    stages: int
    programs: int
    """For each processor, at most."""


_FEW_ROWS = {
    (8, 16): _FewRows(32, 2, 4, 6),
    (8, 32): _FewRows(64, 2, 3, 6),
    (8, 64): _FewRows(64, 4, 4, 4),
    (4, 16): _FewRows(64, 2, 3, 6),
    (4, 32): _FewRows(64, 4, 3, 5),
    (4, 64): _FewRows(64, 4, 4, 4),
}
"""By the bits of a weight and the rows of a tile."""
_FEW_ROWS_AND_OUTPUTS = {
    (8, 32): _FewRows(32, 4, 4, 3),
    (8, 64): _FewRows(32, 4, 4, 4),
    (4, 64): _FewRows(32, 4, 4, 4),
}
"""In place of those for fewer than 4096 outputs."""
_MOST_PARTS = {16: 8, 32: 8, 64: 2}
"""Splits of tiles by their rows: the parts take little memory beside the weight."""


def product_tile(weight: Tensor, rows: int, dtype: torch.dtype, processors: int) -> ProductTile:
    """Return the tile that multiplies `rows` rows of `dtype` by an int8 or int4 weight in the layout of `multiply`."""
    outputs, bits = len(weight), 4 if weight.dtype is torch.uint8 else 8
    if dtype is torch.float32:
        # Without tensor cores, small tiles are faster.
        return ProductTile(ROWS if rows <= ROWS else 64, 32, 128, 4, 2)
    if rows > 64:
        enough = ceil_div(rows, 128) * ceil_div(outputs, 128) >= processors * 3 // 4
        return ProductTile(128, 128, 64, 8, 4) if bits == 8 and enough else ProductTile(64, 64, 128, 4, 3)
    height = next(n for n in (16, 32, 64) if rows <= n)
    tile = _FEW_ROWS[bits, height]
    if outputs < 4096:
        tile = _FEW_ROWS_AND_OUTPUTS.get((bits, height), tile)
    steps = weight.shape[1] * 8 // bits // 128
    # A part of fewer than three steps is not worth it.
    splits = min(
        tile.programs * processors // ceil_div(outputs, tile.outputs), steps // 3, _MOST_PARTS[height]
    )
    return ProductTile(height, tile.outputs, 128, tile.warps, tile.stages, _power_of_2_up_to(splits))


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
