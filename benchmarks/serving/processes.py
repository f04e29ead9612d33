"""The processes of a server, found by a mark in their environment, and the processor time of each of their threads."""

from __future__ import annotations

import os
import signal
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_MARK = "LLAMA_RAY_BENCHMARK"


@dataclass(frozen=True)
class Family:
    """The processes that descend from one that was started with `environment`, also those that are nobody's child."""

    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def environment(self) -> dict[str, str]:
        """What the first process gets, in addition to the environment of this one."""
        return {_MARK: self.mark}

    def pids(self) -> set[int]:
        """Return the process ids."""
        mark = f"{_MARK}={self.mark}".encode()
        parents, found = {}, set()
        for path in Path("/proc").iterdir():
            if path.name.isdecimal():
                try:
                    pid = int(path.name)
                    # The name of the command, in parentheses, may hold anything.
                    parents[pid] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                    if mark in (path / "environ").read_bytes().split(b"\0"):
                        found.add(pid)
                except OSError:
                    # It has ended.
                    continue
        # A process that changes its title writes over its environment.
        while new := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= new
        return found

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all of them."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill all of them; return once they are gone."""
        deadline = time.monotonic() + 30
        known: set[int] = set()
        while alive := {pid for pid in known | self.pids() if command(pid)}:
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {sorted(alive)} do not end")
            # Children whose parent is killed first are found no more; others have started meanwhile.
            known |= alive
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def find(self, title: str) -> list[int]:
        """Return the processes whose command line contains `title`."""
        return [pid for pid in self.pids() if title in command(pid)]

    def cpu_s(self) -> dict[tuple[int, int], float]:
        """Return the processor time of each thread by process and thread, in seconds."""
        times = {}
        for pid in self.pids():
            for task in Path(f"/proc/{pid}/task").glob("*"):
                try:
                    times[pid, int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
                except OSError:
                    continue
        return times


def command(pid: int) -> str:
    """Return the command line of a process, or "" if it has ended. Ray's workers have the name of their actor there."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def thread_name(pid: int, thread: int) -> str:
    """Return the name of a thread, or "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip()
    except OSError:
        return ""
