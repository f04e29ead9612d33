"""Files behind `https://`, read by ranges where the server has them."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import http.client
import io
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from llama_ray.utils.errors import printable

_TIMEOUT_S = 60
_TRIES = 4
PAUSE_S = 1.0
_NOW_AND_THEN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed."""


class Remote(NamedTuple):
    """What a server says of a file: `size` in bytes, 0 if it does not say; `version` changes with the content."""

    size: int
    version: int
    ranges: bool


def look_up(url: str) -> Remote:
    """Ask for the first byte of a file, and so whether the server has ranges. Raises OSError."""
    with _answer(url, {"Range": "bytes=0-0"}) as answer:
        ranges = answer.status == HTTPStatus.PARTIAL_CONTENT
        content_range = answer.headers.get("Content-Range", "")
        size = content_range.rpartition("/")[2] if ranges else answer.headers.get("Content-Length", "")
        return Remote(int(size) if size.isdecimal() else 0, _version(answer), ranges and size.isdecimal())


class HttpFile(io.RawIOBase):
    """A file behind a URL as a binary stream; it can seek if the server has ranges.

    A connection that breaks is made again where the server has ranges. Raises OSError.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.remote = look_up(url)
        self._position = self._answer_position = 0
        self._answer: Any = None

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def seekable(self) -> bool:
        """Whether it can be read from any place."""
        return self.remote.ranges

    def tell(self) -> int:
        """Return the place from which it is read next."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place. Raises OSError where the server has no ranges."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.remote.size}[whence]
        if base + offset != self._position:
            if not self.remote.ranges:
                raise io.UnsupportedOperation(f"the server of {printable(self._url)} has no ranges")
            self._position = base + offset
        return self._position

    def size(self) -> int:
        """Return the size in bytes."""
        return self.remote.size

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, fewer only at the end."""
        if size < 0:
            return self.readall()
        parts = []
        while size and (part := self._read_some(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as one answer reaches."""
        content = self._read_some(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """End the connection."""
        self._disconnect()
        super().close()

    def _read_some(self, size: int) -> bytes:
        for tries in range(_TRIES):
            if self.remote.ranges and self._position >= self.remote.size:
                return b""
            if self._answer_position != self._position:
                self._disconnect()
            try:
                if self._answer is None:
                    self._answer_position = self._position
                    self._answer = _open(self._url, self._range())
                content: bytes = self._answer.read(size)
                if content or not self._is_short():
                    self._position += len(content)
                    self._answer_position = self._position
                    return content
                raise OSError("the connection ended too early")
            except (OSError, http.client.HTTPException) as error:
                self._disconnect()
                if tries == _TRIES - 1 or (self._position and not self.remote.ranges):
                    raise OSError(f"{printable(self._url)}: {error or type(error).__name__}") from error
                time.sleep(PAUSE_S * 2**tries)
        return b""

    def _range(self) -> dict[str, str]:
        return {"Range": f"bytes={self._position}-"} if self.remote.ranges else {}

    def _is_short(self) -> bool:
        return self._position < self.remote.size

    def _disconnect(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None


def _open(url: str, headers: dict[str, str]) -> Any:
    address = urlsplit(url)
    user, at, host = address.netloc.rpartition("@")
    address = address._replace(netloc=host, fragment="")
    request = urllib.request.Request(urlunsplit(address), headers={"User-Agent": "llama_ray", **headers})
    if at:
        # Not for the host that a redirection leads to.
        secret = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    if "Range" in headers and not headers["Range"].startswith("bytes=0-") and answer.status != 206:
        answer.close()
        raise OSError("the server ignored the range")
    return answer


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[Any]:
    for tries in range(_TRIES):
        try:
            answer = _open(url, headers)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and headers:
                    # An empty file has no first byte.
                    headers = {}
                    continue
                if error.code not in _NOW_AND_THEN or tries == _TRIES - 1:
                    raise OSError(f"the server says {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            if tries == _TRIES - 1 or isinstance(error, urllib.error.URLError):
                raise OSError(str(getattr(error, "reason", error))) from error
        else:
            with answer:
                yield answer
            return
        time.sleep(PAUSE_S * 2**tries)


def _version(answer: Any) -> int:
    """Return when the file was written in ns, or a number made of its entity tag, or 0."""
    tag, written = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
    if tag:
        return int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=7).digest(), "little")
    try:
        return int(email.utils.parsedate_to_datetime(written).timestamp() * 1e9) if written else 0
    except ValueError:
        return 0
