"""Turns tokens into text as they arrive: whole characters, cut before a stop string."""

from __future__ import annotations

from llama_ray.data.tokenizing.text_stream import TextStream


class StopMatcher:
    """Passes text on as it arrives, up to the first stop string.

    Of several stop strings the first one to be complete counts, and the longest of those complete at the same
    character, so the cut does not depend on how the text is divided into pieces.
    """

    def __init__(self, stop: tuple[str, ...], include: bool = False) -> None:
        """Look for `stop`; the text ends before one of them, or with `include` after it."""
        self._stop, self._include = stop, include
        self._held = ""
        # Leading characters of the held text in which no stop string may end.
        self._passed = 0

    def push(self, piece: str, may_stop: bool = True) -> tuple[str, str | None]:
        """Return the text that may be shown now, and the stop string that ends it, if one does.

        An end of the text that could begin a stop string is held back. With `may_stop` False a stop string that this
        piece completes is text like any other.
        """
        self._held += piece
        if may_stop:
            found = [(start + len(s), start, s) for s in self._stop if (start := self._find(s)) >= 0]
            if found:
                end, start, stop = min(found)
                shown, self._held = self._held[: end if self._include else start], ""
                return shown, stop
        else:
            self._passed = len(self._held)
        keep = max((self._overlap(s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        self._passed = max(self._passed - cut, 0)
        return shown, None

    def flush(self) -> str:
        """Return what is still held back, at the end of the text."""
        shown, self._held = self._held, ""
        return shown

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(self._passed - len(stop) + 1, 0))

    def _overlap(self, stop: str) -> int:
        """Return the length of the longest end of the held text that is a proper prefix of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class TextOutput:
    """The growing text of one sequence; without a tokenizer (`stream` None) it stays empty.

    Stop strings count from token number `min_tokens` on.
    """

    def __init__(
        self,
        stream: TextStream | None,
        stop: tuple[str, ...],
        min_tokens: int = 0,
        *,
        include_stop: bool = False,
    ) -> None:
        self._stream = stream
        self._matcher = StopMatcher(stop, include_stop)
        self._before_stop = min_tokens

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Return the text that this token made certain, and the stop string that ends it, if one does."""
        self._before_stop -= 1
        if self._stream is None:
            return "", None
        return self._matcher.push(self._stream.push(token_id), may_stop=self._before_stop <= 0)

    def finish(self) -> tuple[str, str | None]:
        """Return the rest when no token follows, and the stop string that ends it: the last bytes may complete one."""
        if self._stream is None:
            return "", None
        shown, stop = self._matcher.push(self._stream.flush())
        return (shown, stop) if stop else (shown + self._matcher.flush(), None)
