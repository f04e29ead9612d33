"""The connection between a replica and the API: what arrives, who may send, and what is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.streams.frames import FrameError, FrameReader, frame, from_wire, to_wire
from serve_app.streams.messages import Address, ChoiceDelta, Event, Failure, Logprobs, Started
from serve_app.streams.receiver import Lost, Receiver
from serve_app.streams.sender import Connection, Sender

TEXTS = st.text(st.characters(codec="utf-8") | st.just("\ud800"))
LOGPROBS = st.builds(
    lambda tokens, values: Logprobs(
        tokens,
        [None, *values[: len(tokens) - 1]],
        [None, *({token: -1.5} for token in tokens[1:])],
        [0] * len(tokens),
    ),
    st.lists(TEXTS, max_size=3),
    st.lists(st.floats(allow_nan=False), min_size=3, max_size=3),
)
DELTAS = st.builds(
    ChoiceDelta,
    st.integers(0, 127),
    TEXTS,
    st.lists(st.integers(0, 2**31)),
    st.none() | LOGPROBS,
    st.sampled_from([None, "stop", "length"]),
    st.none() | TEXTS | st.integers(0, 2**31),
    st.none() | st.lists(st.lists(st.builds(lambda text: [5, -1.5, 2, text], st.none() | TEXTS))),
    st.integers(0, 9),
)
EVENTS = st.one_of(
    st.lists(DELTAS, max_size=4),
    st.builds(
        Started,
        TEXTS,
        st.integers(0, 2**31),
        st.none() | st.lists(TEXTS),
        st.none() | st.lists(st.lists(st.integers(0, 9))),
    ),
    st.builds(Failure, st.integers(400, 599), TEXTS, st.none() | TEXTS, st.none() | TEXTS),
)


@given(st.lists(st.tuples(st.integers(1, 2**40), EVENTS), min_size=1, max_size=5), st.integers(1, 50))
def test_events_arrive_as_they_were_sent_however_the_bytes_are_divided(
    sent: list[tuple[int, Event]], size: int
) -> None:
    data = b"".join(frame([to_wire(stream, event)]) for stream, event in sent)
    reader, received = FrameReader(), list[tuple[int, Event]]()
    for start in range(0, len(data), size):
        for messages in reader.feed(data[start : start + size]):
            received += [from_wire(message) for message in messages]
    assert received == sent


def test_what_most_deltas_lack_takes_no_room_in_their_frames() -> None:
    assert len(frame([to_wire(1, [ChoiceDelta(0, "a", [5])])])) == 4 + 12


def test_a_frame_beyond_the_limit_is_refused_before_it_is_read() -> None:
    reader = FrameReader(limit=100)
    assert list(reader.feed(frame([b"x" * 50]))) == [[b"x" * 50]]
    with pytest.raises(FrameError, match="must have at most 100"):
        list(reader.feed((2**31).to_bytes(4, "big")))
    with pytest.raises(FrameError, match="cannot be read"):
        list(FrameReader().feed((1).to_bytes(4, "big") + b"\xc1"))


def with_receiver(test: Callable[[Receiver], Awaitable[None]]) -> None:
    async def run() -> None:
        receiver = await Receiver.listen("127.0.0.1")
        try:
            async with asyncio.timeout(30):
                await test(receiver)
        finally:
            receiver.close()

    asyncio.run(run())


def delta(text: str) -> list[ChoiceDelta]:
    return [ChoiceDelta(0, text, [1])]


async def connect(address: Address) -> Connection:
    return await Sender().connect(address)


def test_streams_of_one_connection_get_their_own_events_and_a_lost_one_ends_all() -> None:
    async def check(receiver: Receiver) -> None:
        sender, streams = Sender(), [receiver.open() for _ in range(3)]
        connections = await asyncio.gather(*(sender.connect(receiver.address) for _ in range(3)))
        connection = connections[0]
        assert connections == [connection] * 3
        for number, stream in enumerate(streams[:2]):
            connection.write(to_wire(stream.number, delta(f"{number}")))
        connection.flush()
        assert await streams[0].next() == [delta("0")]
        assert await streams[1].next() == [delta("1")]
        connection.write(to_wire(streams[0].number, delta("last")))
        connection.flush()
        connection.close()
        # What was sent is not lost, and a stream that had nothing from here does not end.
        assert await streams[0].next() == [delta("last")]
        for stream in streams[:2]:
            with pytest.raises(Lost, match="has gone"):
                await stream.next()
        again = await sender.connect(receiver.address)
        assert again is not connection
        again.write(to_wire(streams[2].number, delta("2")))
        again.flush()
        assert await streams[2].next() == [delta("2")]
        sender.close()

    with_receiver(check)


def test_a_stream_that_is_closed_tells_the_replica_and_gets_no_more() -> None:
    async def check(receiver: Receiver) -> None:
        connection, left = await connect(receiver.address), asyncio.Event()
        stream = receiver.open()
        connection.add(stream.number, left.set)
        connection.write(to_wire(stream.number, delta("a")))
        connection.flush()
        await stream.next()
        stream.close()
        await left.wait()
        other = receiver.open()
        for number in (stream.number, other.number):
            connection.write(to_wire(number, delta("b")))
        connection.flush()
        assert await other.next() == [delta("b")]
        connection.close()

    with_receiver(check)


def test_the_end_of_the_api_leaves_all_streams() -> None:
    async def check(receiver: Receiver) -> None:
        connection, left = await connect(receiver.address), asyncio.Event()
        connection.add(7, left.set)
        # Until the receiver knows the connection.
        stream = receiver.open()
        connection.write(to_wire(stream.number, delta("a")))
        connection.flush()
        await stream.next()
        receiver.close()
        await left.wait()
        assert not connection.is_open
        # One that begins only now is not generated for nobody.
        left.clear()
        connection.add(8, left.set)
        assert left.is_set()

    with_receiver(check)


def test_whoever_does_not_know_the_key_is_shut_out() -> None:
    async def check(receiver: Receiver) -> None:
        stream = receiver.open()
        address = receiver.address
        strangers = [
            frame(b"x" * 32) + frame([to_wire(stream.number, delta("forged"))]),
            frame([to_wire(stream.number, delta("forged"))]),
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            (2**30).to_bytes(4, "big"),
        ]
        for data in strangers:
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(data)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            writer.close()
        connection = await connect(replace(address))
        connection.write(to_wire(stream.number, delta("true")))
        connection.flush()
        assert await stream.next() == [delta("true")]
        connection.close()

    with_receiver(check)
