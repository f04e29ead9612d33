"""Weight matrices laid out for the kernels, in the model's precision or quantised."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ray.generation.backends.cpu import abi
from llama_ray.generation.backends.cpu.ops import kernels
from llama_ray.generation.backends.huge_pages import Arena
from llama_ray.generation.backends.quantize import GROUP_SIZE, quantize

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
"""In the order of the enum in linear.cpp."""

PANEL = 64
"""Outputs stored together, as columns; the last panel is padded with zeros."""


class PackedLinear(nn.Module):
    """x @ weight.T by the kernels, for a weight [out, in] of float32 or bfloat16; x has the weight's dtype.

    With `gated` the first half of the weight's rows is a gate and the second half an up projection; the result is
    silu(gate) * up, [..., out / 2], rounded wherever torch rounds. `out_dtype` float32 returns the sums unrounded; None
    is the weight's dtype. The weights are stored in `arena`, or in an arena of their own. The result of a row is the
    same to the bit in any batch.

    int8 and int4 are the formats of `quantize`. Both multiply with an input rounded to 8 bits, symmetrically in groups
    of 64 (llama.cpp's q8_0 has groups of 32). Raises ValueError for a dtype or format that the kernels do not support.
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
        # bfloat16 is multiplied in pairs: an odd number of inputs gets a zero more, as its weights did.
        self.pad = self.in_features % 2 if format == "bfloat16" else 0
        self._argument = abi.Linear(
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
        self._run_apart = kernels().linear_apart if gated else None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and scales."""
        return self._weight.nbytes + self._scales.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; gradients are not supported."""
        return self._multiplied(x, self._run, self.out_features)

    def apart(self, x: Tensor) -> Tensor:
        """Return what silu(gate) * up is computed of: [..., in] -> [..., 2 out], gates before ups."""
        assert self._run_apart is not None, "only of a gated weight"
        return self._multiplied(x, self._run_apart, 2 * self.out_features)

    def _multiplied(self, x: Tensor, run: Callable[..., None], width: int) -> Tensor:
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(
                f"the input is {x.dtype} of size {x.shape[-1]}; the weight takes {self.dtype} of size "
                f"{self.in_features}"
            )
        x = F.pad(x, (0, 1)) if self.pad else x.contiguous()
        y = x.new_empty((*x.shape[:-1], width), dtype=self.out_dtype)
        rows = x.numel() // x.shape[-1]
        run(self.address, x.data_ptr(), rows, y.data_ptr(), torch.get_num_threads())
        return y

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        return f"in={self.in_features}, out={self.out_features}, {self.format}, {self.nbytes / 2**20:.1f} MiB"


def check_format(format: Format, dtype: torch.dtype) -> None:
    """Raise ValueError unless the kernels support weights in `format` with activations in `dtype`."""
    allowed = {torch.float32: ("float32", "int8", "int4"), torch.bfloat16: ("bfloat16", "int8", "int4")}
    name = str(dtype).removeprefix("torch.")
    if dtype not in allowed:
        raise ValueError(
            f"dtype is {name}; the CPU kernels support bfloat16 and float32; load the model in one of them"
        )
    if format not in allowed[dtype]:
        raise ValueError(
            f"the weight format is {format!r}; with a model in {name} it must be one of {', '.join(allowed[dtype])}"
        )


def _panels(weight: Tensor, gated: bool) -> Tensor:
    """[out, in] -> [panels, 64, in], padded with zeros; with `gated` each panel is half gate and half up.

    The results of padded rows are never stored, so it does not matter which number a zero byte represents.
    """
    parts = weight.detach().chunk(2) if gated else (weight.detach(),)
    each = PANEL // len(parts)
    split = [F.pad(p, (0, 0, 0, -len(p) % each)).view(-1, each, p.shape[1]) for p in parts]
    return torch.cat(split, 1) if gated else split[0]


def _interleave(panels: Tensor) -> Tensor:
    """[panels, 64, bytes] -> a view [panels, bytes / 4, 64] in units of 32 bits, the layout of product.h."""
    return panels.view(torch.int32).transpose(1, 2)


def _pack_plain(panels: Tensor) -> Tensor:
    odd = panels.shape[2] % 2 if panels.dtype == torch.bfloat16 else 0
    return _interleave(F.pad(panels, (0, odd)))


def _pack_int8(weight: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Return bytes w + 128 [panels, groups * 16, 64, 4] and scales fp32 [panels, 64]."""
    quantized = quantize(F.pad(weight.detach(), (0, -weight.shape[1] % GROUP_SIZE)), "int8")
    values = _panels(quantized.values.to(torch.int16).add_(128).to(torch.uint8), gated)
    return _interleave(values), _panels(quantized.scales, gated)[..., 0]


def _pack_int4(weight: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Return w + 8 as half bytes [panels, groups * 8, 64, 4] and scales bf16 [panels, groups, 64].

    A byte holds value i of its group in its low half and value i + 32 in its high half.
    """
    quantized = quantize(F.pad(weight.detach(), (0, -weight.shape[1] % GROUP_SIZE)), "int4")
    values = quantized.values.add(8).to(torch.uint8).view(len(weight), -1, GROUP_SIZE)
    low, high = values.chunk(2, 2)
    scales = _panels(quantized.scales, gated)
    return _interleave(_panels((low | high << 4).flatten(1), gated)), scales.transpose(1, 2)
