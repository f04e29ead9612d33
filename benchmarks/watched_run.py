"""A training run as it looks from outside: which processes it has, and in which phase it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import psutil

from llama_ray.storage import run_directory
from llama_ray.training.config import Schedule

NO_WORKERS, START, STEP, VALIDATION, CHECKPOINT, LAST_STEP, AFTER_A_LOSS = (
    "no workers", "start of the workers", "step", "validation", "checkpoint", "last step", "after a loss",
)  # fmt: skip
"""Phases: the driver or controller starts; ...; a worker is lost and the others have not been ended yet."""

_STARTED = re.compile(r"going on after step (\d+) of")
_STEP = re.compile(r"step +(\d+)/")
_VALIDATED = re.compile(r"step (\d+)  validation loss")


@dataclass
class WatchedRun:
    """Follows the workers' output and the run's directory; `logs` is the directory of the Ray session's log files."""

    directory: Path
    logs: Path
    schedule: Schedule
    raylets: Callable[[], list[int]]
    steps_trained: int = 0
    """Steps that were taken, counted as often as they were."""
    last_step: int = 0
    workers: list[psutil.Process] = field(default_factory=list)
    """Those of the newest group, also if they are lost."""
    _outputs: dict[int, TextIO] = field(default_factory=dict)
    _started: bool = False
    _validated: int = 0

    def find_processes(self, title: str) -> list[psutil.Process]:
        """Return the processes of Ray's actors of the class `title`."""
        found = []
        for raylet in self.raylets():
            try:
                children = psutil.Process(raylet).children()
            except psutil.NoSuchProcess:
                continue
            found += [child for child in children if title in _command(child)]
        return found

    def look_for_workers(self) -> None:
        """Take note of workers that have come up since."""
        known = {worker.pid for worker in self.workers}
        new = [worker for worker in self.find_processes("RayTrainWorker") if worker.pid not in known]
        if new and any(not is_alive(worker) for worker in self.workers):
            # Another group.
            self.read_output()
            self.workers, self._outputs = [], {}
            self._started, self._validated = False, 0
        self.workers += new

    def read_output(self) -> None:
        """Read what the workers have printed since."""
        for worker in self.workers:
            if worker.pid not in self._outputs:
                for file in self.logs.glob(f"worker-*-{worker.pid}.out"):
                    self._outputs[worker.pid] = file.open()
        for output in self._outputs.values():
            for line in output:
                self._take(line)

    def _take(self, line: str) -> None:
        self._started = self._started or not line.startswith(":")
        if match := _STARTED.match(line):
            self.last_step = int(match[1])
        elif match := _STEP.match(line):
            self.last_step = int(match[1])
            self.steps_trained += 1
        elif match := _VALIDATED.match(line):
            self._validated = int(match[1])

    @property
    def phase(self) -> str:
        """The phase now, as far as the last look and the last output tell."""
        alive = [is_alive(worker) for worker in self.workers]
        if not any(alive):
            return NO_WORKERS
        if not all(alive):
            return AFTER_A_LOSS
        if not self._started:
            return START
        step = self.last_step
        if step == self.schedule.total_steps:
            return LAST_STEP
        if self.schedule.validates(step) and self._validated < step:
            return VALIDATION
        saved = step - step % self.schedule.checkpoint_every
        checkpoint = run_directory.checkpoint_of(str(self.directory), saved)
        if saved and run_directory.read_marker(checkpoint) is None:
            return CHECKPOINT
        return STEP


def is_alive(process: psutil.Process) -> bool:
    """Return whether `process` runs; one that has ended and was not waited for yet does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
