"""What goes wrong inside a run, and how often it may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llama_ray.utils.errors import first_line
from llama_ray.utils.memory import is_out_of_memory


class TrainingError(RuntimeError):
    """A run that cannot go on, and could not after a restart; the message says why and what to try."""


class OutOfMemory(MemoryError):
    """A worker had no memory left in `step`. A restart may help where something else had taken it."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(step, reason)
        self.step, self.reason = step, reason

    def __str__(self) -> str:
        return f"out of memory at step {self.step}: {self.reason}"


@contextmanager
def out_of_memory_at(step: int) -> Iterator[None]:
    """Re-raise out-of-memory errors of torch and Python as OutOfMemory(step)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(step, first_line(error)) from error


class Skips:
    """Counts skipped steps on the device: whether a step was one is not asked for each step."""

    def __init__(self, before: int, device: torch.device) -> None:
        # [all of them, those in a row up to now, the longest row since the last look]
        self._counts = torch.tensor([before, 0, 0], device=device)

    def count(self, skipped: Tensor) -> None:
        """Add one step; `skipped` is a bool scalar on the device."""
        flag = skipped.to(self._counts.dtype)
        total, row, longest = self._counts.unbind()
        row = (row + 1) * flag
        self._counts = torch.stack((total + flag, row, torch.maximum(longest, row)))

    def read(self) -> tuple[int, int]:
        """(all skipped steps, the most in a row since the last call); waits for the device."""
        total, row, longest = self._counts.tolist()
        self._counts[2] = row
        return total, longest
