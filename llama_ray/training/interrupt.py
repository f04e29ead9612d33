"""Requests from outside, agreed on by all workers so that they act at the same step."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist


class Interrupt(IntEnum):
    """What somebody outside the loop asks for; the larger one wins where workers ask for different things."""

    NONE = 0
    CHECKPOINT = 1
    """Save now and go on: a machine is about to be taken away."""
    STOP = 2
    """Save and end."""


class Stopped(Exception):
    """The run was asked to stop; its last checkpoint is that of `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}, as asked; --resume goes on from there")
        self.step = step


class Agreement:
    """Each step tells the other workers what this one was asked, and learns what any was asked a step ago.

    The exchange runs beside the step, on a group of its own over the hosts' network, so that nothing waits for it
    and no device is synchronised.
    """

    def __init__(self, asked: Callable[[], Interrupt], timeout_s: int) -> None:
        self._asked = asked
        timeout = timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None
        self._served = Interrupt.NONE

    def next_interrupt(self) -> Interrupt:
        """A request that is to be answered after this step; each is returned once. All workers call it each step."""
        if self._work is not None:
            self._work.wait()
        agreed = Interrupt(int(self._flag.item()))
        self._flag.fill_(self._asked())
        if self._group is not None:
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if agreed <= self._served:
            self._served = agreed  # withdrawn ones may come again
            return Interrupt.NONE
        self._served = agreed
        return agreed
