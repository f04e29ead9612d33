"""Who may use the API: keys, and the middleware that asks for one."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Collection
from ipaddress import ip_address
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from llama_ray.utils.errors import UserError, first_line
from serve_app.errors import ApiError, error_response

KEYS_VARIABLE = "LLAMA_RAY_API_KEYS"
"""Keys, separated by spaces or commas."""
_LEAST_CHARACTERS = 16


def digest(key: str) -> str:
    """Return what is kept of a key: its SHA-256. Keys are random and long, so that is enough."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(file: str | None) -> tuple[str, ...]:
    """Return the digests of the keys of a file and of LLAMA_RAY_API_KEYS; empty if there are none.

    A line of the file is a name and the SHA-256 of a key in hexadecimal digits, as `python -m serve_app.keys` prints
    it; empty lines and those that begin with # count as none. Raises UserError for a file that cannot be read, has no
    keys, or holds anything else, and for a key that could be guessed.
    """
    found = [] if file is None else _of_file(Path(file).expanduser())
    for number, key in enumerate(re.split(r"[\s,]+", os.environ.get(KEYS_VARIABLE, "").strip(" ,\n")), 1):
        if not key:
            continue
        if len(key) < _LEAST_CHARACTERS:
            raise UserError(
                f"{KEYS_VARIABLE} has {len(key)} characters in key {number}; it must have at least "
                f"{_LEAST_CHARACTERS}; python -m serve_app.keys makes one"
            )
        found.append(digest(key))
    return tuple(dict.fromkeys(found))


def _of_file(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"api_keys is {file}, which cannot be read ({first_line(error)})") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"\s*\S+\s+([0-9a-f]{64})\s*", line)
        if match is None:
            # Not the line: it may be a key.
            raise UserError(
                f"api_keys is {file}, whose line {number} is no name with a SHA-256; python -m serve_app.keys NAME "
                "prints one"
            )
        found.append(match[1])
    if not found:
        raise UserError(
            f"api_keys is {file}, which has no keys; python -m serve_app.keys NAME prints a line for it"
        )
    return found


def check_address(host: str | None, *, has_keys: bool, allow_anonymous: bool) -> None:
    """Raise UserError if everybody who reaches `host`, where HTTP is listened for, could use the API without a key."""
    if has_keys or allow_anonymous or host is None or _is_loopback(host):
        return
    raise UserError(
        f"the endpoint would listen on {host} and ask for no key; start Serve with `serve start --http-host 127.0.0.1` "
        "(http_options.host in a config file), or give api_keys, or allow_anonymous=true"
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class KeyRequired:
    """Answers 401 to requests without one of the keys of `digests`, except for `open_paths`."""

    def __init__(self, app: ASGIApp, digests: Collection[str], open_paths: Collection[str]) -> None:
        self._app, self._open_paths = app, frozenset(open_paths)
        self._digests = [digest.encode() for digest in digests]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, as an ASGI application."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            try:
                self._check(scope)
            except ApiError as error:
                # The client may still be sending its body.
                headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
                await error_response(error, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            raise _refusal("this server asks for a key; send it as `Authorization: Bearer KEY`", "no_api_key")
        scheme, _, key = given[0].partition(b" ")
        if scheme.lower() != b"bearer" or len(given) > 1 or not self._knows(key.strip()):
            raise _refusal(
                "the key of `Authorization: Bearer KEY` is not one of this server", "invalid_api_key"
            )

    def _knows(self, key: bytes) -> bool:
        given = hashlib.sha256(key).hexdigest().encode()
        # All of them, so that the time does not tell which one is like it.
        return sum(hmac.compare_digest(given, known) for known in self._digests) > 0


def _refusal(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code)
