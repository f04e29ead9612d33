"""A real S3 server in a process of its own, and a proxy that stops answering in the middle of an upload."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

BUCKET = "runs"


@contextmanager
def s3_server(*, check_keys: bool = False) -> Iterator[int]:
    """Yield the port of an S3 server on loopback that has one empty bucket; with `check_keys` it knows no key."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    # How many requests it answers before it asks for a key: the one that makes the bucket.
    env = os.environ | ({"INITIAL_NO_AUTH_ACTION_COUNT": "1"} if check_keys else {})
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as server:
        assert server.stderr is not None
        lines = (re.search(r"http://127.0.0.1:(\d+)", line) for line in server.stderr)
        port = next(int(match[1]) for match in lines if match)
        # It prints a line for each request, so the pipe must be emptied.
        drain = threading.Thread(target=server.stderr.read, daemon=True)
        drain.start()
        try:
            httpx.put(f"http://127.0.0.1:{port}/{BUCKET}").raise_for_status()
            yield port
        finally:
            server.terminate()
            drain.join()


def uri(port: int, path: str) -> str:
    """Return the URI of `path` in the bucket."""
    return f"s3://{BUCKET}/{path}?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}"


class StallingProxy:
    """Forwards connections to the server at `server_port`; one that sends `pattern` gets no answer from then on."""

    def __init__(self, server_port: int, pattern: bytes | None = None) -> None:
        self.stalled = threading.Event()
        self._server_port, self._pattern = server_port, pattern
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._broken = False
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections, and cut those that are open."""
        # A thread that waits in a call on a socket wakes up when it is shut down, not when it is closed.
        for each in (self._listener, *self._connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def break_off(self) -> None:
        """Cut all connections, and close new ones at once, until `restore`."""
        self._broken = True
        for each in self._connections:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        """Forward new connections again."""
        self._broken = False

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._broken:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._connections += [client, server]
                for ends in ((client, server, self._pattern), (server, client, None)):
                    threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, pattern: bytes | None) -> None:
        # An OSError means that one end has closed the connection.
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if pattern is not None and pattern in data:
                    self.stalled.set()
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
