"""Round weights to 8 or 4 bits, on any device; each kernel packs the result in its own layout.

A product's weight [out, in] is divided by a scale and rounded to nearest. int8 has a scale for each output channel
(the vector-wise scales of LLM.int8, Dettmers et al. 2022, arXiv:2208.07339, without its outliers); int4 has a scale for
each 64 inputs of a channel (as in llama.cpp's q4_0). Inputs and outputs of products keep their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Quantization = Literal["int8", "int4"]

GROUP_SIZE = 64
"""Inputs that share a scale in int4."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight [out, in]: `values * scales`, with each scale repeated over the inputs that share it."""

    values: Tensor
    """int8 [out, in]: -127 to 127, or -8 to 7."""
    scales: Tensor
    """int8: fp32 [out, 1]. int4: bf16 [out, in / 64]."""


def check_quantization(quantization: str | None, inputs: int) -> None:
    """Raise ValueError for an unknown name, or a number of inputs that the format does not support."""
    if quantization not in (None, "int8", "int4"):
        raise ValueError(f"quantization is {quantization!r}; it must be int8, int4 or None")
    if quantization == "int4" and inputs % GROUP_SIZE:
        raise ValueError(
            f"a product of this model has {inputs} inputs; for int4 they must be a multiple of {GROUP_SIZE}; use int8"
        )


def quantize(weight: Tensor, quantization: Quantization) -> QuantizedWeight:
    """Round a weight [out, in], on its own device. Raises ValueError as `check_quantization` does."""
    check_quantization(quantization, weight.shape[1])
    return _int8(weight.float()) if quantization == "int8" else _int4(weight.float())


def _int8(weight: Tensor) -> QuantizedWeight:
    scales = weight.abs().amax(1, keepdim=True) / 127
    return QuantizedWeight((weight / _divisor(scales)).round().clamp(-127, 127).to(torch.int8), scales)


def _int4(weight: Tensor) -> QuantizedWeight:
    groups = weight.reshape(len(weight), -1, GROUP_SIZE)
    # The value furthest from 0 becomes -8, whatever its sign, because -8 to 7 reaches further on the negative side.
    furthest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    # The scale is rounded before values are divided by it, so that they compensate for its rounding error.
    scales = (furthest / -8).to(torch.bfloat16)
    values = (groups / _divisor(scales.float())).round().clamp(-8, 7).to(torch.int8)
    return QuantizedWeight(values.flatten(1), scales.squeeze(2))


def _divisor(scales: Tensor) -> Tensor:
    """Replace the scale 0 of a channel of zeros by 1."""
    return scales.where(scales != 0, 1)
