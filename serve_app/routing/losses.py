"""How often and how long a request may be without a replica."""

from __future__ import annotations

import asyncio

from serve_app.errors import ApiError
from serve_app.streams.receiver import Lost

MAX_LOSSES = 3
"""Replicas in a row that may be lost under a request without a token from it: it may be what kills them."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class Losses:
    """The losses of one request, which has `timeout_s` from each to find a replica that goes on with it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._accepted, self._tokens, self._fruitless = False, 0, 0
        self._pause_s = _FIRST_PAUSE_S
        self.deadline: float | None = None
        """When to give up, by the event loop's clock; None while a replica answers, and before the first loss."""

    def accepted(self) -> None:
        """Note that a replica has taken the request."""
        self._accepted, self.deadline, self._pause_s = True, None, _FIRST_PAUSE_S

    async def lost(self, loss: Lost, tokens: int) -> None:
        """Note a loss after `tokens` tokens in all, and wait before the next try. Raises ApiError (503) at the end."""
        if self._accepted or loss.failed:
            self._fruitless = self._fruitless + 1 if tokens == self._tokens else 1
            self._accepted, self._tokens = False, tokens
        now = asyncio.get_running_loop().time()
        if self.deadline is None:
            self.deadline = now + self._timeout_s
        if self._fruitless > MAX_LOSSES:
            raise _unavailable(f"{loss}, in {self._fruitless} tries in a row without a token")
        if now + self._pause_s >= self.deadline:
            raise _unavailable(f"{loss}, and no other one went on within {self._timeout_s:g} s")
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _unavailable(reason: str) -> ApiError:
    return ApiError(503, f"the model is not available: {reason}", code="unavailable", retry_after_s=5)
