"""The hand-written gradients equal those that torch derives from the formulas."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from llama_ray.model import eager_autograd
from llama_ray.model.config import LlamaConfig
from llama_ray.model.layers import RMSNorm, RotaryEmbedding, rotate

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def both_ways(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[], Tensor], leaves: tuple[Tensor, ...]
) -> list[tuple[Tensor, ...]]:
    """(value, gradients) with the hand-written backward, then with torch's."""
    results = []
    for fused in (True, False):
        monkeypatch.setattr(eager_autograd, "use_fused_backward", lambda x, fused=fused: fused)
        out = function()
        weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, leaves, weight)))
    return results


def assert_equal(results: list[tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_rms_norm(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(48, 1e-5)
    with torch.no_grad():
        norm.weight.normal_(1, 0.3, generator=generator)
    norm.to(dtype)
    x = (3 * torch.randn(2, 5, 48, generator=generator)).to(dtype).requires_grad_()

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext():
            return norm(x)

    results = both_ways(monkeypatch, run, (x, norm.weight))
    assert_equal(results, torch.float32 if mode == "fp32" else torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotate(dtype: torch.dtype, per_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = RotaryEmbedding(LlamaConfig.preset("llama-tiny"))
    rotary.fill_tables()
    positions = torch.arange(14).view(2, 7) if per_row else torch.arange(7)
    # Laid out as in attention, which splits heads off the last dimension.
    x = torch.randn(2, 7, 4 * 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()

    def run() -> Tensor:
        return rotate(x.unflatten(-1, (4, 16)).transpose(1, 2), *rotary(positions))

    assert_equal(both_ways(monkeypatch, run, (x,)), dtype)


def test_the_fused_backward_is_used_only_in_eager_training_on_a_cpu() -> None:
    x = torch.zeros(1)
    assert eager_autograd.use_fused_backward(x)
    with torch.no_grad():
        assert not eager_autograd.use_fused_backward(x)
    assert not eager_autograd.use_fused_backward(torch.zeros(1, device="meta"))
