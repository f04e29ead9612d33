"""A torch profiler trace of a few steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_WAIT_STEPS = 3  # the first ones compile, warm the allocator and make the optimizer's state


@contextmanager
def profiled(steps: int, written: Callable[[Path], None]) -> Iterator[Callable[[], None]]:
    """Profile `steps` training steps, after three that are not; call what this yields at the end of each step.

    The trace, for chrome://tracing or ui.perfetto.dev, with shapes and memory, goes to a file trace.json in a new
    temporary directory; then `written` gets its path, in the middle of the run. With 0 steps nothing happens. A run
    that ends before the last of them writes the steps it has profiled.
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
        schedule=schedule(skip_first=_WAIT_STEPS - 1, wait=0, warmup=1, active=steps, repeat=1),
        on_trace_ready=save,
        record_shapes=True,
        profile_memory=True,
    ) as profiler:
        yield profiler.step
