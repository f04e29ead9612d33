"""What counts as stuck, and the end of a replica that is."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.engine_thread import EngineThread
from llama_ray.generation.sampling.params import SamplingParams
from serve_app.registry.messages import ModelVersion
from serve_app.replica.health import StallMeter, Watchdog
from tests.serve_app.replica.helpers import OPTIONS

PARAMS = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)


def longest(stalls: list[float], *, looks_at: list[float] | None = None) -> float:
    """The longest stall that a meter finds which looks each second, unless told otherwise."""
    meter = StallMeter(1.0, 0.0)
    moments = looks_at or [float(second + 1) for second in range(len(stalls))]
    return max(meter.look(stall, now) for stall, now in zip(stalls, moments, strict=True))


def test_a_step_that_does_not_end_is_measured() -> None:
    assert longest([0, 0.5, 1.5, 2.5, 3.5]) == 3.5


@pytest.mark.parametrize(
    "stalls", [[0.0] * 100, [0.9, 0.2] * 50, [1.9, 0.1] * 50], ids=["idle", "busy", "slow"]
)
def test_steps_that_end_are_no_stall(stalls: list[float]) -> None:
    assert longest(stalls) <= max(stalls)


def test_a_suspended_machine_is_no_stall() -> None:
    # It sleeps for ten minutes in the middle of a step, which ends 3 s after the machine has come back.
    stalls, moments = [0.5, 1.5, 602.0, 603.0, 604.0, 0.0], [1.0, 2.0, 602.5, 603.5, 604.5, 605.5]
    assert longest(stalls, looks_at=moments) == 2.0


def test_a_step_that_hangs_after_the_machine_was_suspended_is_measured() -> None:
    meter = StallMeter(1.0, 0.0)
    meter.look(600, 600)
    assert [meter.look(600 + second, 600 + second) for second in range(1, 60)][-1] == 59


class Hanging:
    """An engine whose step waits for `go_on`, with a request."""

    def __init__(self, version: ModelVersion) -> None:
        self.engine = Engine.from_pretrained(version.location, device="cpu", options=OPTIONS)
        self.go_on, step = threading.Event(), self.engine.step
        self.engine.step = lambda: (self.go_on.wait(60), step())[1]  # type: ignore[method-assign]
        self.thread: EngineThread[None] = EngineThread(self.engine, lambda items: None)
        self.thread.submit("The", PARAMS, None)


@pytest.fixture
def hanging(versions: list[ModelVersion]) -> Iterator[Hanging]:
    hanging = Hanging(versions[0])
    yield hanging
    hanging.go_on.set()
    hanging.thread.stop()


def test_a_watchdog_notices_a_step_that_hangs(hanging: Hanging) -> None:
    stuck = threading.Event()
    reasons: list[str] = []

    def note(reason: str) -> None:
        reasons.append(reason)
        stuck.set()

    watchdog = Watchdog(lambda: [hanging.thread], 0.2, note)
    watchdog.check()
    assert stuck.wait(60)
    assert "stuck_after_s, 0.2 s" in reasons[0]
    with pytest.raises(GenerationError, match=r"stuck_after_s, 0\.2 s"):
        watchdog.check()


def test_an_engine_that_has_ended_is_unhealthy_and_not_stuck(hanging: Hanging) -> None:
    watchdog = Watchdog(lambda: [hanging.thread], 3600, lambda reason: None)
    watchdog.check()
    hanging.go_on.set()
    hanging.thread.stop()
    with pytest.raises(GenerationError, match="the engine was stopped"):
        watchdog.check()
    watchdog.stop()


STUCK = """
import sys, threading
from serve_app.registry.messages import ModelVersion
from serve_app.replica.health import Watchdog
from tests.serve_app.replica.test_health import Hanging

hanging = Hanging(ModelVersion("tiny", "tiny", sys.argv[1]))
watchdog = Watchdog(lambda: [hanging.thread], 0.2)
# Not even a lock that is held for ever keeps the process.
lock = threading.Lock()
lock.acquire()
lock.acquire(timeout=60)
"""


def test_a_stuck_process_writes_its_stacks_and_ends(versions: list[ModelVersion]) -> None:
    root = Path(__file__).parents[3]
    ended = subprocess.run(
        [sys.executable, "-c", STUCK, versions[0].location],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert "stuck_after_s, 0.2 s" in ended.stderr
    # The stack of the engine's thread, down to what it waits for.
    assert "engine_thread.py" in ended.stderr
    assert "test_health.py" in ended.stderr
