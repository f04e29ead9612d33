"""A replica's end of the streams: one connection to each process of the API, for the events of all its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from serve_app.streams.frames import FrameReader, Wire, frame
from serve_app.streams.messages import Address

_CONNECT_TIMEOUT_S = 10.0

Leave = Callable[[], None]
"""Called once if nobody wants the rest of a stream: its client has left, or the connection is lost."""


class Sender:
    """The connections of a replica, each opened when the first stream needs it. Use it in one event loop."""

    def __init__(self) -> None:
        self._connections: dict[Address, asyncio.Task[Connection]] = {}

    async def connect(self, address: Address) -> Connection:
        """Return the connection to `address`. Raises OSError or TimeoutError if nobody answers there."""
        task = self._connections.get(address)
        if task is None or (task.done() and not _is_open(task)):
            task = self._connections[address] = asyncio.create_task(self._open(address))
        # Others may wait for the same connection.
        return await asyncio.shield(task)

    async def _open(self, address: Address) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: Connection(lambda: self._forget(address)), address.host, address.port
                )
        except BaseException:
            self._forget(address)
            raise
        connection.greet(address.key)
        return connection

    def _forget(self, address: Address) -> None:
        self._connections.pop(address, None)

    def close(self) -> None:
        """Close all connections once what was written is sent."""
        for task in list(self._connections.values()):
            if task.done() and _is_open(task):
                task.result().close()


class Connection(asyncio.Protocol):
    """The connection to one process of the API."""

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self._on_lost = on_lost
        self._leave: dict[int, Leave] = {}
        self._reader = FrameReader()
        self.transport: asyncio.Transport | None = None
        self._outgoing: list[Wire] = []

    @property
    def is_open(self) -> bool:
        """Whether what is written has a chance to arrive."""
        return self.transport is not None and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, as a protocol of asyncio."""
        # Those of uvloop, which Serve uses, are no asyncio.Transport.
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        """End all streams, as a protocol of asyncio."""
        self._on_lost()
        leave, self._leave = self._leave, {}
        for left in leave.values():
            left()

    def data_received(self, data: bytes) -> None:
        """Take the numbers of streams that nobody wants, as a protocol of asyncio."""
        for numbers in self._reader.feed(data):
            for number in numbers:
                if (left := self._leave.pop(number, None)) is not None:
                    left()

    def greet(self, key: bytes) -> None:
        """Show that this replica may send."""
        assert self.transport is not None
        self.transport.write(frame(key))

    def add(self, number: int, leave: Leave) -> None:
        """Call `leave` if the rest of stream `number` becomes unwanted before `remove`: at once if nothing arrives."""
        if self.is_open:
            self._leave[number] = leave
        else:
            leave()

    def remove(self, number: int) -> None:
        """Forget a stream that has ended."""
        self._leave.pop(number, None)

    def write(self, message: Wire) -> None:
        """Add a message to the next frame."""
        self._outgoing.append(message)

    def flush(self) -> None:
        """Send what was written as one frame."""
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self.is_open:
            assert self.transport is not None
            self.transport.write(frame(outgoing))

    def close(self) -> None:
        """Close the connection once what was written is sent."""
        assert self.transport is not None
        self.transport.close()


def _is_open(task: asyncio.Task[Connection]) -> bool:
    return not task.cancelled() and task.exception() is None and task.result().is_open
