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
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.backend import BLOCK_SIZE, block_bytes, make_cache, prepare, weight_bytes
from llama_ray.generation.batch import StepBatch
from llama_ray.generation.kv_cache import count_blocks
from llama_ray.generation.quantize import Quantization
from llama_ray.generation.runner import RunnerError
from llama_ray.generation.tensor_parallel import (
    RankRunner,
    Ranks,
    TensorParallelRunner,
    check_ranks,
    cut_tied_head,
    from_host,
    rank_config,
    rank_device,
    share,
)
from llama_ray.model.checkpoint import load_config, load_model
from llama_ray.model.llama import Llama
from llama_ray.pretrained import load_pretrained

_log = logging.getLogger(__name__)

_START = "from llama_ray.generation.workers import work; work()"
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
        """Have every worker call that method of `_Worker`. Raises RunnerError where one is gone."""
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


class TensorParallel:
    """A model that is loaded on several ranks: this process is rank 0, the others are `workers`.

    `directory` is a checkpoint; each rank reads its share of it, no more. Raises ValueError for a checkpoint that
    cannot be read, or not be divided so, and RunnerError where a worker fails to start.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype | None,
        device: torch.device | str,
        quantization: Quantization | None,
        batch_invariant: bool,
        size: int,
    ) -> None:
        kind = torch.device(device).type
        config = load_config(directory)
        check_ranks(config, size, torch.device(device))
        self.model: Llama
        self.tokenizer: Tokenizer | None
        self.size, self.rank_config = size, rank_config(config, size)
        self._workers = Workers(size)
        try:
            form = (quantization, batch_invariant)
            self._workers.ask("load", directory, dtype, kind, *form)
            first = rank_device(kind, 0)
            self.model, self.tokenizer = load_pretrained(directory, dtype, first, share(0, size))
            self.model = _prepared(self.model, *form, 0, size)
            self.weight_bytes = weight_bytes(self.model) + sum(checked(self._workers.answers()))
            with tempfile.TemporaryDirectory() as meeting_place:
                self._workers.ask("connect", meeting_place)
                self._ranks = Ranks(meeting_place, 0, size, first)
                checked(self._workers.answers())
            self._workers.connect(self._ranks)
        except RunnerError as e:
            raise self._workers.lost(str(e)) from e
        except BaseException:
            self._workers.close()
            raise

    def count_blocks(
        self, bytes_per_block: int, max_batch_size: int, max_seq_len: int, memory_bytes: int | None
    ) -> int:
        """`kv_cache.count_blocks` of the rank with the least room; `bytes_per_block` are those of rank 0."""
        limits = (max_batch_size, max_seq_len)
        device = self.model.embed_tokens.weight.device
        own = count_blocks(bytes_per_block, BLOCK_SIZE, *limits, device, memory_bytes, self.size)
        others: list[int] = self._workers.call("count_blocks", *limits, memory_bytes)
        return min(own, *others)

    def runner(self, blocks: int) -> TensorParallelRunner:
        """Caches of so many blocks on all ranks, and what runs steps on them."""
        self._workers.ask("reserve", blocks)
        cache = make_cache(self.model, blocks, self.rank_config)
        checked(self._workers.answers())
        return TensorParallelRunner(self.model, cache, self._ranks, self._workers)

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


def checked(answers: list[Any]) -> list[Any]:
    """Answers of all workers; the first that is an error is raised."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


class _Worker:
    """One rank, in its own process; its methods are what rank 0 can ask for."""

    model: Llama
    ranks: Ranks
    runner: RankRunner

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def answer(self, method: str, args: tuple[Any, ...]) -> tuple[type[Exception] | None, Any]:
        """(None, what the method returns), or what to raise on rank 0 and the message."""
        try:
            return None, getattr(self, method)(*args)
        except RunnerError as e:  # another rank is the cause; rank 0 will see which
            return RuntimeError, str(e)
        except Exception as e:
            _log.exception("rank %d: %s failed", self.rank, method)
            return _kind(e), str(e).partition("\n")[0]

    def load(
        self,
        directory: Path,
        dtype: torch.dtype | None,
        kind: str,
        quantization: Quantization | None,
        batch_invariant: bool,
    ) -> int:
        self.device = rank_device(kind, self.rank)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        model = load_model(directory, dtype, self.device, share(self.rank, self.size))
        self.model = _prepared(model, quantization, batch_invariant, self.rank, self.size)
        return weight_bytes(self.model)

    def connect(self, meeting_place: str) -> None:
        self.ranks = Ranks(meeting_place, self.rank, self.size, self.device)

    def count_blocks(self, max_batch_size: int, max_seq_len: int, memory_bytes: int | None) -> int:
        per_block = block_bytes(self.model, rank_config(self.model.config, self.size))
        return count_blocks(
            per_block, BLOCK_SIZE, max_batch_size, max_seq_len, self.device, memory_bytes, self.size
        )

    def reserve(self, blocks: int) -> None:
        cache = make_cache(self.model, blocks, rank_config(self.model.config, self.size))
        self.runner = RankRunner(self.model, cache, self.ranks)

    def step(self, batch: StepBatch, copies: list[tuple[int, int]]) -> None:
        try:
            result = self.runner.compute(from_host(batch), copies)
        except RunnerError:
            raise
        except Exception:
            _log.exception("rank %d is out of step and ends", self.rank)
            os._exit(1)
        if self.device.type == "cuda":
            # Rank 0 waits for the answer, not for its own GPU, where it could not tell whether a worker is gone.
            torch.cuda.current_stream().synchronize()
        if isinstance(result, Exception):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise result


def work() -> None:
    """A worker's whole life; its arguments are the socket, the engine's process, rank, ranks and threads."""
    descriptor, parent, rank, size, threads = map(int, sys.argv[1:])
    threading.Thread(target=_end_with, args=(descriptor, parent), daemon=True).start()
    torch.set_num_threads(threads)
    connection, worker = Connection(descriptor), _Worker(rank, size)
    try:
        while True:
            method, args = connection.recv()
            connection.send(worker.answer(method, args))
    except (EOFError, OSError):
        os._exit(0)


def _prepared(
    model: Llama, quantization: Quantization | None, batch_invariant: bool, rank: int, size: int
) -> Llama:
    cut_tied_head(model, rank, size)
    return prepare(model, quantization, batch_invariant=batch_invariant)


def _kind(error: Exception) -> type[Exception]:
    """What rank 0 raises for it: the engine looks at whether memory ran out, its user at whose fault it is."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return MemoryError
    return ValueError if isinstance(error, ValueError) else RuntimeError


def _end_with(descriptor: int, parent: int) -> None:
    """End this process when the engine closes the socket or is gone.

    Not by PR_SET_PDEATHSIG, which comes when the thread that started the worker ends. The parent is looked at too:
    a process that it forked may hold the socket open.
    """
    poll = select.poll()
    poll.register(descriptor, 0)  # only hang-ups and errors, which are always told
    if hasattr(os, "pidfd_open"):
        try:
            poll.register(os.pidfd_open(parent), select.POLLIN)
        except ProcessLookupError:
            os._exit(0)
    poll.poll()
    os._exit(0)


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
