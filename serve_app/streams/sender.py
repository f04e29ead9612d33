"""A replica's end of the streams: one connection to each process of the API, for the events of all its requests."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from serve_app.streams.frames import FrameReader, Wire, frame
from serve_app.streams.messages import Address

_CONNECT_TIMEOUT_S = 10.0
_READ_BYTES = 2**16
_KEEPALIVE = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 20,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 5,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 4,
}
"""After 20 s of silence a lost machine is noticed within another 20."""

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
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        end = socket.socket(family, socket.SOCK_STREAM)
        end.setblocking(False)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await loop.sock_connect(end, (address.host, address.port))
        except BaseException:
            end.close()
            self._connections.pop(address, None)
            raise
        # A frame is all that there is to say for now.
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that is gone says nothing.
        for option, value in _KEEPALIVE.items():
            end.setsockopt(*option, value)
        connection = Connection(end, lambda: self._forget(address, connection))
        connection.greet(address.key)
        return connection

    def _forget(self, address: Address, ended: Connection) -> None:
        task = self._connections.get(address)
        # Another one may be in its place.
        if task is not None and _is_connected(task) and task.result() is ended:
            del self._connections[address]

    def close(self) -> None:
        """Close all connections once what was written is sent."""
        for task in list(self._connections.values()):
            if _is_open(task):
                task.result().close()


class Connection:
    """The connection to one process of the API. `write` and `flush` belong to the event loop, `send` to any thread."""

    def __init__(self, end: socket.socket, on_lost: Callable[[], None]) -> None:
        self._socket, self._on_lost = end, on_lost
        self._loop = asyncio.get_running_loop()
        self._leave: dict[int, Leave] = {}
        self._reader = FrameReader()
        self._outgoing: list[Wire] = []
        # Guards the socket's end for writing, and the rest of these.
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._closing = self._closed = False
        self._loop.add_reader(self._socket, self._read)

    @property
    def is_open(self) -> bool:
        """Whether what is written has a chance to arrive."""
        return not (self._closing or self._closed)

    def greet(self, key: bytes) -> None:
        """Show that this replica may send."""
        self._send(frame(key))

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
        if outgoing:
            self.send(outgoing)

    def send(self, messages: list[Wire]) -> None:
        """Send a frame now, after those that were sent before; it never waits."""
        if self.is_open:
            self._send(frame(messages))

    def close(self) -> None:
        """Close the connection once what was written is sent."""
        with self._lock:
            self._closing = True
            done = not self._unsent
        if done:
            self.lose()

    def lose(self) -> None:
        """End the connection and all streams, whatever has not been sent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
        self._on_lost()
        leave, self._leave = self._leave, {}
        for left in leave.values():
            left()

    def _send(self, data: bytes) -> None:
        with self._lock:
            if self._closed:
                return
            if self._unsent:
                self._unsent += data
                return
            sent = self._try(data)
            if sent == len(data):
                return
            self._unsent += data[sent:]
        # RuntimeError: the loop is closed, and nobody waits for the events.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._wait_until_writable)

    def _try(self, data: bytes | bytearray) -> int:
        """Return how many bytes the socket took; one that is broken takes all, and its reader notices."""
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            return len(data)

    def _wait_until_writable(self) -> None:
        if not self._closed:
            self._loop.add_writer(self._socket, self._send_rest)

    def _send_rest(self) -> None:
        with self._lock:
            del self._unsent[: self._try(self._unsent)]
            if self._unsent:
                return
            self._loop.remove_writer(self._socket)
            done = self._closing
        if done:
            self.lose()

    def _read(self) -> None:
        """Take the numbers of streams that nobody wants."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.lose()
            return
        for numbers in self._reader.feed(data):
            for number in numbers:
                if (left := self._leave.pop(number, None)) is not None:
                    left()


def _is_connected(task: asyncio.Task[Connection]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _is_open(task: asyncio.Task[Connection]) -> bool:
    return _is_connected(task) and task.result().is_open
