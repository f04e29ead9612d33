from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_ray.generation.backends.cpu.linear import Format, PackedLinear

FORMATS: list[tuple[Format, torch.dtype]] = [
    ("float32", torch.float32),
    ("bfloat16", torch.bfloat16),
    *((f, d) for f in ("int8", "int4") for d in (torch.float32, torch.bfloat16)),
]
SHAPES = [(1, 64, 64), (2, 1, 1), (7, 63, 65), (13, 200, 131), (70, 129, 64), (33, 320, 7)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_products_of_any_shape_are_close_to_the_exact_ones(
    kernels: ctypes.CDLL, format: Format, dtype: torch.dtype, rows: int, inputs: int, outputs: int
) -> None:
    x, weight = normal(rows, inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype, seed=1)
    result = PackedLinear(weight, format, out_dtype=torch.float32)(x)
    assert result.dtype == torch.float32
    # int4 keeps about 3.5 bits of normally distributed weights, and least of a matrix with few values.
    bound = {"float32": 1e-6, "bfloat16": 1e-6, "int8": 0.015, "int4": 0.13}[format]
    assert relative_error(result, x.double() @ weight.double().T) < bound


@pytest.mark.parametrize("inputs", [64, 75])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantised_products_of_exactly_representable_numbers_are_exact(
    kernels: ctypes.CDLL, format: Format, inputs: int
) -> None:
    """Every group and every output has its full range, so that 4 and 8 bits hold all numbers exactly."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-8, 7) if format == "int4" else (-127, 127)
    weight = torch.randint(low, high + 1, (90, inputs), generator=generator).float()
    x = torch.randint(-127, 128, (5, inputs), generator=generator).float()
    weight[:, ::64], x[:, ::64] = low, 127
    weight *= 2.0 ** torch.randint(-3, 3, (90, 1), generator=generator)
    assert PackedLinear(weight, format)(x).equal((x.double() @ weight.double().T).float())


def test_zero_weights_and_zero_inputs_give_zeros(kernels: ctypes.CDLL) -> None:
    weight, x = normal(70, 130), normal(3, 130, seed=1)
    weight[5], weight[:, 64:128], x[1] = 0, 0, 0
    for format in ("float32", "int8", "int4"):
        result = PackedLinear(weight, format)(x)
        assert result.isfinite().all()
        assert not result[:, 5].any()
        assert not result[1].any()


def test_bfloat16_results_are_exact_sums_rounded_once(kernels: ctypes.CDLL) -> None:
    """Sums of small whole numbers are exact in fp32, and many are halfway between two bfloat16 numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-16, 17, (9, 100), generator=generator).bfloat16()
    weight = torch.randint(-16, 17, (77, 100), generator=generator).bfloat16()
    exact = x.double() @ weight.double().T
    assert PackedLinear(weight, "bfloat16")(x).equal(exact.bfloat16())
    assert PackedLinear(weight, "bfloat16", out_dtype=torch.float32)(x).equal(exact.float())


@pytest.mark.parametrize("outputs", [32, 53, 200])
@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_gated_products_round_where_torch_rounds(
    kernels: ctypes.CDLL, format: Format, dtype: torch.dtype, outputs: int
) -> None:
    x, weight = normal(11, 70, dtype=dtype), normal(2 * outputs, 70, dtype=dtype, seed=1)
    gate, up = PackedLinear(weight, format)(x).chunk(2, -1)
    result = PackedLinear(weight, format, gated=True)(x)
    expected = F.silu(gate) * up
    assert result.shape == (11, outputs)
    # The exponentials of the kernels and of torch may differ in fp32's last bit, which can change a bfloat16 rounding.
    torch.testing.assert_close(result, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    if dtype == torch.bfloat16:
        assert (result == expected).float().mean() > 0.99


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(FORMATS),
    rows=st.integers(2, 40),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 200),
    gated=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_row_gives_the_same_bits_alone_in_any_batch_and_with_any_number_of_threads(
    kernels: ctypes.CDLL,
    kind: tuple[Format, torch.dtype],
    rows: int,
    inputs: int,
    outputs: int,
    gated: bool,
    seed: int,
) -> None:
    format, dtype = kind
    x = normal(rows, inputs, dtype=dtype, seed=seed)
    layer = PackedLinear(
        normal(outputs * (1 + gated), inputs, dtype=dtype, seed=seed + 1), format, gated=gated
    )
    whole = layer(x)
    alone = torch.cat([layer(row[None]) for row in x])
    cut = rows // 3 + 1
    parts = torch.cat([layer(x[:cut]), layer(x[cut:])])
    torch.set_num_threads(1)
    assert whole.equal(alone)
    assert whole.equal(parts)
    assert whole.equal(layer(x))
    torch.set_num_threads(2)


@pytest.mark.parametrize(("format", "dtype"), FORMATS)
def test_narrow_and_wide_vectors_agree_to_rounding(
    native: ctypes.CDLL,
    narrow: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    format: Format,
    dtype: torch.dtype,
) -> None:
    from llama_ray.generation.backends.cpu import ops

    x, weight = normal(9, 333, dtype=dtype), normal(100, 333, dtype=dtype, seed=1)
    results = []
    for library in (native, narrow):
        monkeypatch.setattr(ops, "load", lambda library=library: library)
        results.append(PackedLinear(weight, format, out_dtype=torch.float32)(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_nbytes_counts_values_and_scales_of_each_format() -> None:
    weight = normal(128, 256)
    values = weight.numel()
    assert PackedLinear(weight, "float32").nbytes == 4 * values
    assert PackedLinear(weight.bfloat16(), "bfloat16").nbytes == 2 * values
    assert PackedLinear(weight, "int8").nbytes == values + 4 * 128
    assert PackedLinear(weight, "int4").nbytes == values // 2 + 2 * values // 64


def test_unsupported_dtypes_formats_and_sizes_are_refused() -> None:
    weight = normal(8, 8)
    with pytest.raises(ValueError, match="dtype is float16; the CPU kernels support bfloat16 and float32"):
        PackedLinear(weight.half(), "int8")
    with pytest.raises(
        ValueError, match="is 'bfloat16'; with a model in float32 it must be one of float32, int8"
    ):
        PackedLinear(weight, "bfloat16")
    with pytest.raises(ValueError, match=r"of size 9; the weight takes .* of size 8"):
        PackedLinear(weight, "float32")(normal(1, 9))
