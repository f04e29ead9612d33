"""Weight matrices laid out for the kernels, in the model's precision or quantised."""

from __future__ import annotations

import ctypes
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ray.generation.cpu.memory import Arena
from llama_ray.generation.cpu.ops import kernels
from llama_ray.generation.quantize import GROUP_SIZE, quantize

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)

PANEL = 64
"""Columns (outputs) that lie together; those of the last panel beyond the matrix are zeros."""


class _Linear(ctypes.Structure):
    """`struct Linear` of linear.cpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("in", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("x_is_bf16", ctypes.c_int32),
        ("y_is_bf16", ctypes.c_int32),
        ("epilogue", ctypes.c_int32),
    )


class PackedLinear(nn.Module):
    """x @ weight.T by the kernels, for a weight [out, in] of float32 or bfloat16; x has the weight's dtype.

    `gated`: the weight holds the rows of a gate and then those of as many ups, and the result is silu(gate) * up,
    [..., out / 2], rounded wherever torch rounds. `out_dtype` float32 keeps sums as they are; None is the weight's
    dtype. `arena` is where the weights go; None is memory of their own. Every row's result is the same alone and in
    any batch, bit by bit.

    int8 and int4 are those of `quantize`; both multiply with an input that is rounded to 8 bits, symmetric in groups
    of 64 (llama.cpp's q8_0 does that in groups of 32). Raises ValueError for a dtype or a
    format that the kernels don't have.
    """

    def __init__(
        self,
        weight: Tensor,
        format: Format,
        *,
        gated: bool = False,
        out_dtype: torch.dtype | None = None,
        arena: Arena | None = None,
    ) -> None:
        super().__init__()
        dtype = weight.dtype
        check_format(format, dtype)
        self.format, self.dtype, self.out_dtype = format, dtype, out_dtype or dtype
        out, self.in_features = weight.shape
        self.out_features = out // 2 if gated else out
        if format == "int4":
            units, scales = _pack_int4(weight, gated)
        elif format == "int8":
            units, scales = _pack_int8(weight, gated)
        else:
            units, scales = _pack_plain(_panels(weight, gated)), torch.empty(0)
        arena = arena or Arena()
        self._weight, self._scales = arena.copy(units), arena.copy(scales)
        # bfloat16 is multiplied in pairs; an odd input gets a zero beside it, as its weights did.
        self.pad = self.in_features % 2 if format == "bfloat16" else 0
        self._argument = _Linear(
            self._weight.data_ptr(),
            self._scales.data_ptr(),
            self.in_features + self.pad,
            self.out_features,
            FORMATS.index(format),
            dtype == torch.bfloat16,
            self.out_dtype == torch.bfloat16,
            gated,
        )
        self.address = ctypes.addressof(self._argument)
        self._run = kernels().linear

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales."""
        return self._weight.nbytes + self._scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; no gradient flows through it."""
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(
                f"a {x.dtype} input of size {x.shape[-1]} meets a weight for {self.dtype}, {self.in_features}"
            )
        x = F.pad(x, (0, 1)) if self.pad else x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.out_features), dtype=self.out_dtype)
        rows = x.numel() // x.shape[-1]
        self._run(self.address, x.data_ptr(), rows, y.data_ptr(), torch.get_num_threads())
        return y

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in={self.in_features}, out={self.out_features}, {self.format}, {self.nbytes / 2**20:.1f} MiB"


def check_format(format: Format, dtype: torch.dtype) -> None:
    """Raise ValueError unless there are kernels for weights in `format` and activations in `dtype`."""
    allowed = {torch.float32: ("float32", "int8", "int4"), torch.bfloat16: ("bfloat16", "int8", "int4")}
    name = str(dtype).removeprefix("torch.")
    if dtype not in allowed:
        raise ValueError(
            f"the CPU kernels have no {name}; load the model with dtype torch.bfloat16 or torch.float32"
        )
    if format not in allowed[dtype]:
        raise ValueError(
            f"weight format {format!r} does not go with a model in {name}; choose {', '.join(allowed[dtype])}"
        )


def _panels(weight: Tensor, gated: bool) -> Tensor:
    """[out, in] -> [panels, 64, in], zeros where there is no row; half gate and half up where `gated`.

    The results of rows that are not there are not stored, whatever zeros stand for.
    """
    parts = weight.detach().chunk(2) if gated else (weight.detach(),)
    each = PANEL // len(parts)
    split = [F.pad(p, (0, 0, 0, -len(p) % each)).view(-1, each, p.shape[1]) for p in parts]
    return torch.cat(split, 1) if gated else split[0]


def _interleave(panels: Tensor) -> Tensor:
    """[panels, 64, bytes] -> a view [panels, bytes / 4, 64] of units of 32 bits, as product.h wants them."""
    return panels.view(torch.int32).transpose(1, 2)


def _pack_plain(panels: Tensor) -> Tensor:
    odd = panels.shape[2] % 2 if panels.dtype == torch.bfloat16 else 0
    return _interleave(F.pad(panels, (0, odd)))


def _pack_int8(weight: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Bytes w + 128 [panels, groups * 16, 64, 4], and scales fp32 [panels, 64]."""
    quantized = quantize(F.pad(weight.detach(), (0, -weight.shape[1] % GROUP_SIZE)), "int8")
    values = _panels(quantized.values.to(torch.int16).add_(128).to(torch.uint8), gated)
    return _interleave(values), _panels(quantized.scales, gated)[..., 0]


def _pack_int4(weight: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Bytes of w + 8 in two halves [panels, groups * 8, 64, 4], and scales bf16 [panels, groups, 64].

    A byte holds value i of its group in its low half and value i + 32 in its high half.
    """
    quantized = quantize(F.pad(weight.detach(), (0, -weight.shape[1] % GROUP_SIZE)), "int4")
    values = quantized.values.add(8).to(torch.uint8).view(len(weight), -1, GROUP_SIZE)
    low, high = values.chunk(2, 2)
    scales = _panels(quantized.scales, gated)
    return _interleave(_panels((low | high << 4).flatten(1), gated)), scales.transpose(1, 2)
