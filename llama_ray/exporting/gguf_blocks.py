"""Weights as blocks of bytes, in the number formats that are written."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ray.model.gguf.blocks import BF16, F16, F32, FORMATS, Q8_0
from llama_ray.model.parts import as_bytes, cast
from llama_ray.model.weight_files import CheckpointError

FILE_TYPES = {"f32": (F32, 0), "f16": (F16, 1), "bf16": (BF16, 32), "q8_0": (Q8_0, 7)}
"""The number formats of matrices by their names, with the numbers of ggml's types and of llama.cpp's kinds of files."""


def format_for(shape: tuple[int, ...], wanted: int) -> int:
    """Return the format of a tensor in a file whose matrices are in `wanted`, as llama.cpp's converter chooses it.

    Norms stay in float32; rows that are no whole blocks are in float16.
    """
    if len(shape) == 1:
        return F32
    return wanted if shape[-1] % FORMATS[wanted].values == 0 else F16


def encode(name: str, rows: Tensor, number: int) -> memoryview:
    """Return float32 `rows` as bytes in a format. Raises CheckpointError for a weight beyond its range."""
    if number == Q8_0:
        return as_bytes(_q8_0(name, rows))
    return as_bytes(cast(name, rows, FORMATS[number].dtype))


def _q8_0(name: str, rows: Tensor) -> Tensor:
    """Return blocks of 34 bytes: a scale in float16, and 32 whole numbers, rounded as llama.cpp rounds them."""
    blocks = rows.reshape(-1, 32)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    if (beyond := scales.half().isinf() & scales.isfinite()).any():
        raise CheckpointError(
            f"{name} has a weight of the size {127 * scales[beyond][0].item():.3g}; q8_0 ends at {127 * 65504:.3g}; "
            "take bf16 or f32"
        )
    scaled = blocks * torch.where(scales == 0, 0, 1 / scales)
    size = scaled.abs()
    # Halves go away from zero; adding 0.5 itself would round the largest number below it up.
    down = size.floor()
    rounded = scaled.sign() * (down + (2 * (size - down)).floor())
    return torch.cat([scales.half().view(torch.uint8), rounded.to(torch.int8).view(torch.uint8)], dim=1)
