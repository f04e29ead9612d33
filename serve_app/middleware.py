"""What is done with every request to the API, whatever its path."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from llama_ray.utils.panics import panics_as_errors


class PanicsAsErrors:
    """Lets the API answer 500 when a native library panics, which its handlers of errors would not catch."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, as an ASGI application."""
        with panics_as_errors():
            await self._app(scope, receive, send)
