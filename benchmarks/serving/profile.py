"""Where the processor time of a measurement goes: processes, their threads, and functions of Python."""

from __future__ import annotations

import time
from collections import Counter, defaultdict

from benchmarks.serving.load import Measured
from benchmarks.serving.processes import Family, command, thread_name

_ROLES = (
    ("benchmarks.serving.offline", "engine"),
    ("VLLM::EngineCore", "vLLM engine core"),
    ("vllm.entrypoints", "vLLM API"),
    ("ServeReplica:llama-ray:Api", "API"),
    ("ServeReplica:llama-ray:", "replica"),
    ("ProxyActor", "proxy"),
    ("haproxy", "HAProxy"),
    ("HAProxy", "HAProxy's manager"),
    ("ServeController", "Serve controller"),
    ("gcs_server", "GCS"),
    ("raylet", "raylet"),
    ("dashboard", "dashboard"),
)
_LEAST = 0.01
"""Share of one processor that is worth a line."""


class Profile:
    """Processor time from now to `end`."""

    def __init__(self, family: Family) -> None:
        self._family, self._begin, self._before = family, time.monotonic(), family.cpu_s()

    def end(self, measured: Measured) -> str:
        """Return a table: each process and its busiest threads, as a share of one processor and for each token."""
        after = self._family.cpu_s()
        seconds = time.monotonic() - self._begin
        tokens = sum(outcome.tokens for outcome in measured.outcomes)
        threads: dict[int, Counter[str]] = defaultdict(Counter)
        for (pid, thread), total in after.items():
            used = total - self._before.get((pid, thread), 0.0)
            name = "main" if pid == thread else thread_name(pid, thread)
            threads[pid][f"{name} {thread}" if used / seconds > _LEAST else "others"] += used
        rows = [("client", measured.client_cpu_s, Counter[str]())]
        rows += [(role(pid), times.total(), times) for pid, times in threads.items()]
        lines = ["| process | of a core | us a token | threads, us a token |", "|---|---|---|---|"]
        for name, used, times in sorted(rows, key=lambda row: -row[1]):
            if used / seconds < _LEAST:
                continue
            parts = ", ".join(f"{thread} {1e6 * s / tokens:.0f}" for thread, s in times.most_common(6))
            lines.append(f"| {name} | {used / seconds:.0%} | {1e6 * used / tokens:.0f} | {parts} |")
        everything = sum(row[1] for row in rows)
        lines.append(f"| all | {everything / seconds:.0%} | {1e6 * everything / tokens:.0f} | |")
        return "\n".join(lines)


def role(pid: int) -> str:
    """Return what a process does, by its command line."""
    line = command(pid)
    return next((name for part, name in _ROLES if part in line), line[:40])
