"""What measures the endpoint: its client on the wire, its figures, and a whole run on a tiny model."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.serving.client import run
from benchmarks.serving.figures import Figures, Slo
from benchmarks.serving.load import Load, Measured, Outcome

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Model-Version: models:/m/3\r\n\r\n"
TEXT, USAGE, END = (
    b'data: {"choices":[{"text":"a"}]}\n\n',
    b'data: {"choices":[],"usage":{"completion_tokens":5}}\n\n',
    b"data: [DONE]\n\n",
)


def chunked(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)


ANSWER = HEAD + chunked(TEXT, TEXT + TEXT, USAGE, END, b"")


async def outcomes(load: Load, answers: Sequence[bytes], part: int = 10_000) -> list[Outcome]:
    """What clients report of a server that sends `answers`, in parts of `part` bytes, and then closes a connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
            assert json.loads(await reader.readexactly(length))["max_tokens"] == load.new_tokens
            for start in range(0, len(answer), part):
                writer.write(answer[start : start + part])
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        measured = await run(load, "127.0.0.1", port, "m", asyncio.Event())
    return measured.outcomes


@pytest.mark.parametrize("part", [1, 7, 10_000])
def test_a_stream_is_read_however_its_bytes_arrive(part: int) -> None:
    found = asyncio.run(outcomes(Load(requests=2), [ANSWER, ANSWER], part))
    assert [(o.number, o.error, o.tokens, o.version) for o in found] == [
        (number, None, 5, "models:/m/3") for number in (0, 1)
    ]
    assert all(1 <= len(o.arrivals) <= 3 and o.arrivals == sorted(o.arrivals) for o in found)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nfull", "429 full"),
        (
            HEAD + chunked(TEXT, b'data: {"error":{"message":"oh"}}\n\n', END, b""),
            '{"error":{"message":"oh"}}',
        ),
        (HEAD + chunked(TEXT, b""), "the stream has no end"),
        (HEAD + chunked(TEXT), "the connection was lost"),
    ],
)
def test_a_request_that_fails_says_why(answer: bytes, error: str) -> None:
    [outcome] = asyncio.run(outcomes(Load(), [answer]))
    assert outcome.error is not None
    assert error in outcome.error


def test_an_open_loop_sends_each_request_when_it_is_due() -> None:
    load = Load.poisson(rate=100, count=4)
    found = sorted(asyncio.run(outcomes(load, [ANSWER] * 4)), key=lambda o: o.number)
    gaps = [o.due - found[0].due for o in found]
    assert load.arrivals is not None
    assert gaps == pytest.approx([at - load.arrivals[0] for at in load.arrivals])
    assert all(o.error is None and o.arrivals[0] >= o.due for o in found)


def test_figures_of_a_measurement() -> None:
    quick = Outcome(0, due=10.0, arrivals=[10.1, 10.2, 10.5], tokens=5)
    slow = Outcome(1, due=10.0, arrivals=[11.0, 12.0], tokens=5)
    refused = Outcome(2, due=10.0, error="429")
    figures = Figures.of(Measured([quick, slow, refused], seconds=2.0, client_cpu_s=0.1), Slo(200, 120))
    assert figures.tokens_per_s == 5
    assert figures.ttft_p50_ms == pytest.approx(100)
    # The first token is not counted.
    assert figures.tpot_p50_ms == pytest.approx(100)
    assert figures.gap_p99_ms == pytest.approx(1000)
    assert figures.goodput == pytest.approx(1 / 3)
    assert figures.errors == 1
    assert figures.client == 0.05


def test_a_run_ends_in_a_table(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.serve",
        "--preset",
        "llama-tiny",
        "--directory",
        str(tmp_path),
    ]
    options = ["--contestants", "engine", "--streams", "1,2", "--turns", "1", "--threads", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| engine")]
    assert len(rows) == 2
    assert [row[9:11] for row in rows] == [["100%", "0"]] * 2
