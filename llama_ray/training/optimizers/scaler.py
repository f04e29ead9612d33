"""Loss scaling for fp16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_GROWTH_INTERVAL = 2000
_FIRST_SCALE = 2.0**16


class LossScaler:
    """Scales the loss to keep small fp16 gradients above zero (Micikevicius et al. 2018, arXiv:1710.03740).

    The scale halves after a step whose gradient was not finite, and doubles after 2000 finite steps in a row. Unlike
    torch.amp.GradScaler it never waits for the device. It is told whether the gradient of all workers was finite,
    instead of looking at its own worker's, so all workers keep the same scale. If not `enabled`, the scale stays 1.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = torch.full((), _FIRST_SCALE if enabled else 1.0, device=device)
        self._finite_steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, finite: Tensor) -> None:
        """Adapt the scale after a step; `finite`, a bool scalar on the device, says whether its gradient was."""
        if not self.enabled:
            return
        self._finite_steps = torch.where(finite, self._finite_steps + 1, 0)
        grow = self._finite_steps == _GROWTH_INTERVAL
        self.scale = torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale / 2)
        self._finite_steps = torch.where(grow, 0, self._finite_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers; nothing if not `enabled`."""
        if not self.enabled:
            return {}
        return {"scale": self.scale.item(), "finite_steps": int(self._finite_steps.item())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; an empty state changes nothing."""
        if self.enabled and state:
            self.scale.fill_(state["scale"])
            self._finite_steps.fill_(state["finite_steps"])
