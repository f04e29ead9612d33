"""Start the processes of ranks 1 to N - 1 of a model, call them, and end them in every case.

Each is a fresh interpreter, never a fork, connected to the engine's process by one socket. When the socket closes,
because the engine closed it or its process is gone for any reason, the worker ends at once, whatever it is doing.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import torch

from llama_ray.generation.backends.runner import RunnerError
from llama_ray.generation.parallel.calls import Answer, Call, Failure
from llama_ray.generation.parallel.ranks import Ranks

_log = logging.getLogger(__name__)

_START = "from llama_ray.generation.parallel.worker import work; work()"
_EXIT_TIMEOUT_S = 5.0
"""How long to wait for the exit of a process, or for the news of it."""

Item = TypeVar("Item")


@dataclass
class _WatchState:
    """What `Workers` shares with the thread that watches them; the thread must not keep `Workers` alive."""

    ranks: Ranks | None = None
    lost_rank: int | None = None
    """The first worker whose socket closed."""
    over: threading.Event = field(default_factory=threading.Event)


class Workers:
    """The processes of ranks 1 to `size` - 1, which all run the same call at a time. They end with this object.

    `ask` and the answers to it are for one thread; `close` may be called from any.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._state = _WatchState()
        self._closed: str | None = None
        sockets: list[socket.socket] = []
        try:
            for rank in range(1, size):
                ours, theirs = socket.socketpair()
                sockets.append(ours)
                with theirs:
                    self._processes.append(_start(rank, size, theirs.fileno()))
                self._connections.append(Connection(os.dup(ours.fileno())))
        finally:
            thread = threading.Thread(target=_watch_sockets, args=(sockets, self._state), daemon=True)
            thread.start()
            self._end = weakref.finalize(
                self, _end, os.getpid(), sockets, self._connections, self._processes, thread
            )

    def ask(self, call: Call[Answer]) -> Pending[Answer]:
        """Send a call to every worker; its answers must be taken before the next. Raises RunnerError if one is gone."""
        if self._closed is not None:
            raise RunnerError(self._closed)
        message = ForkingPickler.dumps(call)
        for connection in self._connections:
            try:
                connection.send_bytes(message)
            except OSError:
                raise self.lost() from None
        return Pending(self)

    def connect(self, ranks: Ranks) -> None:
        """Abort the collectives of `ranks` from the moment that a worker is gone."""
        self._state.ranks = ranks
        if self._state.lost_rank is not None:
            raise self.lost()

    def lost(self, symptom: str = "the ranks lost contact") -> RunnerError:
        """End all workers; return the error to raise, with the fate of the first lost worker, or else the symptom."""
        if self._closed is None:
            self._state.over.wait(_EXIT_TIMEOUT_S)
            rank = self._state.lost_rank
            cause = symptom if rank is None else _fate(rank, self._processes[rank - 1])
            self.close(f"{cause}; the engine has ended; make a new one")
        return RunnerError(self._closed)

    def close(self, reason: str = "the engine is closed") -> None:
        """End the processes and wait for that; `ask` then raises RunnerError with the reason."""
        self._closed = self._closed or reason
        self._end()

    def receive(self, timeout_s: float | None) -> list[Any]:
        """Return what each worker sent, in order of rank. Raises RunnerError if one is gone or silent."""
        received: dict[Connection, Any] = {}
        while missing := [c for c in self._connections if c not in received]:
            try:
                ready = [c for c in wait(missing, timeout_s) if isinstance(c, Connection)]
                received |= {c: c.recv() for c in ready}
            except (EOFError, OSError):
                raise self.lost() from None
            if not ready:
                raise self.lost(f"a worker did not answer within {timeout_s:.0f} s")
        return [received[c] for c in self._connections]


class Pending(Generic[Answer]):
    """The answers to one call, by rank from 1."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def answers(self, timeout_s: float | None = None) -> list[Answer | Exception]:
        """Wait for the answer of every worker, or its error. Raises RunnerError if one is gone or silent."""
        return [
            answer.kind(f"rank {rank}: {answer.message}") if isinstance(answer, Failure) else answer
            for rank, answer in enumerate(self._workers.receive(timeout_s), start=1)
        ]

    def results(self) -> list[Answer]:
        """Wait for the answer of every worker; raise the first error."""
        results: list[Answer] = []
        for answer in self.answers():
            if isinstance(answer, Exception):
                raise answer
            results.append(answer)
        return results


def _start(rank: int, size: int, descriptor: int) -> subprocess.Popen[bytes]:
    threads = max(torch.get_num_threads() // size, 1)
    arguments = map(str, (descriptor, os.getpid(), rank, size, threads))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _START, *arguments],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        # Modules are found where this process found them: a script's directory, a job's working directory.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        # Ctrl-C goes to the engine's process alone, which then ends its workers.
        process_group=0,
    )


def _watch_sockets(sockets: Sequence[socket.socket], state: _WatchState) -> None:
    """Wait until a worker or this process closes its end; then abort collectives, which would wait for it."""
    poll = select.poll()
    ranks = {s.fileno(): rank for rank, s in enumerate(sockets, start=1)}
    for descriptor in ranks:
        poll.register(descriptor, 0)
    state.lost_rank = ranks[poll.poll()[0][0]] if ranks else None
    state.over.set()
    if state.ranks is not None:
        state.ranks.abort()


def _end(
    owner: int,
    sockets: Sequence[socket.socket],
    connections: Sequence[Connection],
    processes: Sequence[subprocess.Popen[bytes]],
    watch: threading.Thread,
) -> None:
    # A fork holds a copy of the object, but the workers belong to its parent.
    if os.getpid() != owner:
        return
    _each(lambda s: s.shutdown(socket.SHUT_RDWR), sockets)
    for process in processes:
        try:
            process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    watch.join()
    _each(socket.socket.close, sockets)
    _each(Connection.close, connections)


def _each(action: Callable[[Item], object], items: Sequence[Item]) -> None:
    """Apply `action` to every socket or connection; some may be closed already."""
    for item in items:
        try:
            action(item)
        except OSError:
            _log.debug("%s is closed already", item)


def _fate(rank: int, process: subprocess.Popen[bytes]) -> str:
    """Describe how a worker ended."""
    worker = f"the worker of rank {rank} (process {process.pid})"
    try:
        code = process.wait(_EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"{worker} closed its socket"
    if code < 0:
        return f"{worker} was killed by {signal.Signals(-code).name}"
    return f"{worker} ended with exit code {code}"
