"""Renders Jinja templates in a process of its own, which ends when a template exceeds its limits.

A checkpoint's template is a program of strangers. Jinja's sandbox keeps it from files and objects of Python, but not
from `'a' * 10**10` or loops in loops, and a thread cannot be ended: a process can.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from llama_ray.data.chat.rendering import Cut, Rendering

CPU_S, ELAPSED_S = 2.0, 60
"""Limits of one rendering; the second is for a machine that is busy or was suspended."""
MEMORY_BYTES = 512 * 2**20
"""Address space of the process; some 40 MiB of it are the interpreter's."""
MAX_CHARACTERS = 16 * 2**20
"""Characters of a rendered text."""

_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "PYTHONHOME", "TZ")
_START = "from llama_ray.data.chat.process import main; main()"


class TemplateProcess:
    """Renders `templates` (by name), one rendering at a time and each within `cpu_s`. Safe to call from any thread.

    The process is started by the first rendering, and again after one that has ended it. It ends with this object, and
    with this process.
    """

    def __init__(self, templates: Mapping[str, str], cpu_s: float = CPU_S) -> None:
        self._templates, self._cpu_s = dict(templates), cpu_s
        # Guards the rest.
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, name: str, variables: Mapping[str, Any], now: datetime | None = None) -> str:
        """Return the text of a template; `now` is the time that it sees, None the current one.

        Raises ValueError, with the reason in one line, if the template does, or exceeds a limit.
        """
        [found] = self.render_all([Rendering(name, variables, None if now is None else now.isoformat())])
        if isinstance(found, ValueError):
            raise found
        [text] = found
        return text

    def render_all(self, renderings: Sequence[Rendering]) -> list[list[str] | ValueError]:
        """Return the texts of each rendering, or what is wrong with it; one exchange with the process for all."""
        request = json.dumps(renderings).encode()
        with self._lock:
            answers = self._ask(request)
        if not isinstance(answers, str):
            return [_result(answer) for answer in answers]
        if len(renderings) == 1:
            return [ValueError(answers)]
        # One of them has ended the process: each for itself.
        return [found for rendering in renderings for found in self.render_all([rendering])]

    def _ask(self, request: bytes) -> Any:
        """Return the answers to a request, or why they have ended the process."""
        # A fork has the same pipes as its parent, which would get each other's answers.
        if self._process is None or self._owner != os.getpid():
            self._process, self._owner = self._start(), os.getpid()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        if answer.endswith(b"\n"):
            return json.loads(answer)
        self._process = None
        _end(os.getpid(), process)
        return self._death(process.returncode)

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            # Ctrl-C goes to the parent alone.
            process_group=0,
        )
        weakref.finalize(self, _end, os.getpid(), process)
        assert process.stdin is not None
        process.stdin.write(json.dumps([self._templates, self._cpu_s]).encode() + b"\n")
        return process

    def _death(self, exit_code: int) -> str:
        if exit_code == -signal.SIGPROF:
            return f"it takes more than {self._cpu_s:g} s of processor time"
        if exit_code == -signal.SIGALRM:
            return f"it was not rendered within {ELAPSED_S} s; try again"
        return f"it ended its process (exit code {exit_code})"


def _result(answer: Any) -> list[str] | ValueError:
    match answer:
        case ["texts", [*texts]]:
            return texts
        case [_, reason]:
            return ValueError(reason)
    raise AssertionError(answer)


def _environment() -> dict[str, str]:
    """Return what the interpreter needs, and the time zone; secrets of this process's environment stay here."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # Modules are found where this process found them.
    return kept | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}


def _end(owner: int, process: subprocess.Popen[bytes]) -> None:
    if os.getpid() != owner:
        return
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        # What was not written is lost with the process.
        with suppress(OSError):
            pipe.close()
    process.wait()


def main() -> None:
    """Answer the requests on standard input, each a line of JSON, until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests = sys.stdin.buffer
    templates = _Templates(*json.loads(requests.readline()))
    while line := requests.readline():
        sys.stdout.buffer.write(json.dumps(templates.answer(line)).encode() + b"\n")
        sys.stdout.buffer.flush()


class _Templates:
    """The process's own side: compiled templates by name."""

    def __init__(self, sources: Mapping[str, str], cpu_s: float) -> None:
        # Only this process needs jinja2.
        from llama_ray.data.chat.environment import Environment

        self._sources, self._cpu_s = sources, cpu_s
        self._environment = Environment()

    def answer(self, line: bytes) -> Sequence[Any]:
        """Return ["texts", TEXTS] or ["error", REASON] for each rendering of a request."""
        return [self._render(Rendering(*rendering)) for rendering in json.loads(line)]

    def _render(self, rendering: Rendering) -> Sequence[Any]:
        try:
            self._environment.now = None if rendering.now is None else datetime.fromisoformat(rendering.now)
            with _limited(self._cpu_s):
                return ["texts", [self._text(rendering, cut) for cut in rendering.cuts or (None,)]]
        except MemoryError:
            return ["error", f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"]
        except Exception as error:
            # What failed is code of strangers: whatever it raised is the reason.
            return ["error", " ".join(str(error).split()) or type(error).__name__]

    def _text(self, rendering: Rendering, cut: Cut | None) -> str:
        variables = rendering.variables
        self._environment.marks = False
        if cut is not None:
            messages, begin, self._environment.marks = Cut(*cut)
            variables = {
                **variables,
                "messages": variables["messages"][:messages],
                "add_generation_prompt": begin,
            }
        return "".join(self._pieces(rendering.name, variables))

    def _pieces(self, name: str, variables: Mapping[str, Any]) -> Iterator[str]:
        length = 0
        for piece in self._environment.compiled(self._sources[name]).generate(**variables):
            length += len(piece)
            if length > MAX_CHARACTERS:
                _too_long()
            yield piece


def _too_long() -> NoReturn:
    raise ValueError(f"its text has more than {MAX_CHARACTERS:,} characters")


@contextmanager
def _limited(cpu_s: float) -> Iterator[None]:
    """End this process if the block takes too long; nothing less ends a computation in C."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, ELAPSED_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
