"""What is done with every request to the API, whatever its path."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_ray.utils.panics import panics_as_errors
from serve_app.errors import ApiError, error_response


class PanicsAsErrors:
    """Lets the API answer 500 when a native library panics, which its handlers of errors would not catch."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, as an ASGI application."""
        with panics_as_errors():
            await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than `max_bytes` with 413, of which it reads no more than that.

    A body without Content-Length, whose chunks come as they are sent, has the same limit.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on once its body is whole, as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            # The client may still be sending.
            await error_response(error, {"Connection": "close"})(scope, receive, send)
            return
        if body is None:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, or None if the client has gone. Raises ApiError if it is too large."""
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if announced.isdigit():
            self._check(int(announced[:20]))
        parts, size, more = list[bytes](), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check(size)
            more = message.get("more_body", False)
        return b"".join(parts)

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            message = (
                f"the body has more than {self._max_bytes:,} bytes, this server's limit; send less at a time"
            )
            raise ApiError(413, message, code="body_too_large")
