"""Weights in 8 and in 4 bits: which numbers they become, on any device. Kernels pack them as suits them.

A product's weight [out, in] is rounded to nearest after division by a scale: in int8 one for each output channel
(LLM.int8's vector-wise scales, Dettmers et al. 2022, arXiv:2208.07339, without its outliers), in int4 one for each
64 inputs of a channel (as in llama.cpp's q4_0). Inputs and outputs of products stay what they were.
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
    """What `weight` [out, in] has become: `values * scales`, with `scales` repeated over their inputs."""

    values: Tensor
    """int8 [out, in]: -127 to 127, or -8 to 7."""
    scales: Tensor
    """int8: fp32 [out, 1]. int4: bf16 [out, in / 64]."""

    def dequantize(self) -> Tensor:
        """fp32 [out, in]."""
        scales = self.scales.float().repeat_interleave(self.values.shape[1] // self.scales.shape[1], 1)
        return self.values * scales


def check_quantization(quantization: str | None, inputs: int) -> None:
    """Raise ValueError for a name that is unknown, or a number of inputs that the format cannot have."""
    if quantization not in (None, "int8", "int4"):
        raise ValueError(f"quantization is {quantization!r}; it must be int8, int4 or None")
    if quantization == "int4" and inputs % GROUP_SIZE:
        raise ValueError(
            f"int4 shares a scale between {GROUP_SIZE} inputs, and a product of this model has {inputs}; use int8"
        )


def quantize(weight: Tensor, quantization: Quantization) -> QuantizedWeight:
    """Round a weight [out, in], on its own device; ValueError as `check_quantization` says."""
    check_quantization(quantization, weight.shape[1])
    return _int8(weight.float()) if quantization == "int8" else _int4(weight.float())


def _int8(weight: Tensor) -> QuantizedWeight:
    scales = weight.abs().amax(1, keepdim=True) / 127
    return QuantizedWeight((weight / _divisor(scales)).round().clamp(-127, 127).to(torch.int8), scales)


def _int4(weight: Tensor) -> QuantizedWeight:
    groups = weight.reshape(len(weight), -1, GROUP_SIZE)
    # The value furthest from 0 becomes -8, whatever its sign: -8 to 7 reaches further on that side.
    furthest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    # Rounded before the values are divided by it, so that they make up for what it loses.
    scales = (furthest / -8).to(torch.bfloat16)
    values = (groups / _divisor(scales.float())).round().clamp(-8, 7).to(torch.int8)
    return QuantizedWeight(values.flatten(1), scales.squeeze(2))


def _divisor(scales: Tensor) -> Tensor:
    """A channel of zeros has scale 0; any divisor will do for it."""
    return scales.where(scales != 0, 1)
