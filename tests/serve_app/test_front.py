"""What HAProxy, as `serve.env` sets it, does between clients and the processes of the API."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llama_ray.generation.stats import EngineStats
from serve_app.errors import ErrorResponse
from tests.conftest import SLOW_CLIENT_S
from tests.serve_app.helpers import MAX_SEQ_LEN

HEAD = b"POST /unary?seconds=0 HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"


@pytest.fixture(scope="module")
def front(served: str) -> Iterator[str]:
    """The URL of an application with two processes, which wait as they are told."""
    from ray import serve

    from tests.serve_app.waiting import waiting

    serve.run(waiting(processes=2), name="front", route_prefix="/front")
    url = f"{served}/front"
    while len(processes(url)) < 2:
        pass
    yield url
    serve.delete("front")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


def test_slow_clients_are_cut_off_and_patient_ones_are_not(front: str, pool: ThreadPoolExecutor) -> None:
    longer = SLOW_CLIENT_S + 1.5
    answer = pool.submit(unary, front, longer)
    stream = pool.submit(read, front, items=1, seconds=longer)
    reader = pool.submit(read, front, items=300, seconds=0, size=50_000, pause_s=SLOW_CLIENT_S / 2)
    silent = [connect(front, sent) for sent in [b""] * 100 + [HEAD] * 3 + [HEAD + b"\r\nhalf"] * 3]

    replies = Counter(reply(connection)[:12] for connection in silent)
    assert replies == {b"HTTP/1.1 408": 106}
    assert answer.result().status_code == 200
    assert stream.result() > 0
    assert reader.result() > 300 * 50_000


def test_a_client_that_leaves_while_it_waits_is_noticed(front: str, pool: ThreadPoolExecutor) -> None:
    def leave(_: int) -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{front}/unary?seconds=60", content=b"x" * 100, timeout=0.5)

    before = left(front)
    list(pool.map(leave, range(20)))
    deadline = time.monotonic() + 10
    while (now := left(front)) < before + 20:
        assert time.monotonic() < deadline, f"{now - before} of 20"


def test_a_killed_process_takes_its_streams_along_and_nothing_else(
    front: str, pool: ThreadPoolExecutor
) -> None:
    streams = [Stream(front, seconds=2) for _ in range(8)]
    answers = [pool.submit(unary, front, 2) for _ in range(20)]
    victim = streams[0].process
    time.sleep(0.5)  # Until all of them are sent.
    os.kill(victim, signal.SIGKILL)

    killed = time.monotonic()
    while time.monotonic() < killed + 1.5:
        assert unary(front, 0).status_code == 200
    assert [answer.result().status_code for answer in answers] == [200] * 20
    assert [stream.ends() for stream in streams] == [stream.process != victim for stream in streams]
    # Its replacement takes part soon.
    while len(processes(front) - {victim}) < 2:
        assert time.monotonic() < killed + 30


def test_what_a_hanging_process_was_asked_is_answered_by_another_one(
    front: str, pool: ThreadPoolExecutor
) -> None:
    os.kill(min(processes(front)), signal.SIGSTOP)
    answers = [pool.submit(unary, front, 0) for _ in range(10)]
    assert [answer.result().status_code for answer in answers] == [200] * 10


def test_when_all_processes_are_killed_clients_that_try_again_are_answered_by_the_next_ones(
    front: str, pool: ThreadPoolExecutor
) -> None:
    answers = [pool.submit(unary, front, 1, tries=3) for _ in range(10)]
    time.sleep(0.5)  # Until all of them are sent.
    for process in processes(front):
        os.kill(process, signal.SIGKILL)
    answers += [pool.submit(unary, front, 0, tries=3) for _ in range(10)]
    assert [answer.result().status_code for answer in answers] == [200] * 20


def test_health_and_readiness_are_quick_under_load(served: str, stats: Callable[[], EngineStats]) -> None:
    body = {"model": "tiny", "prompt": "dog", "max_tokens": MAX_SEQ_LEN - 100, "ignore_eos": True}

    async def ask() -> dict[str, list[float]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served, timeout=None, limits=limits) as http:
            # More than run at once, and no more than the replica takes: it has to answer for its engine, too.
            held = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(12)]
            while (await asyncio.to_thread(stats)).running < 8:
                pass
            times = {path: [await timed(http, path) for _ in range(20)] for path in ("/health", "/ready")}
            assert (await asyncio.to_thread(stats)).running == 8
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            return times

    times = asyncio.run(ask())
    assert max(map(statistics.median, times.values())) < 0.1, times


async def timed(http: httpx.AsyncClient, path: str) -> float:
    """The seconds until a 200."""
    began = time.monotonic()
    response = await http.get(path)
    assert response.status_code == 200, response.text
    return time.monotonic() - began


def unary(front: str, seconds: float, tries: int = 1) -> httpx.Response:
    """An answer after some seconds. With several tries, errors are those after which OpenAI's clients try again."""
    for _ in range(tries - 1):
        try:
            response = unary(front, seconds)
        except httpx.RemoteProtocolError:
            continue
        if response.status_code == 200:
            return response
        ErrorResponse.model_validate(response.json())
        time.sleep(int(response.headers["Retry-After"]))
    return httpx.post(f"{front}/unary?seconds={seconds}", content=b"x" * 100, timeout=60)


def processes(front: str) -> set[int]:
    return {int(unary(front, 0).text) for _ in range(8)}


def left(front: str) -> int:
    """How many clients have left while they waited for an answer of one of the processes."""
    return sum(dict(httpx.get(f"{front}/left").json() for _ in range(8)).values())


def connect(front: str, sent: bytes) -> socket.socket:
    """A connection on which nothing follows what is `sent`."""
    url = httpx.URL(front)
    connection = socket.create_connection((url.host, url.port))
    connection.settimeout(SLOW_CLIENT_S + 5)
    connection.sendall(sent)
    return connection


def reply(connection: socket.socket) -> bytes:
    with connection:
        return connection.recv(1000)


class Stream:
    """A stream that has begun, and the process that sends it."""

    def __init__(self, front: str, seconds: float) -> None:
        self._http = httpx.Client(timeout=60)
        params = {"items": 1, "seconds": seconds}
        self._response = self._http.send(
            self._http.build_request("POST", f"{front}/stream", params=params), stream=True
        )
        self._lines = self._response.iter_lines()
        self.process = int(next(self._lines))

    def ends(self) -> bool:
        """Whether it comes to its end."""
        try:
            return list(self._lines) == [""]
        except httpx.RemoteProtocolError:
            return False
        finally:
            self._response.close()
            self._http.close()


def read(front: str, items: int, seconds: float, size: int = 0, pause_s: float = 0) -> int:
    """The bytes of a stream that was read to its end, with a pause after its beginning."""
    received = 0
    with httpx.stream(
        "POST", f"{front}/stream", params={"items": items, "seconds": seconds, "size": size}, timeout=60
    ) as response:
        for part in response.iter_raw():
            if received == 0:
                time.sleep(pause_s)
            received += len(part)
    return received
