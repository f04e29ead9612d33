"""Errors that end a run, or this attempt at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llama_ray.utils.errors import first_line
from llama_ray.utils.memory import is_out_of_memory


class TrainingError(RuntimeError):
    """A run that cannot continue, and could not after a restart; the message gives the reason and a way out."""


class OutOfMemory(MemoryError):
    """A worker ran out of memory in `step`. A restart may help, if another process had taken the memory."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(step, reason)
        self.step, self.reason = step, reason

    def __str__(self) -> str:
        return f"out of memory at step {self.step}: {self.reason}"


@contextmanager
def out_of_memory_at(step: int) -> Iterator[None]:
    """Re-raise out-of-memory errors of torch and Python as OutOfMemory(step)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(step, first_line(error)) from error
