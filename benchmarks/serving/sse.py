"""One HTTP/1.1 connection that is kept alive and reads server-sent events, by hand: the client shares its processors
with the server that it measures.
"""

from __future__ import annotations

import asyncio
import json
import time

from benchmarks.serving.load import Outcome

_HEAD, _BODY, _CHUNK_SIZE, _CHUNK = range(4)


class Connection(asyncio.Protocol):
    """Sends a request after the other's answer is complete; `ask` never raises."""

    def __init__(self, host: str, port: int, path: str, keep: bool) -> None:
        self._host, self._port, self._path, self._keep = host, port, path, keep
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None

    async def ask(self, number: int, body: bytes, due: float | None = None) -> Outcome:
        """Return what became of the request; `due` is when it should have been sent, now by default."""
        self._outcome = outcome = Outcome(number, time.monotonic() if due is None else due)
        self._buffer, self._events, self._last = b"", b"", b""
        self._state, self._status, self._left = _HEAD, 0, 0
        self._ended = False
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        try:
            if self._transport is None or self._transport.is_closing():
                self._transport, _ = await loop.create_connection(lambda: self, self._host, self._port)
            self._transport.write(self._head(len(body)) + body)
            await self._done
        except (OSError, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
            self.close()
        self._done = None
        return outcome

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _head(self, length: int) -> bytes:
        return (
            f"POST {self._path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    def data_received(self, data: bytes) -> None:
        """Read what arrived. asyncio calls this."""
        now = time.monotonic()
        self._arrived = False
        self._buffer += data
        try:
            complete = self._read()
        except ValueError as error:
            self._finish(f"no HTTP: {error}")
            self.close()
            return
        if self._arrived:
            self._outcome.arrivals.append(now)
        if complete:
            self._finish(None if self._ended else "the stream has no end")

    def connection_lost(self, error: Exception | None) -> None:
        """Note that the server has gone. asyncio calls this."""
        self._transport = None
        self._finish(f"the connection was lost ({error})")

    def _finish(self, error: str | None) -> None:
        if self._done is None or self._done.done():
            return
        if self._outcome.error is None:
            self._outcome.error = error
        self._done.set_result(None)

    def _read(self) -> bool:
        """Take what is complete from the buffer; return whether the response is."""
        while True:
            if self._state == _HEAD:
                head, found, rest = self._buffer.partition(b"\r\n\r\n")
                if not found:
                    return False
                self._buffer = rest
                self._read_head(head.decode("latin-1"))
            elif self._state == _BODY:
                if len(self._buffer) < self._left:
                    return False
                body, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
                self._take(body)
                return True
            elif self._state == _CHUNK_SIZE:
                line, found, rest = self._buffer.partition(b"\r\n")
                if not found:
                    return False
                self._buffer, self._left, self._state = rest, int(line.partition(b";")[0], 16), _CHUNK
            else:
                if len(self._buffer) < self._left + 2:
                    return False
                chunk, self._buffer = self._buffer[: self._left], self._buffer[self._left + 2 :]
                self._state = _CHUNK_SIZE
                if not chunk:
                    return True
                self._take(chunk)

    def _read_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        self._status = int(first.split()[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._outcome.version = headers.get("x-model-version")
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._state = _CHUNK_SIZE
        else:
            self._left, self._state = int(headers.get("content-length", 0)), _BODY

    def _take(self, data: bytes) -> None:
        """Read a part of the body."""
        if self._status != 200:
            self._outcome.error = f"{self._status} {data.decode(errors='replace')[:300]}"
            self._ended = True
            return
        self._events += data
        *events, self._events = self._events.split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: "):
                # A comment keeps the connection alive.
                continue
            if event == b"data: [DONE]":
                self._ended = True
                self._read_usage()
            elif event.startswith(b'data: {"error"'):
                self._outcome.error = event[6:306].decode(errors="replace")
            else:
                self._last = event
                # The event with the usage has no text.
                self._arrived |= b'"choices":[]' not in event
                if self._keep:
                    self._outcome.events.append(event[6:].decode())

    def _read_usage(self) -> None:
        """Read the last event before the end, which has the usage and no text."""
        usage = json.loads(self._last[6:]).get("usage") if self._last else None
        if usage is not None:
            self._outcome.tokens = usage["completion_tokens"]
