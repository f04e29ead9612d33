"""What the writers of responses have in common: they count what arrives, and end a stream as OpenAI does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing

from serve_app.errors import ApiError
from serve_app.protocol.sampling import StreamOptions, Usage
from serve_app.routing.client import Accepted, Events
from serve_app.streams.messages import ChoiceDelta

_DONE = b"data: [DONE]\n\n"


class DeltaWriter(ABC):
    """Writes a response from the events that follow `accepted`: whole, or as server-sent events."""

    def __init__(self, accepted: Accepted, options: StreamOptions | None) -> None:
        self._prompt_tokens = accepted.prompt_tokens
        self._completion_tokens = self._cached_tokens = 0
        self.include_usage = options is not None and options.include_usage
        self._counts = options is not None and options.continuous_usage_stats

    @abstractmethod
    def response(self, choices: list[ChoiceDelta]) -> str:
        """Return the JSON of a response with these choices, all there is of each."""

    @abstractmethod
    def chunk(self, delta: ChoiceDelta, usage: str | None) -> bytes:
        """Return the server-sent events for what was added to one choice; `usage` is JSON."""

    @abstractmethod
    def ending(self) -> bytes:
        """Return the server-sent events that end a stream."""

    @abstractmethod
    def failing(self, error: ApiError) -> bytes:
        """Return the server-sent events that end a stream with an error."""

    def opening(self) -> bytes:
        """Return the server-sent events that begin a stream, if there are any."""
        return b""

    async def whole(self, events: Events) -> str:
        """Return the response once it is complete, as JSON."""
        by_choice: dict[int, list[ChoiceDelta]] = defaultdict(list)
        async for event in events:
            for delta in self.counted(event):
                by_choice[delta.index].append(delta)
        return self.response([ChoiceDelta.joined(by_choice[index]) for index in sorted(by_choice)])

    async def stream(self, events: Events) -> AsyncGenerator[bytes]:
        """Yield server-sent events, one or more for each delta; those that are ready at the same moment together."""
        async with aclosing(events):
            try:
                if opening := self.opening():
                    yield opening
                async for event in events:
                    deltas = [delta for delta in self.counted(event) if self.has_content(delta)]
                    usage = self.usage().model_dump_json() if self._counts else None
                    if deltas:
                        yield b"".join([self.chunk(delta, usage) for delta in deltas])
                yield self.ending()
            except ApiError as error:
                yield self.failing(error)

    def has_content(self, delta: ChoiceDelta) -> bool:
        """Return whether a delta has anything to send."""
        return bool(delta.text or delta.logprobs or delta.finish_reason)

    def counted(self, event: Accepted | list[ChoiceDelta]) -> list[ChoiceDelta]:
        """Add the deltas' tokens to the usage, and return the deltas."""
        assert isinstance(event, list)
        for delta in event:
            self._completion_tokens += len(delta.token_ids)
            self._cached_tokens += delta.cached_tokens
        return event

    def usage(self) -> Usage:
        """Return the token counts of what has arrived."""
        return Usage.of(self._prompt_tokens, self._completion_tokens, self._cached_tokens)


class ChunkedWriter(DeltaWriter):
    """A writer whose streams are chunks of one form, which `data: [DONE]` ends."""

    @abstractmethod
    def usage_chunk(self) -> bytes:
        """Return the chunk with the token counts."""

    def ending(self) -> bytes:
        """See `DeltaWriter`."""
        return (self.usage_chunk() if self.include_usage else b"") + _DONE

    def failing(self, error: ApiError) -> bytes:
        """See `DeltaWriter`."""
        return server_sent_event(error.response.model_dump_json()) + _DONE


def server_sent_event(data: str) -> bytes:
    """Return the event whose data is this line."""
    return f"data: {data}\n\n".encode()
