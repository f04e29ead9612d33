"""A torch profiler trace of a few steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

# The first steps compile, fill the allocator's cache and create the optimizer's state.
_SKIPPED_STEPS = 3


@contextmanager
def profiled(steps: int, written: Callable[[Path], None]) -> Iterator[Callable[[], None]]:
    """Profile `steps` training steps after the first three; call the function that this yields at the end of each step.

    The trace, for chrome://tracing or ui.perfetto.dev, contains shapes and memory. It is written to a file trace.json
    in a new temporary directory, and `written` is called with its path after the last profiled step. A run that ends
    earlier writes the steps that were profiled. With 0 steps nothing happens.
    """
    if not steps:
        yield lambda: None
        return

    def save(profiler: profile) -> None:
        path = Path(tempfile.mkdtemp(prefix="llama_ray-")) / "trace.json"
        profiler.export_chrome_trace(str(path))
        written(path)

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(
        activities=activities,
        schedule=schedule(skip_first=_SKIPPED_STEPS - 1, wait=0, warmup=1, active=steps, repeat=1),
        on_trace_ready=save,
        record_shapes=True,
        profile_memory=True,
    ) as profiler:
        yield profiler.step
