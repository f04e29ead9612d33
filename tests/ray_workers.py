"""The workers of the Ray cluster that this process started."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil


def ray_workers(task: str) -> list[psutil.Process]:
    """Return the workers whose title holds `task`. They are no children of this process, see `warm_workers`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # A process may end while we look.
            if task in " ".join(process.cmdline()) and _is_of_this_process(process):
                found.append(process)
    return found


def _is_of_this_process(worker: psutil.Process) -> bool:
    # Ray names sessions after the process that started them.
    words = (word for parent in worker.parents() for word in parent.cmdline())
    return any(word.startswith("/tmp/ray/session_") and word.endswith(f"_{os.getpid()}") for word in words)
