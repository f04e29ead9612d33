"""Web servers on loopback: one of files, as poor as a test wants it, and a Hugging Face hub with one repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
DATA_SET = "owner/name"


@dataclass
class Web:
    """What the server has, by path, and how it behaves.

    `cuts` and `failures` count answers that end half-way, and that are errors. `users` are those who asked, with their
    passwords.
    """

    contents: dict[str, bytes]
    ranges: bool = True
    says_length: bool = True
    cuts: int = 0
    failures: int = 0
    users: list[str] = field(default_factory=list)
    port: int = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def web_server(contents: Mapping[str, bytes]) -> Iterator[Web]:
    """Serve `contents` by path until the block ends."""
    web = Web(dict(contents))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if scheme := self.headers.get("Authorization"):
                web.users.append(base64.b64decode(scheme.removeprefix("Basic ")).decode())
            content = web.contents.get(path)
            failing = content is not None and web.failures > 0
            if content is None or failing:
                web.failures -= failing
                self.send_response(503 if failing else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if web.ranges else None
            size = len(content)
            if wanted and int(wanted[1]) >= size:
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if wanted else 200)
            if wanted:
                stop = min(int(wanted[2]) + 1, size) if wanted[2] else size
                self.send_header("Content-Range", f"bytes {wanted[1]}-{stop - 1}/{size}")
                content = content[int(wanted[1]) : stop]
            self.send_header("ETag", f'"{hashlib.sha1(web.contents[path]).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if web.says_length:
                self.send_header("Content-Length", str(len(content)))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            if web.cuts and len(content) > 1:
                web.cuts -= 1
                content = content[: len(content) // 2]
                self.close_connection = True
            # Whoever has read enough hangs up.
            with suppress(ConnectionError):
                self.wfile.write(content if with_body else b"")
                return
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_contents(files: Mapping[str, bytes], kind: str = "datasets") -> dict[str, bytes]:
    """What a hub serves that has the data set, or the model of `kind` "models", `owner/name` with these files."""
    api, page = f"/api/{kind}/{DATA_SET}", f"{'' if kind == 'models' else f'/{kind}'}/{DATA_SET}"
    entries = [
        {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        for path, content in files.items()
    ]
    info = json.dumps({"id": DATA_SET, "sha": COMMIT, "siblings": [], "tags": [], "private": False}).encode()
    return {
        api: info,
        f"{api}/revision/main": info,
        f"{api}/revision/v1": info,
        f"{api}/revision/{COMMIT}": info,
        f"{api}/tree/{COMMIT}": json.dumps(entries).encode(),
        **{f"{page}/resolve/{COMMIT}/{path}": content for path, content in files.items()},
    }
