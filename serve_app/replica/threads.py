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
    future: asyncio.Future[Result] = loop.create_future()
    work = [function]
    del function

    def run() -> None:
        if niceness and sys.platform == "linux":
            # Of this thread alone, on Linux.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        try:
            # Once the future is done, nothing here keeps what the function holds.
            with panics_as_errors():
                result = work.pop()()
        except BaseException as error:
            # RuntimeError: the loop is closed, and nobody waits for the result.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_fail, future, error)
        else:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_set, future, result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future


def _set(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Result], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
