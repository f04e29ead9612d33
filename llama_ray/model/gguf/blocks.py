"""The number formats of ggml: how a block of bytes stands for weights.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h has the layouts, ggml-quants.c the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A number format: `values` weights of a row stand in `size` bytes.

    `decode` takes blocks, uint8 [blocks, size], to weights [blocks, values] of `dtype`. In float32 the operations are
    those of ggml, in their order, so that the weights are the same to the bit.
    """

    name: str
    values: int
    size: int
    dtype: torch.dtype
    decode: Callable[[Tensor], Tensor]


def _plain(name: str, dtype: torch.dtype) -> Format:
    return Format(name, 1, dtype.itemsize, dtype, lambda blocks: blocks.view(dtype))


def _halves(blocks: Tensor) -> Tensor:
    """Return pairs of bytes [blocks, 2 n] as the float32 numbers [blocks, n] of the float16 that they are."""
    return blocks.contiguous().view(torch.float16).float()


def _fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """Return unsigned numbers of `bits` bits: of each `run` bytes first all the lowest, then those above them.

    uint8 [blocks, bytes] -> uint8 [blocks, bytes * 8 / bits].
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(1, 1, -1, 1)
    fields: Tensor = (packed.reshape(len(packed), -1, 1, run) >> shifts) & (2**bits - 1)
    return fields.reshape(len(packed), -1)


def _bits(packed: Tensor) -> Tensor:
    """Return all bits of bytes, each byte's lowest first."""
    return _fields(packed, 1, 1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, :2]) * (_fields(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    scale_and_least = _halves(blocks[:, :4])
    return _fields(blocks[:, 4:], 4, 16).float() * scale_and_least[:, :1] + scale_and_least[:, 1:]


def _q5_0(blocks: Tensor) -> Tensor:
    numbers = _fields(blocks[:, 6:], 4, 16) | _bits(blocks[:, 2:6]) << 4
    return _halves(blocks[:, :2]) * (numbers.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    scale_and_least = _halves(blocks[:, :4])
    numbers = _fields(blocks[:, 8:], 4, 16) | _bits(blocks[:, 4:8]) << 4
    return numbers.float() * scale_and_least[:, :1] + scale_and_least[:, 1:]


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _halves(blocks[:, :2])


def _scales_and_least(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and the minima, 8 numbers of 6 bits each, that 12 bytes of Q4_K and Q5_K hold."""
    scales, least, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        torch.cat([scales & 0x3F, (high & 0x0F) | ((scales >> 2) & 0x30)], dim=1).float(),
        torch.cat([least & 0x3F, (high >> 4) | ((least >> 2) & 0x30)], dim=1).float(),
    )


def _groups(numbers: Tensor, scales: Tensor, least: Tensor | None = None) -> Tensor:
    """Scale numbers [blocks, values] by groups of neighbours, and subtract the minimum of each group."""
    grouped = numbers.float().view(len(numbers), scales.shape[1], -1) * scales.unsqueeze(2)
    if least is not None:
        grouped -= least.unsqueeze(2)
    return grouped.view(len(numbers), -1)


def _q2_k(blocks: Tensor) -> Tensor:
    packed, d = blocks[:, :16], _halves(blocks[:, 80:84])
    scales, least = d[:, :1] * (packed & 0x0F).float(), d[:, 1:] * (packed >> 4).float()
    return _groups(_fields(blocks[:, 16:80], 2, 32), scales, least)


def _q3_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, 96:108]
    scales = _fields(packed[:, :8], 4, 8) | _fields(packed[:, 8:], 2, 4) << 4
    # A bit of the mask that is not set takes 4 away.
    numbers = _fields(blocks[:, 32:96], 2, 32).float() - 4 * (1 - _fields(blocks[:, :32], 1, 32).float())
    return _groups(numbers, _halves(blocks[:, 108:]) * (scales.float() - 32))


def _q4_k(blocks: Tensor) -> Tensor:
    d = _halves(blocks[:, :4])
    scales, least = _scales_and_least(blocks[:, 4:16])
    return _groups(_fields(blocks[:, 16:], 4, 32), d[:, :1] * scales, d[:, 1:] * least)


def _q5_k(blocks: Tensor) -> Tensor:
    d = _halves(blocks[:, :4])
    scales, least = _scales_and_least(blocks[:, 4:16])
    numbers = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << 4
    return _groups(numbers, d[:, :1] * scales, d[:, 1:] * least)


def _q6_k(blocks: Tensor) -> Tensor:
    numbers = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << 4
    scales = blocks[:, 192:208].view(torch.int8).float()
    return _groups(numbers.float() - 32, _halves(blocks[:, 208:]) * scales)


F32, F16, BF16, Q8_0 = 0, 1, 30, 8
"""The numbers in ggml of the formats that are also written."""

FORMATS = {
    F32: _plain("F32", torch.float32),
    F16: _plain("F16", torch.float16),
    BF16: _plain("BF16", torch.bfloat16),
    2: Format("Q4_0", 32, 18, torch.float32, _q4_0),
    3: Format("Q4_1", 32, 20, torch.float32, _q4_1),
    6: Format("Q5_0", 32, 22, torch.float32, _q5_0),
    7: Format("Q5_1", 32, 24, torch.float32, _q5_1),
    Q8_0: Format("Q8_0", 32, 34, torch.float32, _q8_0),
    10: Format("Q2_K", 256, 84, torch.float32, _q2_k),
    11: Format("Q3_K", 256, 110, torch.float32, _q3_k),
    12: Format("Q4_K", 256, 144, torch.float32, _q4_k),
    13: Format("Q5_K", 256, 176, torch.float32, _q5_k),
    14: Format("Q6_K", 256, 210, torch.float32, _q6_k),
}
"""The formats that can be read, by their numbers in ggml."""

_OTHERS = {
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


def format_name(number: int) -> str:
    """Return the name of any number format for messages."""
    return FORMATS[number].name if number in FORMATS else _OTHERS.get(number, f"number {number}")
