"""Where a run reports: the console here, MLflow in `llama_ray.orchestration`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from llama_ray.model.llama import Llama
from llama_ray.training.checkpointing.checkpointer import CheckpointResult
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import Schedule
from llama_ray.training.parallel.process_group import rank

Metrics = Mapping[str, float]
"""Metric name -> value, named `group/metric` as they appear in MLflow."""


_VALIDATION_OF = "loss/validation/"
"""Before the name of a source of a mixture."""


class Observer(Protocol):
    """Receives the events of a run; every worker calls it, in the same order."""

    def started(self, schedule: Schedule, progress: Progress, layout: str) -> None:
        """The run starts, or continues after `progress.step`; `layout` describes how the workers share the model."""

    def logged(self, step: int, metrics: Metrics) -> None:
        """A point of the training curve was measured."""

    def validated(self, step: int, metrics: Metrics, model: Llama | None) -> None:
        """The model was validated; `model` has the weights of `step`, to generate from; None if it is too large."""

    def checkpointed(self, result: CheckpointResult) -> None:
        """A checkpoint is complete, or could not be stored. Workers may report it at different steps."""

    def profiled(self, trace: Path) -> None:
        """A profiler trace was written; on rank 0 only."""

    def unsent(self) -> list[Any]:
        """Return what was not delivered yet, in JSON's types; a checkpoint keeps it, for `started` after a restart."""


class Console:
    """Prints the events as lines of text, on rank 0."""

    def __init__(self) -> None:
        self._schedule: Schedule | None = None
        self._first_step, self._start = 0, time.monotonic()

    def started(self, schedule: Schedule, progress: Progress, layout: str) -> None:
        """See `Observer`."""
        self.say(layout)
        self._schedule, self._first_step, self._start = schedule, progress.step, time.monotonic()
        if progress.step >= schedule.total_steps:
            self.say(f"nothing left to train: step {progress.step} of {schedule.total_steps} is done")
        elif progress.step:
            self.say(f"going on after step {progress.step} of {schedule.total_steps}")

    def logged(self, step: int, metrics: Metrics) -> None:
        """See `Observer`."""
        assert self._schedule is not None
        total = self._schedule.total_steps
        left = (time.monotonic() - self._start) / (step - self._first_step) * (total - step)
        self.say(
            f"step {step:>{len(str(total))}}/{total}  loss {metrics['loss/train']:.4f}  "
            f"lr {metrics['train/learning_rate']:.2e}  grad norm {metrics['train/gradient_norm']:.2f}  "
            f"{metrics['throughput/tokens_per_s']:,.0f} tokens/s  MFU {metrics['throughput/mfu']:.1%}  "
            f"{_duration(left)} left"
        )

    def validated(self, step: int, metrics: Metrics, model: Llama | None) -> None:
        """See `Observer`."""
        sources = "".join(
            f"  {name.removeprefix(_VALIDATION_OF)} {loss:.4f}"
            for name, loss in metrics.items()
            if name.startswith(_VALIDATION_OF)
        )
        measured = (
            f"perplexity {metrics['validation/perplexity']:.2f}"
            if "validation/perplexity" in metrics
            else f"accuracy {metrics['validation/rewards/accuracies']:.1%}"
        )
        self.say(f"step {step}  validation loss {metrics['loss/validation']:.4f}  {measured}{sources}")

    def checkpointed(self, result: CheckpointResult) -> None:
        """See `Observer`."""
        if result.error:
            self.say(f"step {result.step}  CHECKPOINT NOT STORED, the one before stays: {result.error}")
        else:
            self.say(
                f"step {result.step}  saved {result.directory} in {result.write_s:.1f} s, training waited "
                f"{result.stall_s:.2f} s"
            )

    def profiled(self, trace: Path) -> None:
        """See `Observer`."""
        self.say(f"profiler trace: {trace}")

    def unsent(self) -> list[Any]:
        """See `Observer`."""
        return []

    def say(self, line: str) -> None:
        """Print `line`, on rank 0 only."""
        if rank() == 0:
            print(line, flush=True)


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s"
