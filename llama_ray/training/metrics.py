"""How fast a run is, and how close to what its hardware could do."""

from __future__ import annotations

import math
import resource
import time

import torch

from llama_ray.training.config import Precision
from llama_ray.training.precision import DTYPES

# Dense bf16 FLOP/s of one GPU, from the makers' data sheets.
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
    """FLOP/s that MFU is measured against: the data sheet's dense bf16 figure for a GPU.

    For a CPU, and for a GPU that is not listed, it is the rate of a large matrix product in the run's precision,
    measured on the spot (well under a second).
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, flops in _PEAK_BF16.items():
            if known in name:
                return flops
    slow = device.type == "cpu" and precision == "fp16"  # without fp16 units a product of 1024 takes seconds
    return measured_matmul_flops(device, precision, 512 if slow else 1024)


def measured_matmul_flops(device: torch.device, precision: Precision, size: int = 1024) -> float:
    """FLOP/s of the best of a few products of two `size` x `size` matrices."""
    a = torch.ones(size, size, device=device, dtype=DTYPES[precision])
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this worker has held so far: on its GPU, or resident in its process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Throughput:
    """Tokens and seconds since the last look; validation and checkpoints are kept out by `pause` and `resume`."""

    def __init__(self, flops_per_token: int, peak_flops: float, world_size: int) -> None:
        self._flops_per_token, self._peak = flops_per_token, peak_flops * world_size
        self._tokens, self._seconds = 0, 0.0
        self._since = time.perf_counter()

    def count(self, tokens: int) -> None:
        """Add the `tokens` of one step of all workers."""
        self._tokens += tokens

    def pause(self) -> None:
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Let the clock run again after `pause`."""
        self._since = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(tokens/s of all workers, MFU as a share of 1) since the last `read`; see `LlamaConfig.flops_per_token`."""
        self.pause()
        self.resume()
        rate = self._tokens / max(self._seconds, 1e-9)
        self._tokens, self._seconds = 0, 0.0
        return rate, rate * self._flops_per_token / self._peak


def perplexity(loss: float) -> float:
    """exp(`loss`) for a loss in nats per token, bounded so that a run that diverges still has a number to log."""
    return math.exp(min(loss, 700.0))
