"""Run a function in a thread of its own, for work that may take minutes or hang."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from llama_ray.utils.panics import panics_as_errors

Result = TypeVar("Result")


async def in_thread(name: str, function: Callable[[], Result], *, niceness: int = 0) -> Result:
    """Return `function()`, which runs in a new thread called `name` while the event loop goes on.

    Unlike those of a pool, a thread that hangs keeps neither others from running nor the process from ending. On Linux
    the thread, and threads that it starts, get a share of the processors that is smaller by `niceness` (0 to 19).
    Cancelling the call leaves the thread running and drops its result.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    # Lists, which are emptied: the frame of a thread that has come to its end may live a little longer, and must not
    # keep what the function, its result or its error hold, such as the weights of a model.
    work, results, errors = [function], list[Result](), list[BaseException]()
    del function

    def run() -> None:
        if niceness and sys.platform == "linux":
            # Of this thread alone, on Linux.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + niceness)
        try:
            with panics_as_errors():
                results.append(work.pop()())
        except BaseException as error:
            errors.append(error)
        # RuntimeError: the loop is closed, and nobody waits for the result.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_wake, done)

    threading.Thread(target=run, name=name, daemon=True).start()
    await done
    if errors:
        raise errors.pop()
    return results.pop()


def _wake(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
