"""Products of one row with what belongs to them, beside the same operations one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed (the CPU build of torch comes without)")

from llama_ray.generation.backends.cuda.one_row import RowProduct, RowTile, multiply_row
from llama_ray.generation.backends.quantize import Quantization, quantize
from tests.generation.helpers import dequantize


def random(
    *shape: int, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype)


def normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 128), (33, 200), (6, 1500)])
@pytest.mark.parametrize("tile", [RowTile(4, 1024, 4), RowTile(8, 64, 2)])
def test_a_row_is_multiplied(
    quantization: Quantization | None, outputs: int, inputs: int, tile: RowTile, device: torch.device
) -> None:
    x, weight = random(1, inputs, device=device), random(outputs, inputs, device=device, seed=1)
    values, scales, exact = weight, None, weight
    if quantization:
        rounded = quantize(weight, quantization)
        values, scales, exact = rounded.values, rounded.scales.squeeze(1), dequantize(rounded)
    expected = (x.double() @ exact.double().T).float()
    torch.testing.assert_close(multiply_row(x, values, scales, tile=tile), expected, atol=1e-5, rtol=1e-5)
    residual = random(1, outputs, device=device, seed=2)
    torch.testing.assert_close(
        multiply_row(x, values, scales, residual=residual, tile=tile),
        residual + expected,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_norm_goes_before_and_a_gate_after_the_product(
    quantization: Quantization | None, device: torch.device, half: torch.dtype
) -> None:
    x, norm = random(1, 160, device=device, dtype=half) * 9, 1 + random(160, device=device, dtype=half)
    product = RowProduct(random(96, 160, device=device, seed=3, dtype=half), quantization, False)
    assert product.takes_one_row(x)
    weight = product.weight.float() * (1 if product.scales is None else product.scales[:, None])
    gate, up = (normalised(x, norm, 1e-5).float() @ weight.T).chunk(2, dim=-1)
    got = product.row(x, (norm, 1e-5), gated=True)
    torch.testing.assert_close(got.float(), F.silu(gate) * up, atol=2e-2, rtol=2e-2)


def test_several_rows_are_added_to_the_residual(device: torch.device) -> None:
    product = RowProduct(random(24, 64, device=device), None, False)
    x, residual = random(1, 5, 64, device=device, seed=4), random(1, 5, 24, device=device, seed=5)
    expected = residual + x @ product.weight.T
    torch.testing.assert_close(product.add_to(residual.clone(), x), expected, atol=1e-5, rtol=1e-5)
    assert not product.takes_one_row(x)
