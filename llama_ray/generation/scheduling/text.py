"""Tokens that arrive one by one -> text that can be shown: whole characters, cut before a stop string."""

from __future__ import annotations

from llama_ray.data.text_stream import TextStream


class StopMatcher:
    """Passes text on piece by piece, up to the first stop string.

    Of several stop strings the one that is complete first counts, and of those that are complete at the same
    character the longest: where the text is cut does not depend on how it came in pieces.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self._passed = 0  # characters of the held text in which no stop string may end

    def push(self, piece: str, may_stop: bool = True) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string was found (then this was the last of it).

        An end that a stop string could begin with is held back. Stop strings that are complete with a piece that
        `may_stop` excludes are text like any other.
        """
        self._held += piece
        if may_stop:
            found = [(start + len(s), start) for s in self._stop if (start := self._find(s)) >= 0]
            if found:
                _, start = min(found)
                shown, self._held = self._held[:start], ""
                return shown, True
        else:
            self._passed = len(self._held)
        keep = max((self._overlap(s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        self._passed = max(self._passed - cut, 0)
        return shown, False

    def flush(self) -> str:
        """What is still held back, at the end of the text."""
        shown, self._held = self._held, ""
        return shown

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(self._passed - len(stop) + 1, 0))

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that is a true beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class TextOutput:
    """The text of one sequence as it grows; without a tokenizer (`stream` None) it stays empty.

    Stop strings count from the token on with which there are `min_tokens`.
    """

    def __init__(self, stream: TextStream | None, stop: tuple[str, ...], min_tokens: int = 0) -> None:
        self._stream = stream
        self._matcher = StopMatcher(stop)
        self._before_stop = min_tokens

    def push(self, token_id: int) -> tuple[str, bool]:
        """The text that became certain with this token, and whether it met a stop string."""
        self._before_stop -= 1
        if self._stream is None:
            return "", False
        return self._matcher.push(self._stream.push(token_id), may_stop=self._before_stop <= 0)

    def finish(self) -> tuple[str, bool]:
        """The rest, when no token follows; its last bytes may complete a stop string."""
        if self._stream is None:
            return "", False
        shown, stopped = self._matcher.push(self._stream.flush())
        return (shown, True) if stopped else (shown + self._matcher.flush(), False)
