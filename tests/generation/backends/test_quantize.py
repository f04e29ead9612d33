from __future__ import annotations

import pytest
import torch

from llama_ray.generation.backends.quantize import Quantization, quantize
from tests.generation.helpers import dequantize


def weight(rows: int = 48, columns: int = 192) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_errors_are_at_most_half_a_step_of_the_channel(dtype: torch.dtype) -> None:
    w = weight().to(dtype)
    # An outlier reduces the precision of its own channel only.
    w[3] *= 100
    result = quantize(w, "int8")
    step = w.float().abs().amax(1, keepdim=True) / 127
    assert ((dequantize(result) - w.float()).abs() <= step * 0.501).all()
    assert result.values.abs().amax(1).eq(127).all()


def test_int4_errors_are_at_most_one_step_of_the_group() -> None:
    w = weight()
    result = quantize(w, "int4")
    assert result.values.min() == -8
    assert result.values.max() == 7
    assert result.scales.shape == (48, 3)
    step = w.unflatten(1, (3, 64)).abs().amax(2).repeat_interleave(64, 1) / 8
    off = (dequantize(result) - w).abs()
    # Values with the opposite sign of the furthest are clamped to 7.
    assert (off <= step * 1.01).all()
    assert (off <= step * 0.53).float().mean() > 0.99


@pytest.mark.parametrize(("quantization", "noise"), [("int8", 0.01), ("int4", 0.11)])
def test_products_keep_their_precision(quantization: Quantization, noise: float) -> None:
    w = weight(256, 512)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    exact = x @ w.T
    off = x @ dequantize(quantize(w, quantization)).T - exact
    assert off.norm() < noise * exact.norm()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_zeros_stay_zeros(quantization: Quantization) -> None:
    w = weight()
    w[5] = 0
    assert dequantize(quantize(w, quantization))[5].eq(0).all()


def test_unknown_formats_and_unsupported_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'int3'; it must be int8, int4 or None"):
        quantize(weight(), "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has 100 inputs; for int4 they must be a multiple of 64; use int8"):
        quantize(weight(8, 100), "int4")
