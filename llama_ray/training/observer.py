"""Where a run tells what it does: the console here, MLflow and Ray Train in the adapter above."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from llama_ray.model.llama import Llama
from llama_ray.training.config import Schedule
from llama_ray.training.parallel import rank

Metrics = Mapping[str, float]
"""Metric name -> value, named `group/metric` as they appear in MLflow."""


class Observer(Protocol):
    """Called by every worker, in the same order on all of them."""

    def started(self, schedule: Schedule, step: int) -> None:
        """The run begins, or goes on after `step`."""

    def logged(self, step: int, metrics: Metrics) -> None:
        """A point of the training curve."""

    def validated(self, step: int, metrics: Metrics, model: Llama) -> None:
        """A validation; `model` holds the weights of `step` and may be generated from."""

    def checkpoint(self, step: int, metrics: Metrics, write: Callable[[Path], None]) -> None:
        """Time to save: `write(directory)` writes the checkpoint. Only rank 0 needs to call it."""


class Console:
    """Progress as lines of text on rank 0, and checkpoints as `output_dir/step_*`."""

    def __init__(self, output_dir: Path | None = None) -> None:
        self.output_dir = output_dir
        self._schedule: Schedule | None = None
        self._first_step, self._start = 0, time.monotonic()

    def started(self, schedule: Schedule, step: int) -> None:
        """See `Observer`."""
        self._schedule, self._first_step, self._start = schedule, step, time.monotonic()
        if step:
            self.say(f"going on after step {step} of {schedule.total_steps}")

    def logged(self, step: int, metrics: Metrics) -> None:
        """See `Observer`."""
        assert self._schedule is not None
        total = self._schedule.total_steps
        left = (time.monotonic() - self._start) / (step - self._first_step) * (total - step)
        self.say(
            f"step {step:>{len(str(total))}}/{total}  loss {metrics['train/loss']:.4f}  "
            f"lr {metrics['train/learning_rate']:.2e}  grad norm {metrics['train/gradient_norm']:.2f}  "
            f"{metrics['throughput/tokens_per_s']:,.0f} tokens/s  MFU {metrics['throughput/mfu']:.1%}  "
            f"{_duration(left)} left"
        )

    def validated(self, step: int, metrics: Metrics, model: Llama) -> None:
        """See `Observer`."""
        self.say(
            f"step {step}  validation loss {metrics['validation/loss']:.4f}  "
            f"perplexity {metrics['validation/perplexity']:.2f}"
        )

    def checkpoint(self, step: int, metrics: Metrics, write: Callable[[Path], None]) -> None:
        """See `Observer`."""
        if self.output_dir is not None and rank() == 0:
            directory = self.output_dir / checkpoint_name(step)
            write(directory)
            self.say(f"step {step}  saved {directory}")

    def say(self, line: str) -> None:
        """Print `line`, on rank 0 only."""
        if rank() == 0:
            print(line, flush=True)


def checkpoint_name(step: int) -> str:
    """The directory name of a step's checkpoint; names sort as steps do."""
    return f"step_{step:08d}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s"
