"""Functions in threads of their own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref

import pytest

from serve_app.replica.threads import in_thread


class Weights:
    """Something large."""


def test_the_result_is_returned_and_not_kept() -> None:
    async def run() -> None:
        weights = Weights()
        kept = weakref.ref(weights)
        assert await in_thread("test", lambda weights=weights: weights) is weights
        del weights
        assert kept() is None

    asyncio.run(run())


def test_an_error_is_raised() -> None:
    with pytest.raises(ValueError, match="no weights"):
        asyncio.run(in_thread("test", lambda: int("no weights")))


def test_the_event_loop_goes_on_and_a_cancelled_call_leaves_its_thread() -> None:
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        go_on.wait(60)
        ended.set()

    async def run() -> None:
        call = asyncio.create_task(in_thread("test", work))
        await in_thread("other", lambda: started.wait(60))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        go_on.set()
        assert await in_thread("other", lambda: ended.wait(60))

    asyncio.run(run())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_niceness_is_that_of_the_thread_alone() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    assert asyncio.run(in_thread("test", niceness, niceness=3)) == before + 3
    assert niceness() == before
