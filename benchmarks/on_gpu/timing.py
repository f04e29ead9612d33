"""Seconds of work on a device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_s(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one call takes, with the work that it queues."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def median_s(function: Callable[[], object], device: torch.device, times: int, warmup: int = 3) -> float:
    """Return the median seconds of a call, by the device's own clock where it has one."""
    for _ in range(warmup):
        function()
    if device.type != "cuda":
        return statistics.median(wall_s(function, device) for _ in range(times))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in events:
        start.record()
        function()
        end.record()
    wait(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more, and start a new record of peak memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
