"""A real S3 server in a process of its own, and a wire to it that can be cut."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

BUCKET = "runs"


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of an S3 server on loopback that has an empty bucket."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        port = next(int(m[1]) for line in server.stderr if (m := re.search(r"http://127.0.0.1:(\d+)", line)))
        drain = threading.Thread(target=server.stderr.read, daemon=True)  # a line for each request
        drain.start()
        httpx.put(f"http://127.0.0.1:{port}/{BUCKET}").raise_for_status()
        yield port
    finally:
        server.terminate()
        server.wait()


def uri(port: int, path: str) -> str:
    """Of `path` in the bucket."""
    return f"s3://{BUCKET}/{path}?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}"


class Wire:
    """Passes bytes on to the server, except what a connection carries from `pattern` on: that gets no answer."""

    def __init__(self, server: int, pattern: bytes) -> None:
        self.reached = threading.Event()
        self._server, self._pattern = server, pattern
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._server))
            threading.Thread(target=self._forward, args=(client, server, self._pattern), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, None), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, stop_at: bytes | None) -> None:
        try:
            while data := source.recv(1 << 16):
                if stop_at is not None and stop_at in data:
                    self.reached.set()
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one end is gone
