from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the CPU build of torch comes without)")

import torch.nn.functional as F

from llama_ray.generation.backends.cuda.elementwise import rms_norm, swiglu
from llama_ray.model.layers import RMSNorm


def noise(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("size", [48, 64, 2304])
def test_rms_norm_equals_the_plain_layer(
    size: int, precise: bool, device: torch.device, half: torch.dtype
) -> None:
    dtype = torch.float32 if precise else half
    norm = RMSNorm(size, 1e-5).to(device, dtype)
    norm.weight.data.copy_(noise(size, device=device, dtype=dtype))
    x = noise(2, 3, size, device=device, dtype=dtype) * 4
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if precise else {"atol": 1e-3, "rtol": 0.01}
    torch.testing.assert_close(rms_norm(x, norm.weight, 1e-5), norm(x), **tolerance)
    every_other = x.view(6, size)[::2]
    torch.testing.assert_close(rms_norm(every_other, norm.weight, 1e-5), norm(every_other), **tolerance)


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("size", [24, 1500])
def test_swiglu_equals_the_plain_formula(
    size: int, precise: bool, device: torch.device, half: torch.dtype
) -> None:
    dtype = torch.float32 if precise else half
    x = noise(1, 5, 2 * size, device=device, dtype=dtype) * 8
    gate, up = x.chunk(2, -1)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if precise else {"atol": 1e-3, "rtol": 0.01}
    torch.testing.assert_close(swiglu(x), F.silu(gate) * up, **tolerance)


@pytest.mark.parametrize("function", [lambda x: rms_norm(x, x[0], 1e-6), swiglu])
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(
    function, device: torch.device, half: torch.dtype
) -> None:  # type: ignore[no-untyped-def]
    x = noise(37, 640, device=device, dtype=half)
    assert torch.equal(function(x)[:1], function(x[:1]))
