from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed (the CPU build of torch comes without)")

from llama_ray.generation.backends.cuda.product import Product, multiply
from llama_ray.generation.backends.cuda.tiles import ProductTile
from llama_ray.generation.backends.quantize import Quantization, quantize
from tests.generation.helpers import dequantize


def weight(outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * inputs**-0.5
    return nn.Parameter(values.to(device, dtype), requires_grad=False)


def inputs(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Check numbers of half precision by the norm of their error: single ones round as their sums cancel."""
    assert (got.double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(("outputs", "width"), [(40, 128), (33, 192), (96, 320)])
@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_products_equal_those_of_the_rounded_weight(
    quantization: Quantization | None, rows: int, outputs: int, width: int, device: torch.device
) -> None:
    w, x = weight(outputs, width, device, torch.float32), inputs(rows, width, device, torch.float32)
    rounded = w if quantization is None else dequantize(quantize(w, quantization))
    expected = x.double() @ rounded.double().T
    for invariant in (False, True):
        got = Product(w, quantization, invariant)(x[None])[0]
        torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_products_in_half_precision_are_close(
    quantization: Quantization, device: torch.device, half: torch.dtype
) -> None:
    w, x = weight(64, 256, device, half), inputs(5, 256, device, half)
    expected = x.double() @ dequantize(quantize(w, quantization)).double().T
    assert_near(Product(w, quantization, False)(x), expected)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(
    quantization: Quantization | None, device: torch.device, half: torch.dtype
) -> None:
    product = Product(weight(96, 256, device, half), quantization, batch_invariant=True)
    x = inputs(150, 256, device, half)
    whole = product(x)
    for rows in (slice(0, 1), slice(149, 150), slice(60, 70), slice(10, 140)):
        assert torch.equal(product(x[rows]), whole[rows])


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_programs_share_the_inputs_of_a_product(
    quantization: Quantization | None, splits: int, device: torch.device
) -> None:
    """Inputs of five steps, so that some programs have fewer than others, or none."""
    w, x = weight(40, 576, device, torch.float32), inputs(3, 576, device, torch.float32)
    product = Product(w, quantization, False)
    rounded = w if quantization is None else dequantize(quantize(w, quantization))
    expected = (x.double() @ rounded.double().T).float()
    arrived = torch.zeros(2, dtype=torch.int32, device=device)
    tile = ProductTile(16, 32, 128, 2, 2, splits)
    for _ in range(2):
        got = multiply(x, product.weight, product.scales, tile, arrived)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert not arrived.any()


@pytest.mark.parametrize("rows", [1, 20, 40, 100, 600])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_any_number_of_rows_is_multiplied(
    quantization: Quantization, rows: int, device: torch.device, half: torch.dtype
) -> None:
    w, x = weight(70, 448, device, half), inputs(rows, 448, device, half)
    expected = x.double() @ dequantize(quantize(w, quantization)).double().T
    assert_near(Product(w, quantization, False)(x), expected)


def test_int4_takes_half_a_byte_per_weight_and_two_bytes_per_scale(
    device: torch.device, half: torch.dtype
) -> None:
    product = Product(weight(96, 256, device, half), "int4", False)
    assert sum(p.nbytes for p in product.parameters()) == 96 * (256 // 2 + 256 // 64 * 2)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_step_in_which_no_prompt_ends_multiplies_no_rows(
    quantization: Quantization | None, invariant: bool, device: torch.device
) -> None:
    product = Product(weight(40, 128, device, torch.float32), quantization, invariant)
    assert product(torch.empty(0, 128, device=device)).shape == (0, 40)


def test_rows_need_not_be_contiguous(device: torch.device) -> None:
    w, x = weight(40, 128, device, torch.float32), inputs(12, 128, device, torch.float32)
    torch.testing.assert_close(
        multiply(x[::3], w, None, ProductTile(16, 32, 64, 4, 2)), x[::3] @ w.T, atol=1e-5, rtol=1e-5
    )
