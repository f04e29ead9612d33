"""Signals to a real driver process, whose work goes on in a thread until it is asked to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama_ray.orchestration.interrupts import request_stop, stop_requested, until_signal, withdraw_stop

DRIVER = """
import sys, threading
from llama_ray.orchestration.interrupts import until_signal

stopped, obeys = threading.Event(), sys.argv[1] == "obeys"

def work():
    print("working", flush=True)
    stopped.wait()
    return "saved"

print(until_signal(work, stopped.set if obeys else lambda: None), flush=True)
"""


@contextmanager
def driver(kind: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "working\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_the_work_which_ends_by_itself(number: signal.Signals) -> None:
    with driver("obeys") as process:
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert said == f"{number.name}: saving, then stopping; once more to stop at once\nsaved\n"
    assert process.returncode == 0


def test_the_second_signal_ends_the_driver_at_once() -> None:
    with driver("ignores") as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().startswith("SIGINT: saving")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors.endswith("KeyboardInterrupt\n")
    assert process.returncode != 0


def test_outside_the_main_thread_the_work_simply_runs() -> None:
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(until_signal(lambda: "done", lambda: None)))
    thread.start()
    thread.join(60)
    assert results == ["done"]


def test_an_error_of_the_work_is_raised() -> None:
    def fail() -> None:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        until_signal(fail, lambda: None)


def test_a_request_to_stop_stands_until_it_is_withdrawn(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert not stop_requested(run)
    request_stop(run)
    assert stop_requested(run)
    withdraw_stop(run)
    assert not stop_requested(run)
    withdraw_stop(run)
