"""A training run, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from llama_ray.data.mixtures.sources import Given, parse_sources
from llama_ray.model.config import LlamaConfig
from llama_ray.storage.attempts import Attempt
from llama_ray.training.checkpointing.progress import Progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.hosts.interrupt import Interrupt
from llama_ray.training.parallel.process_group import rank, world_size
from llama_ray.training.preflight import check_run
from llama_ray.training.preparation import prepare_run
from llama_ray.training.reporting.observer import Observer
from llama_ray.training.reporting.profiling import profiled
from llama_ray.training.starting_point import starting_point
from llama_ray.training.task import for_data


def train(
    model_config: LlamaConfig,
    config: TrainConfig,
    data: Given,
    *,
    device: torch.device,
    observer: Observer,
    output_dir: str | Attempt | None = None,
    resume_from: Path | None = None,
    run_id: str | None = None,
    poll_interrupt: Callable[[], Interrupt] = lambda: Interrupt.NONE,
) -> Progress:
    """Train a model on the prepared `data`, see `parse_sources`, on every worker of the current process group.

    Call it in each worker; without a process group it trains alone. Checkpoints go to `output_dir`: an absolute path
    or a URI that all workers can write to, or the run of an attempt, as long as that is the newest one; None writes
    none. Training continues from the checkpoint directory `resume_from`, or else begins as `config` says: with the
    weights of `init_from`, with the state of `branch_from`, or with random weights. `run_id` is kept in every
    checkpoint. `poll_interrupt` is called at each step; an interrupt of any worker makes all workers act at the same
    step.

    Returns how far the run got. Raises ValueError if data, model and configuration do not fit together,
    CheckpointError if `resume_from` is damaged, Stopped after an interrupt that asks for it, Superseded once a newer
    attempt has begun, OutOfMemory, and
    TrainingError if training cannot continue, or has led to nothing: the loss is not finite, or checkpoints cannot be
    stored. If no steps are left, the weights of `resume_from` are validated, unless they were.
    """
    sources = parse_sources(data)
    config = for_data(config, sources)
    with starting_point(config, resume_from) as start:
        check_run(model_config, config, sources, world_size(), start)
        run = prepare_run(
            model_config,
            config,
            sources,
            device=device,
            observer=observer,
            output_dir=output_dir,
            start=start,
            run_id=run_id,
            poll_interrupt=poll_interrupt,
        )
    run.start()
    run.measure_finished_run()
    profiler = profiled(config.profile_steps if rank() == 0 else 0, observer.profiled)
    with profiler as profile_step, closing(run.loader):
        for step in run.remaining_steps():
            epoch = run.loader.epoch
            result = run.take_step(step)
            run.stop_if_diverged(step)
            run.log(step, epoch, result)
            run.validate_and_save(step)
            run.answer_interrupt(step)
            run.report_checkpoints()
            profile_step()
    run.finish()
    run.check_success()
    return run.progress
