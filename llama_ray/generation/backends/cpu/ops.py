"""The kernels as functions of tensors. Each checks its arguments and runs C++ without the GIL."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from llama_ray.generation.backends.cpu import abi
from llama_ray.generation.backends.cpu.build import load
from llama_ray.generation.sampling.draw import SamplingTensors


def kernels() -> ctypes.CDLL:
    """Return the library; raise RuntimeError if it could not be compiled (`load` has logged why)."""
    library = load()
    if library is None:
        raise RuntimeError("the CPU kernels are not compiled; install a C++ compiler, or use the plain model")
    return library


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of `x` [..., size], which has the weight's dtype, rounded as `RMSNorm` rounds."""
    x = _checked(x, weight.dtype)
    y = torch.empty_like(x)
    size = weight.numel()
    if x.shape[-1] != size or not weight.is_contiguous():
        raise ValueError(
            f"the input has size {x.shape[-1]}; the norm takes contiguous weights of size {size}"
        )
    kernels().rms_norm(
        x.dtype == torch.bfloat16,
        *(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps),
        torch.get_num_threads(),
    )
    return y


def rope_(x: Tensor, heads: int, head_dim: int, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first `heads` heads of each row of `x` [..., size] in place, as `rotate` does.

    `cos` and `sin` are fp32 [positions, head_dim / 2], or any shape with as many values. `positions` must divide the
    number of rows: row r has position r % positions.
    """
    if not x.is_contiguous() or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"rope was given {x.dtype} with strides {x.stride()}; it takes contiguous float32 or bfloat16"
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


def silu_product(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [..., size] of `gate_up` [..., 2 size], rounded as a gated `PackedLinear` rounds."""
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], size))
    kernels().silu_product(
        gate_up.dtype == torch.bfloat16,
        *(gate_up.data_ptr(), y.data_ptr(), y.numel() // size, size),
        torch.get_num_threads(),
    )
    return y


def top_candidates(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the `width` largest logits of each row: values and int64 ids [rows, min(width, size)].

    `logits` are fp32 [rows, size]. Candidates are sorted by descending logit, equal ones by ascending id. The result
    for a row with NaN is unspecified.
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


def draw_filtered(logits: Tensor, tensors: SamplingTensors, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """`DrawFiltered` in one call: a dozen torch operations on small tensors would take longer than the draw."""
    short = torch.empty(len(keys), dtype=torch.bool)
    tokens = _draw(logits, None, tensors, keys, short)
    return tokens, short if tensors.may_be_short(logits.shape[-1]) else None


def draw_from_all(logits: Tensor, rows: Tensor | None, tensors: SamplingTensors, keys: Tensor) -> Tensor:
    """`DrawFromAll` in one pass."""
    return _draw(logits, rows, tensors, keys, None)


def _draw(
    logits: Tensor, selected: Tensor | None, tensors: SamplingTensors, keys: Tensor, short: Tensor | None
) -> Tensor:
    logits, keys = _checked(logits, torch.float32), _checked(keys, torch.int64)
    rows = len(logits if selected is None else selected)
    if keys.numel() != rows or tensors.temperature.numel() != rows:
        raise ValueError(
            f"there are {rows} rows, {keys.numel()} noise keys and {len(tensors.temperature)} rows of sampling "
            "tensors; their numbers must be equal"
        )
    tokens = torch.empty(rows, dtype=torch.int64)
    arguments = abi.DrawArguments(
        tensors.width,
        tensors.may_be_short(logits.shape[-1]),
        *(tensors.temperature.data_ptr(), tensors.outside_top_k.data_ptr(), tensors.no_top_k.data_ptr()),
        *(tensors.top_p.data_ptr(), _address(tensors.log_min_p), keys.data_ptr()),
    )
    kernels().draw(
        *(logits.data_ptr(), _address(selected), rows, logits.shape[-1]),
        *(ctypes.addressof(arguments), tokens.data_ptr(), _address(short), torch.get_num_threads()),
    )
    return tokens


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _checked(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype != dtype or x.device.type != "cpu":
        raise ValueError(
            f"a tensor is {x.dtype} on {x.device}; the CPU kernels take {dtype} here, on the CPU"
        )
    return x.contiguous()
