"""The processes of a model's ranks 1 to N-1: starting them, telling them what to do, and ending them in every case.

Each is a fresh interpreter, never a fork, and knows the engine's process by one socket. When that is closed, by the
engine or because its process is gone, however it went, the worker ends at once, whatever it is doing.
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
from typing import Any

import torch

from llama_ray.generation.parallel.ranks import Ranks
from llama_ray.generation.runner import RunnerError

_log = logging.getLogger(__name__)

_START = "from llama_ray.generation.parallel.worker import work; work()"
_PATIENCE_S = 5.0  # for the system to tell of a process that is gone


@dataclass
class _Contact:
    """What the thread that watches the workers shares with `Workers`, which it must not keep alive."""

    ranks: Ranks | None = None
    gone: int | None = None
    """Rank of the first worker whose socket closed."""
    over: threading.Event = field(default_factory=threading.Event)


class Workers:
    """The processes of ranks 1 to `size` - 1, all at the same thing at any time. They end with this object.

    `ask` and `answers` are called in turn, by one thread; `close` by any.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._contact = _Contact()
        self._closed: str | None = None
        # Modules come from where this process has them: a script's directory, a job's working directory.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        sockets: list[socket.socket] = []
        threads = max(torch.get_num_threads() // size, 1)
        try:
            for rank in range(1, size):
                ours, theirs = socket.socketpair()
                sockets.append(ours)
                with theirs:
                    arguments = map(str, (theirs.fileno(), os.getpid(), rank, size, threads))
                    process = subprocess.Popen(
                        [sys.executable, "-P", "-c", _START, *arguments],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        env=environment,
                        process_group=0,  # Ctrl-C is for the engine's process, which then ends these
                    )
                self._processes.append(process)
                self._connections.append(Connection(os.dup(ours.fileno())))
        finally:
            watch = threading.Thread(target=_watch, args=(sockets, self._contact), daemon=True)
            watch.start()
            self._end = weakref.finalize(
                self, _end, os.getpid(), sockets, self._connections, self._processes, watch
            )

    def ask(self, method: str, *args: Any) -> None:
        """Have every worker call that method of `worker.Worker`. Raises RunnerError where one is gone."""
        if self._closed is not None:
            raise RunnerError(self._closed)
        message = ForkingPickler.dumps((method, args))
        for connection in self._connections:
            try:
                connection.send_bytes(message)
            except OSError:
                raise self.lost() from None

    def answers(self, timeout_s: float | None = None) -> list[Any]:
        """What they returned, by rank; an error as the exception. Raises RunnerError where one is gone or silent."""
        results: dict[Connection, Any] = {}
        while missing := [c for c in self._connections if c not in results]:
            try:
                ready = wait(missing, timeout_s)
                received = {c: c.recv() for c in missing if c in ready}
            except (EOFError, OSError):
                raise self.lost() from None
            if not ready:
                raise self.lost(f"a worker did not answer within {timeout_s:.0f} s")
            for connection, (kind, value) in received.items():
                rank = self._connections.index(connection) + 1
                results[connection] = value if kind is None else kind(f"rank {rank}: {value}")
        return [results[c] for c in self._connections]

    def call(self, method: str, *args: Any) -> list[Any]:
        """`ask` and `answers`; an error that a worker returns is raised."""
        self.ask(method, *args)
        return checked(self.answers())

    def connect(self, ranks: Ranks) -> None:
        """Abort the collectives of `ranks` from the moment that a worker is gone."""
        self._contact.ranks = ranks
        if self._contact.gone is not None:
            raise self.lost()

    def lost(self, symptom: str = "the ranks lost contact") -> RunnerError:
        """End all: what to raise where a worker is gone, or is not but shows that symptom."""
        if self._closed is None:
            self._contact.over.wait(_PATIENCE_S)
            rank = self._contact.gone
            cause = symptom if rank is None else _fate(rank, self._processes[rank - 1])
            self.close(f"{cause}; the engine has ended and must be made anew")
        return RunnerError(self._closed)

    def close(self, reason: str = "the engine is closed") -> None:
        """End the processes, and wait for that; `ask` raises RunnerError with the reason from now on."""
        self._closed = self._closed or reason
        self._end()


def checked(answers: list[Any]) -> list[Any]:
    """Answers of all workers; the first that is an error is raised."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _watch(sockets: Sequence[socket.socket], contact: _Contact) -> None:
    """Wait until a worker, or this process, closes its end; then nobody waits for the others any more."""
    poll = select.poll()
    ranks = {s.fileno(): rank for rank, s in enumerate(sockets, start=1)}
    for descriptor in ranks:
        poll.register(descriptor, 0)
    contact.gone = ranks[poll.poll()[0][0]] if ranks else None
    contact.over.set()
    if contact.ranks is not None:
        contact.ranks.abort()


def _end(
    owner: int,
    sockets: Sequence[socket.socket],
    connections: Sequence[Connection],
    processes: Sequence[subprocess.Popen[bytes]],
    watch: threading.Thread,
) -> None:
    if os.getpid() != owner:  # a fork's copy of the object; the workers are not its own
        return
    _each(lambda s: s.shutdown(socket.SHUT_RDWR), sockets)
    for process in processes:
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    watch.join()
    _each(lambda s: s.close(), sockets)
    _each(lambda c: c.close(), connections)


def _each(action: Callable[[Any], object], things: Sequence[Any]) -> None:
    for thing in things:
        try:
            action(thing)
        except OSError:
            _log.debug("%s is closed already", thing)


def _fate(rank: int, process: subprocess.Popen[bytes]) -> str:
    """How a worker ended."""
    who = f"the worker of rank {rank} (process {process.pid})"
    try:
        code = process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"{who} closed its socket"
    return (
        f"{who} was killed by {signal.Signals(-code).name}"
        if code < 0
        else f"{who} ended with exit code {code}"
    )
