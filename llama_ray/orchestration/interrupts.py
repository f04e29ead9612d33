"""What reaches a worker from outside while it trains: a stop file in the run's directory, a preemption notice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import TypeVar

import ray.train

from llama_ray.storage import store
from llama_ray.training.interrupt import Interrupt
from llama_ray.training.parallel.process_group import rank

T = TypeVar("T")

STOP_FILE = "stop"
_STOP_POLL_S = (0.5, 5.0)
"""On a mounted path, and on an object store."""
_PREEMPTION_POLL_S = 5.0


class InterruptWatcher:
    """Watches from threads; `poll` is what the training loop calls at every step."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._stop = self._preempted = False
        watchers = [self._watch_preemption]
        if rank() == 0:
            watchers.append(self._watch_stop_file)
        for watch in watchers:
            threading.Thread(target=watch, daemon=True).start()

    def poll(self) -> Interrupt:
        """The most urgent request there is."""
        if self._stop:
            return Interrupt.STOP
        return Interrupt.CHECKPOINT if self._preempted else Interrupt.NONE

    def _watch_stop_file(self) -> None:
        pause = threading.Event()
        interval = _STOP_POLL_S[0 if store.is_local(self._directory) else 1]
        while not self._stop:
            pause.wait(interval)
            self._stop = stop_requested(self._directory)

    def _watch_preemption(self) -> None:
        # The call is a barrier of all workers; each has one such thread, so they call it equally often.
        pause = threading.Event()
        while True:
            pause.wait(_PREEMPTION_POLL_S)
            self._preempted = ray.train.get_preemption_info() is not None


def until_signal(work: Callable[[], T], stop: Callable[[], None]) -> T:
    """The result of `work`, run in a thread; the first SIGINT or SIGTERM calls `stop`, a second one raises.

    The thread keeps Ray Train from installing its own handler, which ends the workers without a checkpoint. Only
    the main thread can be told of signals; elsewhere `work` simply runs.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
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
    """Whether the run in `directory` was asked to stop."""
    try:
        return store.read_text(store.join(directory, STOP_FILE)) is not None
    except OSError:
        return False


def request_stop(directory: str) -> None:
    """Ask the run in `directory` to save and end."""
    store.write_text(store.join(directory, STOP_FILE), "")


def withdraw_stop(directory: str) -> None:
    """Forget an earlier request."""
    store.delete(store.join(directory, STOP_FILE))
