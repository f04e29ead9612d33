"""Interrupts of a training run: signals, a stop file in the run's directory, and preemption notices."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from types import FrameType
from typing import TypeVar

import ray.train

from llama_ray.storage import store
from llama_ray.storage.attempts import Attempt
from llama_ray.training.hosts.interrupt import Interrupt
from llama_ray.training.parallel.process_group import rank

T = TypeVar("T")

STOP_FILE = "stop"
_DIRECTORY_POLL_S = (0.5, 5.0)
"""Seconds between two looks, on a mounted path and on an object store."""
_PREEMPTION_POLL_S = 5.0


class InterruptWatcher:
    """Watches for interrupts from threads, so that the training loop can call `poll` at every step."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._stop = self._preempted = self._superseded = False
        watchers = [self._watch_preemption]
        if rank() == 0:
            watchers.append(self._watch_directory)
        for watch in watchers:
            threading.Thread(target=watch, daemon=True).start()

    def poll(self) -> Interrupt:
        """Return the most urgent interrupt."""
        if self._superseded:
            return Interrupt.SUPERSEDED
        if self._stop:
            return Interrupt.STOP
        return Interrupt.CHECKPOINT if self._preempted else Interrupt.NONE

    def _watch_directory(self) -> None:
        pause = threading.Event()
        interval = _DIRECTORY_POLL_S[0 if store.is_local(self._attempt.run) else 1]
        while not self._superseded:
            pause.wait(interval)
            self._stop = self._stop or stop_requested(self._attempt.run)
            # A store that does not answer now will later.
            with suppress(OSError):
                self._superseded = not self._attempt.is_newest()

    def _watch_preemption(self) -> None:
        # The call is a barrier of all workers. Each has one such thread, so all make the same number of calls.
        pause = threading.Event()
        while True:
            pause.wait(_PREEMPTION_POLL_S)
            self._preempted = ray.train.get_preemption_info() is not None


def until_signal(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """Run `work` in a thread and return its result; the first SIGINT or SIGTERM calls `stop`, the second one raises.

    Outside the main thread Ray Train does not install its own handler, which ends the workers without a checkpoint.
    Signals reach only the main thread; if this is called from another one, `work` runs without handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    stopping = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            raise KeyboardInterrupt
        stopping = True
        print(f"{signal.Signals(number).name}: saving, then stopping; once more to stop at once", flush=True)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    try:
        # A daemon, unlike a thread of an executor: the second signal ends the process without waiting for the work.
        threading.Thread(target=run, name="fit", daemon=True).start()
        while not future.done():
            wait([future], timeout=0.5)  # In short turns, because handlers run between them.
        return future.result()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested(directory: str) -> bool:
    """Return whether the run in `directory` was asked to stop."""
    try:
        return store.read_text(store.join(directory, STOP_FILE)) is not None
    except OSError:
        return False


def request_stop(directory: str) -> None:
    """Ask the run in `directory` to save and end."""
    store.write_text(store.join(directory, STOP_FILE), "")


def withdraw_stop(directory: str) -> None:
    """Delete the request of an earlier launch."""
    store.delete(store.join(directory, STOP_FILE))
