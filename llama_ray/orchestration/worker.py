"""What every worker of a training run does: the training loop, observed, and what becomes of its errors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import ray.train
import torch
from ray.train.torch import get_device

from llama_ray.data.mixtures.sources import DataSource
from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.failures import may_pass
from llama_ray.orchestration.interrupts import InterruptWatcher
from llama_ray.orchestration.mlflow_observer import MLflowObserver
from llama_ray.orchestration.resources import cpu_threads
from llama_ray.storage.attempts import Attempt, Superseded
from llama_ray.tracking.buffer import BufferedRun
from llama_ray.training.checkpointing.catalog import latest_valid_checkpoint
from llama_ray.training.checkpointing.files import local_copy
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.elastic import for_workers
from llama_ray.training.errors import TrainingError
from llama_ray.training.hosts.interrupt import Stopped
from llama_ray.training.loop import train
from llama_ray.training.parallel.process_group import rank, world_size
from llama_ray.utils.errors import one_line
from llama_ray.utils.redact import RedactedRepr


@dataclass(frozen=True, repr=False)
class WorkerPlan(RedactedRepr):
    """What the driver tells every worker. `config` is written for `planned_workers`; fewer may run.

    `secrets` are environment variables that Ray must not show.
    """

    model: LlamaConfig
    config: TrainConfig
    data: Sequence[DataSource]
    attempt: Attempt
    planned_workers: int
    run_id: str
    tracking_uri: str
    secrets: dict[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Ending:
    """How the workers ended together: after the last step, stopped, superseded, or because training cannot continue."""

    step: int = 0
    stopped_at: int | None = None
    superseded: bool = False
    error: str = ""


def run_worker(plan: WorkerPlan) -> Ending:
    """Train in the process group that Ray Train has made, from the latest valid checkpoint.

    What this raises ends the group at once; TrainingError, for an error of this worker alone, ends the run, too.
    """
    os.environ.update(plan.secrets)
    try:
        return Ending(_train(plan).step)
    except Stopped as error:
        return Ending(stopped_at=error.step)
    except Superseded:
        return Ending(superseded=True)
    except TrainingError as error:
        # All workers raise it together. Those that end first wait until rank 0 has delivered the metrics.
        return Ending(error=str(error))
    except ValueError as error:
        if may_pass(error):
            raise
        raise TrainingError(one_line(error)) from error


def _train(plan: WorkerPlan) -> Progress:
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(ray.train.get_context().get_local_world_size()))
    group_size = plan.config.tensor_parallel
    config = for_workers(plan.config, world_size() // group_size, plan.planned_workers // group_size)
    run = None
    if rank() == 0:
        run = BufferedRun(
            plan.run_id, plan.tracking_uri, system_metrics=True, may_send=plan.attempt.is_newest
        )
    directory = plan.attempt.run
    try:
        checkpoint = latest_valid_checkpoint(directory, config.collective_timeout_s)
        with local_copy(checkpoint) if checkpoint else nullcontext() as resume_from:
            return train(
                plan.model,
                config,
                plan.data,
                device=device,
                observer=MLflowObserver(run, plan.data, directory, config.data_cache_bytes),
                output_dir=plan.attempt,
                resume_from=resume_from,
                run_id=plan.run_id,
                poll_interrupt=InterruptWatcher(plan.attempt).poll,
            )
    finally:
        if run:
            run.close()
