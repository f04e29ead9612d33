"""Tells a task that is cancelled from one whose call of another process was."""

from __future__ import annotations

import asyncio


def raise_if_cancelled() -> None:
    """Raise CancelledError if somebody wants the current task to end.

    A call of Ray Serve raises it, too, where the other end has dropped it.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
