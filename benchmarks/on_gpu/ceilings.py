"""What the device can do at most: copy memory, and multiply matrices of random numbers (ones multiply faster)."""

from __future__ import annotations

import torch
from peers.roofline import Rates

from on_gpu.results import Results
from on_gpu.setting import Setting
from on_gpu.timing import median_s

COPY, PRODUCT, PRODUCT_FP8 = "copy, bytes read and written", "bf16 product", "fp8 product"


def run(setting: Setting, results: Results) -> None:
    """Measure the ceilings."""
    device = setting.device
    bandwidth, product = copy_bandwidth(setting), product_rate(setting)
    results.add(COPY, bandwidth / 1e12, "TB/s")
    results.add(PRODUCT, product / 1e12, "TFLOP/s")
    if setting.on_gpu and torch.cuda.get_device_capability(device) >= (8, 9):
        results.add(PRODUCT_FP8, _fp8_rate(device) / 1e12, "TFLOP/s")


def rates(setting: Setting) -> Rates:
    """Return the ceilings as measured in an earlier part, or else now."""
    results = Results(setting.out)
    bandwidth, product = results.value("ceilings", COPY), results.value("ceilings", PRODUCT)
    measured = (bandwidth or copy_bandwidth(setting) / 1e12, product or product_rate(setting) / 1e12)
    # The int8 products of our kernels compute in bf16.
    return Rates(measured[0] * 1e12, {"bf16": measured[1] * 1e12, "int8": measured[1] * 1e12})


def copy_bandwidth(setting: Setting) -> float:
    """Return bytes/s, read and written, of a copy of 4 GiB."""
    x = torch.empty(setting.size(2**30, 2**20), device=setting.device).normal_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_s(lambda: y.copy_(x), setting.device, 20)


def product_rate(setting: Setting) -> float:
    """Return the FLOP/s of a large square product."""
    size = setting.size(8192, 256)
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_s(lambda: a @ b, setting.device, 20)


def _fp8_rate(device: torch.device, size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones((), device=device)
    right = b.t()

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(a, right, scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / median_s(multiply, device, 20)
