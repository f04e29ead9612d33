"""What the training tests share: an observer that records, real worker processes, and the growth of memory."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_ray.data.mixtures.stages import Segment
from llama_ray.data.mixtures.timetable import Timetable
from llama_ray.model.llama import Llama
from llama_ray.storage.run_directory import checkpoint_name
from llama_ray.training.checkpointing.checkpointer import CheckpointResult
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.reporting.observer import Console, Metrics
from tests.processes import fresh_processes

CPU = torch.device("cpu")
TWELVE_STEPS = TrainConfig(
    max_steps=12, learning_rate=3e-3, log_every=1, validate_every=6, checkpoint_every=5
)
EIGHT_STEPS = TrainConfig(
    max_steps=8, batch_size=4, learning_rate=3e-3, log_every=1, checkpoint_every=4, precision="fp32"
)

Settings = dict[str, Any]
"""Fields of TrainConfig that make a layout."""
DDP: Settings = {"parallelism": "ddp"}
FSDP: Settings = {"parallelism": "fsdp"}
HSDP: Settings = {"parallelism": "hsdp", "fsdp_size": 2}
TP: Settings = {"tensor_parallel": 2}
MUON: Settings = {"optimizer": "muon"}
ADAPTERS: Settings = {"init_from": "any model of this shape", "lora_rank": 8}


class Recorder(Console):
    """Keeps the events of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpoints: list[CheckpointResult] = []
        self.points: dict[int, Metrics] = {}
        self.validations: dict[int, Metrics] = {}

    def logged(self, step: int, metrics: Metrics) -> None:
        self.points[step] = metrics
        super().logged(step, metrics)

    def validated(self, step: int, metrics: Metrics, model: Llama | None) -> None:
        self.validations[step] = metrics
        super().validated(step, metrics, model)

    def checkpointed(self, result: CheckpointResult) -> None:
        self.checkpoints.append(result)
        super().checkpointed(result)


@dataclass
class FinishedRun:
    """A run that has ended: what it reported and returned, and the directory of its checkpoints."""

    recorder: Recorder
    progress: Progress
    directory: Path

    def checkpoint(self, step: int) -> Path:
        return self.directory / checkpoint_name(step)


def schedule_of(config: TrainConfig, steps_per_epoch: int = 40) -> Schedule:
    """Return the schedule of a run whose data are `steps_per_epoch` global batches."""
    return Schedule.of(config, Timetable([Segment(1, 1, 32, {})]), steps_per_epoch)


def losses(recorder: Recorder) -> dict[int, float]:
    """Return the training loss by step."""
    return {step: metrics["loss/train"] for step, metrics in recorder.points.items()}


def losses_after(step: int, losses: dict[int, float]) -> dict[int, float]:
    """Return the losses of the steps after `step`."""
    return {s: loss for s, loss in losses.items() if s > step}


def growth(work: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory of this process grows at most while it does `work`."""
    before = _memory("VmRSS")
    # Reset the peak.
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return _memory("VmHWM") - before


def _memory(kind: str) -> int:
    [line] = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(kind)]
    return int(line.split()[1]) * 1024


def in_processes(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `function(*args)` in `world_size` processes that form a gloo process group; return the results by rank.

    Raises AssertionError, with the traceback, if any of them fails.
    """
    context = fresh_processes()
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_worker, args=(rank, world_size, directory, theirs, function, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    for error, _ in results:
        if error:
            raise AssertionError(error)
    return [result for _, result in results]


def _worker(
    rank: int, world_size: int, directory: str, pipe: Connection, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size
        )
        pipe.send((None, function(*args)))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((traceback.format_exc(), None))
