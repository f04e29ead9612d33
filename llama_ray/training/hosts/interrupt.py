"""Interrupts from outside the training loop, agreed on by all workers so that they act at the same step."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import torch
import torch.distributed as dist

from llama_ray.training.hosts.group import HostGroup


class Interrupt(IntEnum):
    """What the training loop is asked to do; the larger value wins if workers are asked for different things."""

    NONE = 0
    CHECKPOINT = 1
    """Save now and continue: a machine is about to be taken away."""
    STOP = 2
    """Save and end."""
    SUPERSEDED = 3
    """End without saving: a newer attempt goes on with the run."""


class Stopped(Exception):
    """The run was asked to stop; its last checkpoint is that of `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"stopped after step {step}, as asked; --resume goes on from there"
            if step
            else "stopped before the first checkpoint, as asked; start it again without --resume"
        )
        self.step = step


class InterruptAgreement:
    """At each step, sends this worker's interrupt to the others and receives the most urgent one of a step ago.

    The exchange runs beside the step, over the hosts' network, so no step waits for it and no device is synchronised.
    """

    def __init__(self, poll: Callable[[], Interrupt], timeout_s: int) -> None:
        self._poll = poll
        self._group = HostGroup(timeout_s)
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None
        self._answered = Interrupt.NONE

    def next_interrupt(self) -> Interrupt:
        """Return an interrupt to answer after this step, each one once. All workers must call it at each step."""
        if self._work is not None:
            self._work.wait()
        agreed = Interrupt(int(self._flag.item()))
        self._flag.fill_(self._poll())
        self._work = self._group.start_max(self._flag)
        # An interrupt that was withdrawn is answered again when it comes again.
        is_new = agreed > self._answered
        self._answered = agreed
        return agreed if is_new else Interrupt.NONE
