"""The process that all grammars' processes are forked from: it has read the tokenizer, which takes longest.

A fresh interpreter with one thread, so forking it is safe and takes milliseconds. It ends, and ends all of its forks,
when the engine's end of the socket closes for whatever reason.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

from llguidance import LLTokenizer

from llama_ray.generation.constraints.mask_server import one_line, serve_masks
from llama_ray.generation.constraints.messages import Job

_SET_PARENT_DEATH_SIGNAL = 1
_MAX_MESSAGE = 4096


def main() -> None:
    """Run as `python -c "..." CONTROL TOKENIZER VOCAB_SIZE EOS...`; the first two are descriptors."""
    control_fd, tokenizer_fd, vocab_size, *eos_ids = map(int, sys.argv[1:])
    control = socket.socket(fileno=control_fd)
    try:
        with open(tokenizer_fd, encoding="utf-8") as file:  # noqa: PTH123
            file.seek(0)
            tokenizer = LLTokenizer(file.read(), n_vocab=vocab_size, eos_token=eos_ids)
    except BaseException as error:  # A panic of the library is no Exception.
        control.send(json.dumps(["refused", one_line(str(error))]).encode())
        return
    control.send(json.dumps(["ready"]).encode())
    _Template(control, tokenizer).serve()


class _Template:
    def __init__(self, control: socket.socket, tokenizer: LLTokenizer) -> None:
        self._control, self._tokenizer = control, tokenizer
        self._numbers: dict[int, int] = {}
        """By process id."""
        # A signal wakes `select` through this pipe.
        self._deaths, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Fork and report deaths until the engine has gone."""
        # OSError: it has gone without reading all that was sent to it.
        with suppress(OSError):
            while self._serve_once():
                pass
        for process in self._numbers:
            os.kill(process, signal.SIGKILL)
        for process in self._numbers:
            os.waitpid(process, 0)

    def _serve_once(self) -> bool:
        control = self._control.fileno()
        ready, _, _ = select.select([control, self._deaths], [], [])
        if self._deaths in ready:
            os.read(self._deaths, _MAX_MESSAGE)
            self._report_deaths()
        if control in ready:
            message, descriptors, _, _ = socket.recv_fds(self._control, _MAX_MESSAGE, 2)
            if not message:
                return False
            self._fork(Job(*json.loads(message)), *descriptors)
        return True

    def _fork(self, job: Job, channel: int, memory: int) -> None:
        process = os.fork()
        if process:
            os.close(channel)
            os.close(memory)
            self._numbers[process] = job.number
            return
        # Nothing may return from here into the template's loop.
        try:
            self._become_server()
            serve_masks(job, Connection(channel), memory, self._tokenizer)
        except (EOFError, OSError):
            os._exit(0)
        finally:
            os._exit(1)

    def _become_server(self) -> None:
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._control.close()
        # A library that ends the process writes a page about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def _report_deaths(self) -> None:
        while self._numbers:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            number = self._numbers.pop(process)
            self._control.send(json.dumps(["died", number, os.waitstatus_to_exitcode(status)]).encode())
