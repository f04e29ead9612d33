"""The kernels as functions of tensors. Each checks what it is given, and leaves the rest to C++ without the GIL."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llama_ray.generation.cpu.build import load
from llama_ray.generation.sampling.draw import SamplingTensors


def kernels() -> ctypes.CDLL:
    """The library; raises RuntimeError where there is none (`load` has said why)."""
    library = load()
    if library is None:
        raise RuntimeError("the CPU kernels are not there; use the plain model, or install a C++ compiler")
    return library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, rounded as in `RMSNorm`: [..., size] of the weight's dtype -> the same."""
    x = _checked(x, weight.dtype)
    y = torch.empty_like(x)
    size = weight.numel()
    if x.shape[-1] != size or not weight.is_contiguous():
        raise ValueError(f"an input of size {x.shape[-1]} meets norm weights of size {size}")
    kernels().rms_norm(
        x.dtype == torch.bfloat16,
        *(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps),
        torch.get_num_threads(),
    )
    return y


def rope_(x: Tensor, heads: int, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    """Turn the first `heads` heads of each row of `x` [..., size] in place, as `rotate` does.

    `cos` and `sin` are fp32 [rows or a divisor, head_dim / 2] in any shape: rows beyond begin again at the first.
    """
    if not x.is_contiguous() or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"rope turns contiguous float32 or bfloat16, not {x.dtype} with strides {x.stride()}"
        )
    size = x.shape[-1]
    rows, positions = x.numel() // size, cos.numel() * 2 // head_dim
    cos, sin = _checked(cos, torch.float32), _checked(sin, torch.float32)
    if rows % positions or heads * head_dim > size or cos.shape != sin.shape:
        raise ValueError(
            f"{rows} rows of {size} do not fit {positions} positions and {heads} heads of {head_dim}"
        )
    kernels().rope(
        x.dtype == torch.bfloat16,
        *(x.data_ptr(), size, rows, heads, head_dim, cos.data_ptr(), sin.data_ptr(), positions),
        torch.get_num_threads(),
    )


def top_candidates(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of each row of fp32 [rows, size] -> values and int64 ids [rows, min(width, size)].

    Sorted: logits fall, and ids rise where logits are equal. A row with NaN gives some answer.
    """
    logits = _checked(logits, torch.float32)
    rows, size = logits.shape
    width = min(width, size)
    values = logits.new_empty(rows, width)
    ids = torch.empty(rows, width, dtype=torch.int64)
    kernels().top_candidates(
        *(logits.data_ptr(), rows, size, width, values.data_ptr(), ids.data_ptr()), torch.get_num_threads()
    )
    return values, ids


class _Draw(ctypes.Structure):
    """`struct Draw` of draw.cpp."""

    _fields_ = (
        ("width", ctypes.c_int64),
        ("may_be_short", ctypes.c_int32),
        ("temperature", ctypes.c_void_p),
        ("beyond_k", ctypes.c_void_p),
        ("from_all", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("log_min_p", ctypes.c_void_p),
        ("place", ctypes.c_void_p),
    )


def draw_filtered(logits: Tensor, filters: SamplingTensors, place: Tensor) -> tuple[Tensor, Tensor | None]:
    """`DrawFiltered` in one call: a dozen operations of torch on a few numbers each take longer than the drawing."""
    short = torch.empty(len(place), dtype=torch.bool)
    tokens = _draw(logits, None, filters, place, short)
    return tokens, short if filters.may_be_short(logits.shape[-1]) else None


def draw_from_all(logits: Tensor, rows: Tensor | None, filters: SamplingTensors, place: Tensor) -> Tensor:
    """`DrawFromAll` in one pass."""
    return _draw(logits, rows, filters, place, None)


def _draw(
    logits: Tensor, which: Tensor | None, filters: SamplingTensors, place: Tensor, short: Tensor | None
) -> Tensor:
    logits, place = _checked(logits, torch.float32), _checked(place, torch.int64)
    rows = len(logits if which is None else which)
    if place.numel() != rows or filters.temperature.numel() != rows:
        raise ValueError(f"{rows} rows meet {place.numel()} places and filters of {len(filters.temperature)}")
    tokens, min_p = torch.empty(rows, dtype=torch.int64), filters.log_min_p
    draw = _Draw(
        filters.width,
        filters.may_be_short(logits.shape[-1]),
        *(filters.temperature.data_ptr(), filters.outside_top_k.data_ptr(), filters.no_top_k.data_ptr()),
        *(filters.top_p.data_ptr(), min_p.data_ptr() if min_p is not None else None, place.data_ptr()),
    )
    kernels().draw(
        *(logits.data_ptr(), which.data_ptr() if which is not None else None, rows, logits.shape[-1]),
        *(ctypes.addressof(draw), tokens.data_ptr(), short.data_ptr() if short is not None else None),
        torch.get_num_threads(),
    )
    return tokens


def _checked(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype or x.device.type != "cpu":
        raise ValueError(f"a CPU tensor of {dtype} is wanted, not {x.dtype} on {x.device}")
    return x.contiguous()
