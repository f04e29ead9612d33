"""Ends the work for a request whose client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from fastapi import Request
from starlette.types import Receive

T = TypeVar("T")


class ClientGone(Exception):
    """The client did not wait for its answer."""


async def while_connected(request: Request, work: Coroutine[None, None, T]) -> T:
    """Return the result of `work`; cancel it and raise ClientGone if the client of `request` goes away.

    The body of `request` has been read.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(until_disconnected(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))
    if working.cancelled():
        raise ClientGone
    return working.result()


async def until_disconnected(receive: Receive) -> None:
    """Wait until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
