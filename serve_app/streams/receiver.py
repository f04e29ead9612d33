"""The API's end of the streams: listens for the replicas' connections, and hands each stream its events."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets
from collections import deque
from typing import cast

from serve_app.streams.frames import FrameError, FrameReader, frame, from_wire
from serve_app.streams.messages import Address, Event

_log = logging.getLogger(__name__)

_HELLO_BYTES = 1024
"""Limit of the first frame, before which a peer is unknown."""
_HELLO_TIMEOUT_S = 10.0


class Lost(Exception):
    """No more events will come: the replica or its connection has gone.

    `failed`: the replica itself raised an error, as the next one may.
    """

    def __init__(self, reason: str, *, failed: bool = False) -> None:
        super().__init__(reason)
        self.failed = failed


class Stream:
    """The events of one submission, in order. `number` is its name on the connection."""

    def __init__(self, number: int, streams: dict[int, Stream]) -> None:
        self.number = number
        self._streams = streams
        self._events: deque[Event] = deque()
        self._loss: Lost | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._connection: _Connection | None = None

    async def next(self) -> list[Event]:
        """Wait for an event, and return all that have come. Raises Lost once there are no more."""
        if not self._events:
            if self._loss is not None:
                raise self._loss
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
            if not self._events:
                assert self._loss is not None
                raise self._loss
        events = list(self._events)
        self._events.clear()
        return events

    def lose(self, loss: Lost) -> None:
        """End the stream, after the events that have come."""
        self._loss = self._loss or loss
        self._wake()

    def close(self) -> None:
        """Receive no more events, and have the replica drop what it still does for the stream."""
        if self._streams.pop(self.number, None) is not None and self._connection is not None:
            self._connection.leave(self)

    def push(self, event: Event, connection: _Connection) -> None:
        """Add an event that came on `connection`."""
        if self._connection is None:
            self._connection = connection
            connection.streams.add(self)
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Receiver:
    """Listens at `address` for model replicas, which know its key from the submissions. Use it in one event loop."""

    def __init__(
        self,
        address: Address,
        server: asyncio.Server,
        streams: dict[int, Stream],
        transports: set[asyncio.Transport],
    ) -> None:
        self.address, self._server, self._streams, self._transports = address, server, streams, transports
        self._numbers = itertools.count(1)

    @classmethod
    async def listen(cls, host: str) -> Receiver:
        """Return a receiver on a free port of `host`, an address of this machine that replicas can reach."""
        key, streams, transports = secrets.token_bytes(32), dict[int, Stream](), set[asyncio.Transport]()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(key, streams, transports), host, 0)
        return cls(Address(host, server.sockets[0].getsockname()[1], key), server, streams, transports)

    def open(self) -> Stream:
        """Return a new stream; `close` it in the end."""
        stream = Stream(next(self._numbers), self._streams)
        self._streams[stream.number] = stream
        return stream

    def close(self) -> None:
        """Listen no longer, and lose all streams."""
        self._server.close()
        for transport in list(self._transports):
            transport.abort()


class _Connection(asyncio.Protocol):
    """A replica's connection: a frame with the key, then a frame of messages for each step."""

    def __init__(self, key: bytes, streams: dict[int, Stream], transports: set[asyncio.Transport]) -> None:
        self.streams: set[Stream] = set()
        """Those that have got events from here."""
        self._key, self._by_number, self._transports = key, streams, transports
        self._known = False
        self._reader = FrameReader(_HELLO_BYTES)
        self._transport: asyncio.Transport | None = None
        self._hello: asyncio.TimerHandle | None = None
        self._left: list[int] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Those of uvloop, which Serve uses, are no asyncio.Transport.
        self._transport = transport = cast(asyncio.Transport, transport)
        self._transports.add(transport)
        self._hello = asyncio.get_running_loop().call_later(_HELLO_TIMEOUT_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        try:
            for value in self._reader.feed(data):
                if self._known:
                    self._take(value)
                else:
                    self._greet(value)
        except (FrameError, TypeError, ValueError) as error:
            _log.error("a connection of a replica is closed: %s", error)
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        assert self._transport is not None
        self._transports.discard(self._transport)
        if self._hello is not None:
            self._hello.cancel()
        for stream in self.streams:
            stream.lose(Lost("the replica that was answering has gone"))

    def leave(self, stream: Stream) -> None:
        """Tell the replica, soon, that nobody wants the rest of a stream."""
        self.streams.discard(stream)
        if not self._left:
            asyncio.get_running_loop().call_soon(self._send_left)
        self._left.append(stream.number)

    def _send_left(self) -> None:
        left, self._left = self._left, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(left))

    def _greet(self, value: object) -> None:
        if not isinstance(value, bytes) or not hmac.compare_digest(value, self._key):
            raise FrameError("its key is not that of this process")
        self._known, self._reader.limit = True, FrameReader().limit
        assert self._hello is not None
        self._hello.cancel()

    def _take(self, messages: list[list[object]]) -> None:
        for message in messages:
            number, event = from_wire(message)
            # A client that has left may have a few events on the way.
            if (stream := self._by_number.get(number)) is not None:
                stream.push(event, self)
