"""How many steps were skipped because their loss or gradient was not finite."""

from __future__ import annotations

import torch
from torch import Tensor


class SkippedSteps:
    """Counts on the device, so that no step has to wait for it."""

    def __init__(self, total: int, in_a_row: int, device: torch.device) -> None:
        """Start from all skipped steps of an earlier part of the run, and those of them that came last."""
        # [total, length of the current row, longest row since the last `read`]
        self._counts = torch.tensor([total, in_a_row, in_a_row], device=device)

    def count(self, skipped: Tensor) -> None:
        """Count one step; `skipped` is a bool scalar on the device."""
        flag = skipped.to(self._counts.dtype)
        total, row, longest = self._counts.unbind()
        row = (row + 1) * flag
        self._counts = torch.stack((total + flag, row, torch.maximum(longest, row)))

    def read(self) -> tuple[int, int, int]:
        """Return (all skipped steps, those that came last, the most in a row since the last call).

        It waits for the device.
        """
        total, row, longest = self._counts.tolist()
        self._counts[2] = row
        return total, row, longest
