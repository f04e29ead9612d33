"""The load generator, a process of its own: `python -m benchmarks.serving.client` reads a load, and writes what it
measured. A load without end goes on until standard input is closed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import uvloop

from benchmarks.serving.load import Load, Measured, Outcome
from benchmarks.serving.sse import Connection


class Client:
    """A load generator that is running against `host`:`port`."""

    def __init__(self, load: Load, port: int, model: str, host: str = "127.0.0.1") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        task = {"load": asdict(load), "host": host, "port": port, "model": model}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    def stop(self) -> Measured:
        """Let streams under way end and start no new ones; return what was measured."""
        said, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"the load generator ended with {self._process.returncode}")
        return Measured.from_json(json.loads(said))

    def result(self) -> Measured:
        """Return what was measured once the load has come to its end."""
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        self._process.communicate()
        if not said:
            raise RuntimeError(f"the load generator ended with {self._process.returncode}")
        return Measured.from_json(json.loads(said))


async def run(load: Load, host: str, port: int, model: str, stopped: asyncio.Event) -> Measured:
    """Send the requests of `load`."""
    outcomes: list[Outcome] = []
    idle: list[Connection] = []

    def body(number: int) -> bytes:
        return json.dumps(load.body(number, model)).encode()

    @asynccontextmanager
    async def connection() -> AsyncIterator[Connection]:
        taken = idle.pop() if idle else Connection(host, port, "/v1/completions", load.keep)
        yield taken
        idle.append(taken)

    async def stream(first: int, step: int) -> None:
        async with connection() as taken:
            number = first
            while not stopped.is_set() and (load.requests is None or number < step * load.requests):
                outcome = await taken.ask(number, body(number))
                outcomes.append(outcome)
                number += step
                if outcome.error is not None:
                    # A server that refuses at once must not be asked a thousand times a second.
                    await asyncio.sleep(0.1)

    async def arrival(number: int, after: float, content: bytes) -> None:
        await asyncio.sleep(begin + after - time.monotonic())
        async with connection() as taken:
            outcomes.append(await taken.ask(number, content, begin + after))

    arrivals = [(i, after, body(i)) for i, after in enumerate(load.arrivals or [])]
    begin, cpu = time.monotonic(), time.process_time()
    if load.arrivals is None:
        await asyncio.gather(*(stream(i, load.streams) for i in range(load.streams)))
    else:
        await asyncio.gather(*(arrival(*each) for each in arrivals))
    measured = Measured(outcomes, time.monotonic() - begin, time.process_time() - cpu)
    for taken in idle:
        taken.close()
    return measured


async def _main(task: dict[str, Any]) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.remove_reader(sys.stdin)
        stopped.set()

    # The one who asked says nothing more; what there is to read is the end.
    loop.add_reader(sys.stdin, stop)
    load = Load(**task["load"])
    measured = await run(load, task["host"], task["port"], task["model"], stopped)
    print(json.dumps(measured.to_json()), flush=True)


if __name__ == "__main__":
    # It takes 12 us of processor time for each token, asyncio's own loop 31.
    uvloop.run(_main(json.loads(sys.stdin.buffer.readline())))
