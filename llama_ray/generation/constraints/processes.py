"""The engine's side of the processes: a template, started at the first grammar, and one fork of it for each grammar."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_ray.generation.constraints.limits import MAX_MASKS
from llama_ray.generation.constraints.messages import Job, Kind, receive, send
from llama_ray.utils.integers import ceil_div

_START = "from llama_ray.generation.constraints.template import main; main()"
_MAX_MESSAGE = 4096
_POLL_S = 0.001


@dataclass(frozen=True)
class Death:
    """How a process ended: its exit code (-N: signal N), or None if the template has gone, too, and nobody knows."""

    exit_code: int | None

    @property
    def of_cost(self) -> bool:
        """Whether it exceeded its limits of processor time or memory, or crashed: it would do so again."""
        return self.exit_code not in (None, -signal.SIGKILL, -signal.SIGALRM)

    @property
    def of_time(self) -> bool:
        """Whether it exceeded its limit of processor time."""
        return self.exit_code == -signal.SIGPROF

    @property
    def of_waiting(self) -> bool:
        """Whether it exceeded its limit of elapsed time, on a machine that is busy or was suspended."""
        return self.exit_code == -signal.SIGALRM

    def __str__(self) -> str:
        if self.exit_code is None or self.exit_code >= 0:
            return "exit code unknown" if self.exit_code is None else f"exit code {self.exit_code}"
        return signal.Signals(-self.exit_code).name


class Closed(RuntimeError):
    """There are no processes any more, and will be none."""


class GrammarProcess:
    """A process that follows one grammar. It has one message to answer at a time, the first of which is the grammar.

    `masks` is shared with it: uint8 [`MAX_MASKS`, 4 * ceil(vocab_size / 32)], valid until the next message.
    """

    def __init__(self, number: int, connection: Connection, masks: NDArray[np.uint8]) -> None:
        self.number, self.connection, self.masks = number, connection, masks
        self.busy = True

    def send(self, message: object) -> None:
        """Send a message; whether the process still lives is seen when its answer is read."""
        self.busy = True
        try:
            send(self.connection, message)
        except OSError:
            return

    def has_news(self, timeout_s: float = 0.0) -> bool:
        """Whether within `timeout_s` an answer has come or the process has gone."""
        return self.busy and self.connection.poll(timeout_s)

    def read(self) -> Any:
        """Return the answer; raise EOFError or OSError if the process has gone."""
        answer = receive(self.connection)
        self.busy = False
        return answer

    def close(self) -> None:
        """End the process: without a message to answer it goes at once."""
        self.connection.close()


class Template:
    """Forks processes for grammars over one tokenizer. Safe to call from any thread.

    It is started by the first `start`, and again if it has gone. Its process and all forks end with `close`, with this
    object, and with this process. `refusal` says why the tokenizer cannot be used.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer_json = tokenizer_json.encode()
        self._arguments = [str(vocab_size), *map(str, eos_ids)]
        self._mask_bytes = ceil_div(vocab_size, 32) * 4
        self._numbers = itertools.count()
        # Guards the rest.
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self._exit_codes: dict[int, int] = {}
        self._closed = False
        self.refusal: str | None = None

    def start(self, kind: Kind, text: bytes, cpu_s: float, nice: int) -> GrammarProcess:
        """Return a process that compiles a grammar within `cpu_s`, `nice` below this priority. Does not wait for it.

        Its first answer is None, or what is wrong with the grammar. Raises Closed after `close`.
        """
        memory = os.memfd_create("masks")
        ours, theirs = socket.socketpair()
        try:
            os.ftruncate(memory, max(MAX_MASKS * self._mask_bytes, len(text)))
            shared = mmap.mmap(memory, 0)
            shared[: len(text)] = text
            with self._lock:
                number = next(self._numbers)
                job = json.dumps(Job(number, kind, len(text), cpu_s, nice)).encode()
                descriptors = [theirs.fileno(), memory]
                self._read_news()
                if not _sent(self._control, job, descriptors):
                    self._launch()
                    _sent(self._control, job, descriptors)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        masks = np.frombuffer(shared, np.uint8, MAX_MASKS * self._mask_bytes).reshape(MAX_MASKS, -1)
        return GrammarProcess(number, Connection(ours.detach()), masks)

    def death_of(self, process: GrammarProcess, timeout_s: float) -> Death:
        """Return why a process has gone whose connection says so.

        The news follows the closing of its connection within a millisecond, unless the machine is very busy.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._read_news()
                known = process.number in self._exit_codes or self._control is None
                if known or time.monotonic() > deadline:
                    return Death(self._exit_codes.pop(process.number, None))
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End all processes and wait for that."""
        with self._lock:
            self._closed, self._control = True, None
            if self._end is not None:
                self._end()

    def _launch(self) -> None:
        if self._closed:
            raise Closed("the engine is closed; make a new one")
        if self._end is not None:
            self._end()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tokenizer = os.memfd_create("tokenizer")
        try:
            with open(tokenizer, "wb", closefd=False) as file:
                file.write(self._tokenizer_json)
            descriptors = [theirs.fileno(), tokenizer]
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, *map(str, descriptors), *self._arguments],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                # Modules are found where this process found them: a script's directory, a job's working directory.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                # Ctrl-C goes to the engine's process alone.
                process_group=0,
            )
        finally:
            theirs.close()
            os.close(tokenizer)
        self._end = weakref.finalize(self, _end, os.getpid(), self._control, process)

    def _read_news(self) -> None:
        """Take what the template has sent; forget it if it has gone."""
        while self._control is not None and select.select([self._control], [], [], 0)[0]:
            message = _received(self._control)
            if not message:
                self._control = None
                return
            match json.loads(message):
                case ["died", number, exit_code]:
                    self._exit_codes[number] = exit_code
                case ["refused", reason]:
                    self.refusal = reason


def _sent(control: socket.socket | None, message: bytes, descriptors: list[int]) -> bool:
    if control is None:
        return False
    try:
        socket.send_fds(control, [message], descriptors)
    except OSError:
        return False
    return True


def _received(control: socket.socket) -> bytes:
    try:
        return control.recv(_MAX_MESSAGE)
    except OSError:
        return b""


def _end(owner: int, control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    # A fork holds a copy of the object, but the processes belong to its parent.
    if os.getpid() != owner:
        return
    control.close()
    process.wait()
