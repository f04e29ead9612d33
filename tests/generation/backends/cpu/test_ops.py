from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_ray.generation.backends.cpu import ops
from llama_ray.model.layers import RMSNorm, rotate

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("size", [1, 15, 48, 768, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_rounds_where_the_model_rounds(kernels: ctypes.CDLL, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(size, 1e-5).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    x = (torch.randn(2, 20, size) * 3).to(dtype)
    with torch.no_grad():
        result, expected = ops.rms_norm(x, norm.weight, norm.eps), norm(x)
    # The mean is summed in another order, in fp32, which can change a bfloat16 rounding.
    torch.testing.assert_close(result, expected, rtol=1e-2 if dtype == torch.bfloat16 else 2e-6, atol=0)
    if dtype == torch.bfloat16:
        assert (result == expected).float().mean() > 0.995
    assert torch.cat([ops.rms_norm(row, norm.weight, norm.eps) for row in x[0]]).equal(result[0].flatten())


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 14), (4, 64), (2, 80)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_rope_equals_the_plain_model_to_the_bit(
    kernels: ctypes.CDLL, dtype: torch.dtype, heads: int, head_dim: int
) -> None:
    torch.manual_seed(0)
    batch, seq, size = 3, 21, (heads + 1) * head_dim
    x = torch.randn(batch, seq, size).to(dtype)
    angles = torch.randn(seq, head_dim // 2) * 10
    cos, sin = angles.cos(), angles.sin()
    split = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    turned = torch.cat([rotate(split[:, :heads], cos, sin), split[:, heads:]], 1).transpose(1, 2).flatten(2)
    ops.rope_(x, heads, head_dim, cos, sin)
    assert x.equal(turned)


@pytest.mark.parametrize("size", [1, 16, 100, 999, 32000])
@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_candidates_are_the_largest_logits_in_descending_order(
    kernels: ctypes.CDLL, size: int, width: int
) -> None:
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size + width))
    values, ids = ops.top_candidates(logits, width)
    expected = logits.sort(descending=True, stable=True)
    assert values.equal(expected.values[:, :width])
    assert ids.equal(expected.indices[:, :width])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.lists(st.sampled_from([-torch.inf, -1.5, -0.0, 0.0, 1.0, torch.inf]), min_size=1, max_size=400),
    width=st.integers(1, 70),
)
def test_equal_candidates_are_in_order_of_their_ids(
    kernels: ctypes.CDLL, row: list[float], width: int
) -> None:
    logits = torch.tensor([row])
    values, ids = ops.top_candidates(logits, width)
    expected = logits.sort(descending=True, stable=True)
    assert values.equal(expected.values[:, :width])
    assert ids.equal(expected.indices[:, :width])


def test_nan_in_a_row_does_not_change_the_candidates_of_other_rows(kernels: ctypes.CDLL) -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    expected = ops.top_candidates(logits, 30)
    logits[1], logits[2, ::3] = torch.nan, -torch.tensor(torch.nan)
    values, ids = ops.top_candidates(logits, 30)
    for row in (0, 3):
        assert values[row].equal(expected[0][row])
        assert ids[row].equal(expected[1][row])
    assert ((ids >= 0) & (ids < 5000)).all()


def test_wrong_dtypes_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is torch\.bfloat16 on cpu; the CPU kernels take torch\.float32"):
        ops.top_candidates(torch.zeros(1, 5).bfloat16(), 2)
    with pytest.raises(ValueError, match="do not fit 4 positions"):
        ops.rope_(torch.zeros(3, 8), 2, 4, torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="has size 8; the norm takes contiguous weights of size 4"):
        ops.rms_norm(torch.zeros(2, 8), torch.zeros(4), 1e-6)
