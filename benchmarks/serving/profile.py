"""Where the processor time of a measurement goes: processes, their threads, and functions of Python."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.serving.load import Measured
from benchmarks.serving.processes import Family, command, thread_name

_ROLES = (
    ("benchmarks.serving.offline", "engine"),
    ("VLLM::", "vLLM engine"),
    ("vllm.entrypoints", "vLLM API"),
    ("ServeReplica:llama-ray:Api", "API"),
    ("ServeReplica:llama-ray:RegistryFollower", "follower"),
    ("ServeReplica:llama-ray:", "replica"),
    ("ProxyActor", "proxy"),
    ("HAProxyManager", "HAProxy's manager"),
    ("haproxy", "HAProxy"),
    ("ServeController", "Serve controller"),
    ("gcs_server", "GCS"),
    ("/raylet", "raylet"),
    ("dashboard", "dashboard"),
    ("log_monitor", "log monitor"),
    ("autoscaler", "autoscaler"),
)
_LEAST = 0.01
"""Share of one processor that is worth a line."""
_LOOKS_AT = ("engine", "replica", "API", "proxy")
_RATE = 100
"""Looks at the stack of each thread in a second."""
_PY_SPY = str(Path(sys.executable).parent / "py-spy")


class Profile:
    """Processor time from now to `end`; with `functions` also what Python does in it, which costs some itself."""

    def __init__(self, family: Family, *, functions: bool) -> None:
        self._family = family
        self._watched = {pid: _Watched(pid) for pid in family.pids() if functions and role(pid) in _LOOKS_AT}
        self._begin, self._before = time.monotonic(), family.cpu_s()

    def end(self, measured: Measured) -> str:
        """Return a table: each process and its busiest threads, as a share of one processor and for each token."""
        after = self._family.cpu_s()
        seconds = time.monotonic() - self._begin
        tokens = max(1, sum(outcome.tokens for outcome in measured.outcomes))
        used = {key: total - self._before.get(key, 0.0) for key, total in after.items()}
        threads: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        names: dict[int, dict[int, str]] = {}
        for (pid, thread), cpu_s in used.items():
            if cpu_s / seconds < _LEAST:
                threads[pid]["others"] += cpu_s
            else:
                python = names.setdefault(pid, _python_names(pid))
                threads[pid][python.get(thread) or thread_name(pid, thread) or "ended"] += cpu_s
        rows = [("client", measured.client_cpu_s, dict[str, float]())]
        rows += [(role(pid), sum(times.values()), dict(times)) for pid, times in threads.items()]
        lines = ["| process | of a core | us a token | threads, us a token |", "|---|---|---|---|"]
        for name, cpu_s, times in sorted(rows, key=lambda row: -row[1]):
            if cpu_s / seconds >= _LEAST:
                busiest = sorted(times.items(), key=lambda item: -item[1])[:6]
                parts = ", ".join(f"{thread} {1e6 * s / tokens:.0f}" for thread, s in busiest)
                lines.append(f"| {name} | {cpu_s / seconds:.0%} | {1e6 * cpu_s / tokens:.0f} | {parts} |")
        everything = sum(row[1] for row in rows)
        lines.append(f"| all | {everything / seconds:.0%} | {1e6 * everything / tokens:.0f} | |")
        return "\n".join(
            [*lines, *(watched.end(role(pid), tokens) for pid, watched in self._watched.items())]
        )


class _Watched:
    """py-spy, looking at who holds the interpreter's lock in one process."""

    def __init__(self, pid: int) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._file = Path(self._directory.name, "stacks")
        self._process = subprocess.Popen(
            [
                *(_PY_SPY, "record", "--pid", str(pid), "--gil", "--format", "raw", "--rate", str(_RATE)),
                *("--duration", "600", "--output", str(self._file)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self, name: str, tokens: int) -> str:
        """Return the functions that held the lock longest, themselves and with what they called."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait()
        own, whole = Counter[str](), Counter[str]()
        for line in self._file.read_text().splitlines() if self._file.exists() else ():
            stack, _, count = line.rpartition(" ")
            frames = [frame.rpartition(":")[0] or frame for frame in stack.split(";")]
            own[frames[-1]] += int(count)
            for frame in set(frames):
                whole[frame] += int(count)
        self._directory.cleanup()

        def us(looks: int) -> str:
            return f"{1e6 * looks / _RATE / tokens:.0f}"

        lines = [
            f"\n{name} holds the lock of its interpreter for {us(own.total())} us a token; in the functions"
        ]
        lines += [f"  {us(count):>5}  {frame}" for frame, count in own.most_common(20)]
        lines += ["with what they call"]
        lines += [f"  {us(count):>5}  {frame}" for frame, count in whole.most_common(30)]
        return "\n".join(lines)


def role(pid: int) -> str:
    """Return what a process does, by its command line."""
    line = command(pid)
    return next((name for part, name in _ROLES if part in line), line[:40])


def _python_names(pid: int) -> dict[int, str]:
    """Return the names of Python's threads, which the system does not know."""
    dump = subprocess.run([_PY_SPY, "dump", "--pid", str(pid), "--json"], capture_output=True, text=True)
    threads = json.loads(dump.stdout) if dump.returncode == 0 else []
    return {thread["os_thread_id"]: thread["thread_name"] for thread in threads if thread["thread_name"]}
