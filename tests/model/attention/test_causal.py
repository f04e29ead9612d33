from __future__ import annotations

import pytest
import torch

from llama_ray.model.attention.causal import blockwise_attention, causal_attention, flash_attention


def heads(count: int, seq: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, seq, 16, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("seq", [1, 100, 128, 300])
def test_blockwise_attention_equals_the_kernel_in_values_and_gradients(kv_heads: int, seq: int) -> None:
    results = []
    for attend in (blockwise_attention, flash_attention):
        q, k, v = (heads(n, seq, torch.float32, i) for i, n in enumerate((4, kv_heads, kv_heads)))
        out = attend(q, k, v)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rounding_scores_to_bf16_adds_no_more_error_than_bf16_inputs() -> None:
    q, k, v = (heads(4, 256, torch.float32, i) for i in range(3))
    exact = flash_attention(q, k, v)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    error = (causal_attention(*rounded).float() - exact).abs()
    kernel = (flash_attention(*rounded).float() - exact).abs()
    assert error.mean() < 2 * kernel.mean()
