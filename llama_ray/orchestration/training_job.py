"""What a launch asks for, checked before a worker starts: which run, from which checkpoint, on which data."""

from __future__ import annotations

import secrets
import sys
import time
from dataclasses import dataclass, replace

import torch

from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.sources import Given, parse_sources
from llama_ray.evaluation.evaluate import EvaluationConfig
from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.launch import IF_THERE, LATEST, LaunchConfig
from llama_ray.orchestration.report import short_count
from llama_ray.orchestration.resources import check_workers, uses_gpu
from llama_ray.orchestration.run_data import RunData, same_for_workers
from llama_ray.orchestration.run_evaluations import evaluation_config
from llama_ray.pretrained import fixed
from llama_ray.storage import run_directory, store
from llama_ray.storage.paths import absolute
from llama_ray.training.checkpointing.files import local_description
from llama_ray.training.config import TrainConfig
from llama_ray.training.elastic import check_range, check_segments
from llama_ray.training.parallel.float8 import check_float8
from llama_ray.training.preflight import check_run
from llama_ray.training.starting_point import starting_point
from llama_ray.training.task import check_references, for_data


@dataclass(frozen=True)
class TrainingJob:
    """A training run whose settings have been checked."""

    name: str
    model: LlamaConfig
    config: TrainConfig
    launch: LaunchConfig
    data: RunData
    loader: Loader
    """At the position from which the run goes on."""
    branched_at: int
    """See `Progress`."""
    gpu: bool
    evaluation: EvaluationConfig | None
    """What is measured of checkpoints and of the version."""

    @property
    def directory(self) -> str:
        """The run's directory, a path or a URI."""
        return store.join(self.launch.output_dir, self.name)


def check_job(model: LlamaConfig, config: TrainConfig, launch: LaunchConfig, data: Given) -> TrainingJob:
    """Raise ValueError for everything that would fail later, and name the run."""
    sources = tuple(replace(source, location=same_for_workers(source)) for source in parse_sources(data))
    config = for_data(config, sources)
    check_references(config, sources)
    gpu = uses_gpu()
    least, most = launch.workers
    check_workers(least, gpu=gpu)
    if least == most:
        check_workers(most, gpu=gpu)
    if not gpu:
        check_float8(config, torch.device("cpu"))
    check_range(config, least, most, config.tensor_parallel)
    launch = replace(launch, output_dir=absolute(launch.output_dir))
    run_directory.check_writable(launch.output_dir)
    name, checkpoint = _name_and_checkpoint(model, launch)
    if config.init_from is not None and checkpoint is None:
        # Workers that start again must find the same weights.
        config = replace(config, init_from=fixed(config.init_from))
    with starting_point(config, checkpoint, local_description) as start:
        loader = check_run(model, config, sources, most, start)
        branched_at = start.progress().branched_at if start else 0
    # Of the stages that are not over.
    ahead = loader.timetable.ahead(sys.maxsize)
    check_segments(ahead, config.seq_len or model.max_seq_len, least, most, config.tensor_parallel)
    run_data = RunData.of(sources, loader)
    evaluation = evaluation_config(launch, run_data, model.max_seq_len)
    return TrainingJob(name, model, config, launch, run_data, loader, branched_at, gpu, evaluation)


def checkpoint_to_resume(launch: LaunchConfig) -> str | None:
    """Return the checkpoint that a run goes on from; None if it begins. Raises StorageError for no run to resume."""
    return _resumed(launch)[1] if launch.resume else None


def _name_and_checkpoint(model: LlamaConfig, launch: LaunchConfig) -> tuple[str, str | None]:
    """Return the run's name, and the checkpoint that it resumes from."""
    if launch.resume:
        return _resumed(launch)
    name = launch.run_name or _new_name(model)
    refuse_trained(launch, name)
    return name, None


def _resumed(launch: LaunchConfig) -> tuple[str, str | None]:
    """Return the name of the run that `launch` resumes, and its newest checkpoint."""
    if launch.resume == IF_THERE:
        assert launch.run_name is not None
        return launch.run_name, run_directory.latest_checkpoint(
            store.join(launch.output_dir, launch.run_name)
        )
    assert launch.resume is not None
    name = run_directory.latest_run(launch.output_dir) if launch.resume == LATEST else launch.resume
    checkpoint = run_directory.latest_checkpoint(store.join(launch.output_dir, name))
    if checkpoint is None:
        raise store.StorageError(
            f"{launch.output_dir} holds no checkpoint of run {name!r}; check --output_dir, or leave out --resume"
        )
    return name, checkpoint


def _new_name(model: LlamaConfig) -> str:
    """Return a name that no other launch takes, even in the same second."""
    time_and_number = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    return f"llama-{short_count(model.num_parameters())}-{time_and_number}"


def refuse_trained(launch: LaunchConfig, name: str) -> None:
    """Raise StorageError if the run has checkpoints: workers continue from those that they find."""
    if run_directory.latest_checkpoint(store.join(launch.output_dir, name)):
        raise store.StorageError(
            f"{launch.output_dir} holds run {name!r} already; use --resume {name} to go on, or another --run_name"
        )
