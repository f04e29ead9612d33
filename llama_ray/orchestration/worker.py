"""What every worker of a training run does: the training loop, observed, and a verdict on how it ended."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass

import ray.train
import torch
from ray.train.torch import get_device

from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.interrupts import InterruptWatcher
from llama_ray.orchestration.mlflow_observer import MLflowObserver
from llama_ray.orchestration.resources import cpu_threads
from llama_ray.storage import store
from llama_ray.tracking.buffer import BufferedRun
from llama_ray.training.checkpointing.catalog import latest_valid_checkpoint
from llama_ray.training.checkpointing.files import local_copy
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.elastic import for_workers
from llama_ray.training.errors import OutOfMemory, TrainingError
from llama_ray.training.hosts.interrupt import Stopped
from llama_ray.training.loop import train
from llama_ray.training.parallel.process_group import rank, world_size

_OUT_OF_MEMORY_FILE = "out_of_memory.json"
"""The steps at which workers of this launch ran out of memory, in order."""


@dataclass(frozen=True)
class WorkerPlan:
    """What the driver tells every worker. `config` is written for `planned_workers`; fewer may run."""

    model: LlamaConfig
    config: TrainConfig
    data: str
    directory: str
    planned_workers: int
    run_id: str
    tracking_uri: str


@dataclass(frozen=True)
class Ending:
    """How the workers ended, if a restart would not help: after the last step, stopped, or with an error."""

    step: int = 0
    stopped_at: int | None = None
    error: str = ""


def run_worker(plan: WorkerPlan) -> Ending:
    """Train in the process group that Ray Train has made, from the latest valid checkpoint.

    Whatever this raises, Ray Train answers with a restart of all workers.
    """
    # Ray Train logs a line for each rank and report otherwise.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    out_of_memory_steps = _read_out_of_memory_steps(plan.directory)
    if len(out_of_memory_steps) > 1 and out_of_memory_steps[-1] == out_of_memory_steps[-2]:
        return Ending(
            error=f"a worker ran out of memory at step {out_of_memory_steps[-1]} twice; lower batch_size (and raise "
            "gradient_accumulation_steps), or use activation_checkpointing or more workers, and --resume"
        )
    try:
        return Ending(_train(plan).step)
    except Stopped as error:
        return Ending(stopped_at=error.step)
    except OutOfMemory as error:
        # A restart helps if something else had taken the memory.
        steps = [*out_of_memory_steps, error.step]
        store.write_text(store.join(plan.directory, _OUT_OF_MEMORY_FILE), json.dumps(steps))
        raise
    except TrainingError as error:
        # All workers raise it together, and would again after a restart.
        return Ending(error=str(error))


def forget_out_of_memory(directory: str) -> None:
    """Delete the record of steps that ran out of memory, so that a new launch may try them again."""
    store.delete(store.join(directory, _OUT_OF_MEMORY_FILE))


def _train(plan: WorkerPlan) -> Progress:
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(ray.train.get_context().get_local_world_size()))
    group_size = plan.config.tensor_parallel
    config = for_workers(plan.config, world_size() // group_size, plan.planned_workers // group_size)
    run = BufferedRun(plan.run_id, plan.tracking_uri, system_metrics=True) if rank() == 0 else None
    try:
        checkpoint = latest_valid_checkpoint(plan.directory, config.collective_timeout_s)
        with local_copy(checkpoint) if checkpoint else nullcontext() as resume_from:
            return train(
                plan.model,
                config,
                plan.data,
                device=device,
                observer=MLflowObserver(run, plan.data, plan.directory),
                output_dir=plan.directory,
                resume_from=resume_from,
                run_id=plan.run_id,
                poll_interrupt=InterruptWatcher(plan.directory).poll,
            )
    finally:
        if run:
            run.close()


def _read_out_of_memory_steps(directory: str) -> list[int]:
    steps: list[int] = json.loads(store.read_text(store.join(directory, _OUT_OF_MEMORY_FILE)) or "[]")
    return steps
