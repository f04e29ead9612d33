"""Each document of a row attends as it does alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llama_ray.model.attention.causal import flash_attention
from llama_ray.model.attention.document_blocks import document_attention
from tests.model.attention.helpers import documents_of, heads, starts_of

ROWS = {
    "one document": (300, [[]]),
    "a single position": (1, [[]]),
    "documents of one token": (140, [[1] * 139]),
    "borders at the borders of blocks": (400, [[128, 128, 128], [256]]),
    "borders beside the borders of blocks": (400, [[127, 2, 126], [129, 127]]),
    "borders at the borders of keys": (400, [[64, 64, 64], [192, 64]]),
    "a long document between short ones": (500, [[3, 400, 5]]),
    "rows with other borders": (260, [[], [1], [130, 70], [259]]),
    "one that ends with the row": (256, [[200, 56]]),
}
"""Length of the rows, and lengths of the documents of each."""


def alone(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """Run torch's causal attention on one document after the other."""
    out = torch.empty_like(query)
    for row, begin, end in documents_of(starts):
        q, k, v = (x[row : row + 1, :, begin:end] for x in (query, key, value))
        out[row, :, begin:end] = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0]
    return out


def assert_as_alone(starts: Tensor, num_heads: int, kv_heads: int) -> None:
    """Compare values and gradients, in fp32."""
    batch, seq = starts.shape
    inputs = [heads((batch, n, seq, 16), i) for i, n in enumerate((num_heads, kv_heads, kv_heads))]
    weight = heads((batch, num_heads, seq, 16), 3).detach()
    results = []
    for attend in (document_attention, alone):
        out = attend(*inputs, starts)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("seq", "rows"), ROWS.values(), ids=ROWS)
def test_documents_attend_as_they_do_alone(seq: int, rows: list[list[int]]) -> None:
    assert_as_alone(starts_of(rows, seq), 4, 4)


@given(
    rows=st.lists(st.lists(st.integers(1, 150), max_size=6), min_size=1, max_size=3),
    seq=st.integers(1, 400),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
)
def test_documents_of_any_lengths_attend_as_they_do_alone(
    rows: list[list[int]], seq: int, heads: tuple[int, int]
) -> None:
    assert_as_alone(starts_of(rows, seq), *heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_no_more_error_than_it_does_in_the_kernel_of_torch(dtype: torch.dtype) -> None:
    starts = starts_of([[100, 30], [7, 200]], 300)
    exact = [heads((2, 4, 300, 16), i) for i in range(3)]
    weight = heads((2, 4, 300, 16), 3).detach()
    rounded = [x.detach().to(dtype).requires_grad_() for x in exact]

    def run(attend: object, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        out = attend(*inputs, starts)  # type: ignore[operator]
        return out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)

    expected, kernel, ours = run(alone, exact), run(alone, rounded), run(document_attention, rounded)
    for a, b, c in zip(ours, kernel, expected, strict=True):
        assert a.dtype is dtype
        assert (a.float() - c).abs().mean() < 2 * (b.float() - c).abs().mean()


def test_autocast_outside_of_it_changes_nothing() -> None:
    inputs, starts = [heads((1, 2, 200, 16), i) for i in range(3)], starts_of([[50, 70]], 200)
    plain = document_attention(*inputs, starts)
    with torch.autocast("cpu", torch.bfloat16):
        inside = document_attention(*inputs, starts)
        gradients = torch.autograd.grad(inside.sum(), inputs)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain.sum(), inputs), rtol=0, atol=0)


def test_what_the_compiler_is_told_of_the_operators_is_true() -> None:
    query, key = heads((2, 4, 150, 16), 0), heads((2, 2, 150, 16), 1)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        document_attention, (query, key, key, starts_of([[40], []], 150)), test_utils=checks
    )


def test_a_row_without_borders_is_causal_attention() -> None:
    inputs = [heads((2, 2, 300, 16), i) for i in range(3)]
    ours = document_attention(*inputs, torch.zeros(2, 300, dtype=torch.int32))
    torch.testing.assert_close(ours, flash_attention(*inputs), rtol=1e-4, atol=1e-5)
