"""Frames on the connection between a model replica and a process of the API: a length, then a msgpack value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack

from serve_app.streams.messages import ChoiceDelta, Event, Failure, Logprobs, Started

MAX_FRAME_BYTES = 256 * 2**20
"""More than all that the engine gives in one step: 128 choices of many requests with 20 log-probabilities each."""
_LENGTH_BYTES = 4
_STARTED, _DELTAS, _FAILURE = range(3)

Wire = list[Any]
"""What msgpack has made of a message."""


class FrameError(ValueError):
    """Bytes that no frame of the other side has."""


def frame(value: object) -> bytes:
    """Return a value of lists, numbers, texts and bytes as a frame."""
    # A prompt that is echoed may hold lone surrogates.
    data: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return len(data).to_bytes(_LENGTH_BYTES, "big") + data


class FrameReader:
    """Takes bytes as they arrive, and gives the values of the frames that are complete.

    `limit` is that of one frame, in bytes; raises FrameError for one that is larger or broken.
    """

    def __init__(self, limit: int = MAX_FRAME_BYTES) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield the values that `data` completes."""
        buffer = self._buffer
        buffer += data
        while len(buffer) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(buffer[:_LENGTH_BYTES], "big")
            if end > self.limit:
                raise FrameError(f"a frame has {end:,} bytes; it must have at most {self.limit:,}")
            if len(buffer) < end:
                return
            with memoryview(buffer) as view:
                value = _unpack(view[_LENGTH_BYTES:end])
            del buffer[:end]
            yield value


def _unpack(data: memoryview) -> Any:
    try:
        # Token ids are keys of nothing here; maps have texts as keys only.
        return msgpack.unpackb(data, unicode_errors="surrogatepass")
    except (ValueError, msgpack.UnpackException) as error:
        raise FrameError(f"a frame cannot be read: {error}") from error
    finally:
        data.release()


def to_wire(stream: int, event: Event) -> Wire:
    """Return an event of stream number `stream` as lists, numbers and texts."""
    if isinstance(event, list):
        return [stream, _DELTAS, [_delta_to_wire(delta) for delta in event]]
    if isinstance(event, Started):
        return [stream, _STARTED, event.ref, event.prompt_tokens, event.echo, event.prompt_ids]
    return [stream, _FAILURE, event.status, event.message, event.code, event.param]


def from_wire(message: Wire) -> tuple[int, Event]:
    """Return the number of the stream and the event."""
    stream, kind, *rest = message
    if kind == _DELTAS:
        return stream, [_delta_from_wire(delta) for delta in rest[0]]
    if kind == _STARTED:
        return stream, Started(*rest)
    return stream, Failure(*rest)


def _delta_to_wire(delta: ChoiceDelta) -> Wire:
    wire: Wire = [delta.index, delta.text, delta.token_ids, delta.finish_reason]
    if (logprobs := delta.logprobs) is not None:
        wire += (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)
    # What most deltas lack takes no room in theirs.
    if delta.stop_reason is not None or delta.prompt_logprobs is not None or delta.cached_tokens:
        wire += (delta.stop_reason, delta.prompt_logprobs, delta.cached_tokens)
    return wire


def _delta_from_wire(wire: Wire) -> ChoiceDelta:
    index, text, token_ids, finish_reason, *more = wire
    if not more:
        return ChoiceDelta(index, text, token_ids, None, finish_reason)
    logprobs = Logprobs(*more[:4]) if len(more) >= 4 else None
    return ChoiceDelta(index, text, token_ids, logprobs, finish_reason, *more[4 if logprobs else 0 :])
