"""A real S3 server in a process of its own, and a proxy that stops answering in the middle of an upload."""

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
    """Yield the port of an S3 server on loopback that has one empty bucket."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        port = next(int(m[1]) for line in server.stderr if (m := re.search(r"http://127.0.0.1:(\d+)", line)))
        # It prints a line for each request, so the pipe must be emptied.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        httpx.put(f"http://127.0.0.1:{port}/{BUCKET}").raise_for_status()
        yield port
    finally:
        server.terminate()
        server.wait()


def uri(port: int, path: str) -> str:
    """Return the URI of `path` in the bucket."""
    return f"s3://{BUCKET}/{path}?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}"


class StallingProxy:
    """Forwards connections to the server at `server_port`; one that sends `pattern` gets no answer from then on."""

    def __init__(self, server_port: int, pattern: bytes) -> None:
        self.stalled = threading.Event()
        self._server_port, self._pattern = server_port, pattern
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._server_port))
            threading.Thread(target=self._forward, args=(client, server, self._pattern), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, None), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, pattern: bytes | None) -> None:
        try:
            while data := source.recv(1 << 16):
                if pattern is not None and pattern in data:
                    self.stalled.set()
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            # One end has closed the connection.
            pass
