"""How fast a run is, and how close to the limits of its hardware."""

from __future__ import annotations

import math
import resource
import time

import torch

from llama_ray.training.config import Precision
from llama_ray.training.precision import DTYPES

# Dense bf16 FLOP/s of one GPU, from the vendors' data sheets.
_PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "T4": 65e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device, precision: Precision) -> float:
    """Return the FLOP/s that MFU is a share of: for a GPU the dense bf16 figure of its data sheet.

    For a CPU, and for a GPU that is not listed, it is the rate of a large matrix product in the run's precision,
    which is measured here (well under a second).
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, flops in _PEAK_BF16.items():
            if known in name:
                return flops
    # Without fp16 units a product of 1024 x 1024 takes seconds.
    slow = device.type == "cpu" and precision == "fp16"
    return measured_matmul_flops(device, precision, 512 if slow else 1024)


def measured_matmul_flops(device: torch.device, precision: Precision, size: int = 1024) -> float:
    """Return the FLOP/s of the fastest of six products of two `size` x `size` matrices."""
    a = torch.ones(size, size, device=device, dtype=DTYPES[precision])
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        # Reading an element waits for the device.
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this worker has held so far: on its GPU, or resident in its process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Throughput:
    """Counts tokens and seconds between calls of `read`, without the time between `pause` and `resume`."""

    def __init__(self, peak_flops: float, world_size: int) -> None:
        """Start the clock. `peak_flops` is that of one worker."""
        self._peak = peak_flops * world_size
        self._tokens, self._flops, self._seconds = 0, 0.0, 0.0
        self._since = time.perf_counter()

    def count(self, tokens: int, flops_per_token: int) -> None:
        """Add `tokens`, the targets of one step of all workers; for `flops_per_token` see `LlamaConfig`."""
        self._tokens += tokens
        self._flops += tokens * flops_per_token

    def pause(self) -> None:
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Start the clock again after `pause`."""
        self._since = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Return (tokens/s of all workers, MFU) since the last call; MFU is between 0 and 1."""
        self.pause()
        self.resume()
        seconds = max(self._seconds, 1e-9)
        rate, flops = self._tokens / seconds, self._flops / seconds
        self._tokens, self._flops, self._seconds = 0, 0.0, 0.0
        return rate, flops / self._peak


def perplexity(loss: float) -> float:
    """Return exp(`loss`) for a loss in nats per token, bounded so that a diverging run still logs a finite number."""
    return math.exp(min(loss, 700.0))
