"""Training on a Ray cluster: the only file that knows Ray Train."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from llama_ray import storage
from llama_ray.cluster import check_workers, cpu_threads, uses_gpu
from llama_ray.data.shards import DatasetInfo, read_info
from llama_ray.mlflow_observer import MLflowObserver
from llama_ray.model.config import LlamaConfig
from llama_ray.paths import absolute, is_uri
from llama_ray.publish import publish
from llama_ray.report import describe_run, describe_version, short_count
from llama_ray.tracking.registry import Policy, PromotionDecision, Version, check_name
from llama_ray.tracking.runs import Run
from llama_ray.tracking.tags import standard_tags
from llama_ray.training.config import TrainConfig
from llama_ray.training.loop import train
from llama_ray.training.observer import Metrics, checkpoint_name
from llama_ray.training.parallel import rank
from llama_ray.training.preflight import check_run
from llama_ray.training.state import load_progress


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where a run happens, where it keeps things, and what becomes of its model.

    Args:
        world_size: Workers: one GPU each, or one CPU each on a cluster without GPUs.
        output_dir: Directory or URI, reachable from every node, that holds a directory for each run.
        run_name: Of the directory and the MLflow run; by default made from the model's size and the time.
        resume: Go on with the run of this name in output_dir; 'latest' is the one that saved last.
        experiment: The MLflow experiment that the run is part of.
        register_as: Name to register the finished model under; an empty one registers nothing.
        promote: When the alias 'champion' moves to the new version.
        max_failures: How often the workers are restarted from the last checkpoint before the run is given up.
    """

    world_size: int = 1
    output_dir: str = "./checkpoints"
    run_name: str | None = None
    resume: str | None = None
    experiment: str = "llama-ray"
    register_as: str = "llama-ray"
    promote: Policy = "if_better"
    max_failures: int = 3

    def __post_init__(self) -> None:
        if self.register_as:
            check_name(self.register_as)
        if self.promote not in ("if_better", "always", "never"):
            raise ValueError(f"promote is {self.promote!r}; choose if_better, always or never")
        if self.max_failures < 0:
            raise ValueError(f"max_failures is {self.max_failures}; it must be at least 0")
        if self.run_name and self.resume:
            raise ValueError("run_name and resume are both given; --resume NAME already names the run")


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind. `version` and `decision` are None where nothing was registered."""

    run_id: str
    checkpoint: str
    validation_loss: float
    version: Version | None
    decision: PromotionDecision | None


def train_on_ray(model: LlamaConfig, config: TrainConfig, launch: LaunchConfig, data: str) -> Outcome:
    """Train `model` on the prepared directory `data` with Ray Train, logged as one MLflow run, and register it.

    Needs a Ray connection. Everything that can be checked without a worker is checked first: ValueError with one
    line. A run that fails for good raises what Ray Train raised, after its MLflow run was marked FAILED.
    """
    gpu = uses_gpu()
    check_workers(launch.world_size, gpu=gpu)
    launch = replace(launch, output_dir=absolute(launch.output_dir))
    storage.check_writable(launch.output_dir)
    name, checkpoint = _name_and_checkpoint(model, launch)
    resume_from = Path(checkpoint) if checkpoint and not is_uri(checkpoint) else None
    check_run(model, config, data, launch.world_size, resume_from)
    info = read_info(data)
    directory = f"{launch.output_dir}/{name}"
    with _mlflow_run(directory, name, model, config, launch, info, gpu=gpu) as run:
        print(
            f"run {name}: checkpoints in {directory}, MLflow run {run.run_id} at {run.url or run.uri}",
            flush=True,
        )
        result = TorchTrainer(
            _worker,
            train_loop_config={
                "model": model,
                "config": config,
                "data": str(Path(data).resolve()),
                "run_id": run.run_id,
                "tracking_uri": run.uri,
            },
            scaling_config=ScalingConfig(
                num_workers=launch.world_size,
                use_gpu=gpu,
                resources_per_worker={"CPU": 1, "GPU": 1} if gpu else {"CPU": 1},
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # ray's stubs still name V1's
                name=name,
                storage_path=launch.output_dir,
                checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
                failure_config=FailureConfig(max_failures=launch.max_failures),
                worker_runtime_env={"env_vars": _worker_environment()},
                logging_config=LoggingConfig(log_level="WARNING"),  # the observer tells the progress itself
            ),
        ).fit()
        assert result.checkpoint is not None  # the last step always saves
        return _publish(run, result.checkpoint, model, config, launch, info)


def _worker_environment() -> dict[str, str]:
    """What workers need of the driver's environment, which does not reach them by itself."""
    credentials = {k: v for k, v in os.environ.items() if k.startswith("MLFLOW_")}
    # Ray Train would send each printed line through its logger, and so show it twice.
    return credentials | {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}


def _worker(plan: dict[str, Any]) -> None:
    """Runs in every worker, with the process group that Ray Train has made."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # one line a rank and report otherwise
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(ray.train.get_context().get_local_world_size()))
    run = Run.attach(plan["run_id"], plan["tracking_uri"]) if rank() == 0 else None
    checkpoint = ray.train.get_checkpoint()
    with (
        checkpoint.as_directory() if checkpoint else nullcontext() as resume_from,
        run.system_metrics() if run else nullcontext(),
    ):
        train(
            plan["model"],
            plan["config"],
            plan["data"],
            device=device,
            observer=_RayObserver(run, plan["data"]),
            resume_from=Path(resume_from) if resume_from else None,
            run_id=plan["run_id"],
        )


class _RayObserver(MLflowObserver):
    """Logs to MLflow and hands checkpoints to Ray Train."""

    def checkpoint(self, step: int, metrics: Metrics, write: Callable[[Path], None]) -> None:
        """Write on rank 0, then let Ray Train store it; all ranks wait for that."""
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = None
            if rank() == 0:
                write(Path(directory))
                checkpoint = Checkpoint.from_directory(directory)
            ray.train.report(dict(metrics), checkpoint, checkpoint_dir_name=checkpoint_name(step))
        self.say(f"step {step}  checkpoint {checkpoint_name(step)} stored")


def _name_and_checkpoint(model: LlamaConfig, launch: LaunchConfig) -> tuple[str, str | None]:
    """The run's name, and the checkpoint that it goes on from."""
    if launch.resume:
        name = storage.latest_run(launch.output_dir) if launch.resume == "latest" else launch.resume
        checkpoint = storage.latest_checkpoint(f"{launch.output_dir}/{name}")
        if checkpoint is None:
            raise storage.StorageError(
                f"{launch.output_dir} holds no checkpoint of run {name!r}; check --output_dir, or leave out --resume"
            )
        return name, checkpoint
    name = launch.run_name or f"llama-{short_count(model.num_parameters())}-{time.strftime('%Y%m%d-%H%M%S')}"
    # Ray Train goes on with a run whose name it finds; only --resume may mean that.
    if storage.latest_checkpoint(f"{launch.output_dir}/{name}"):
        raise storage.StorageError(
            f"{launch.output_dir} holds run {name!r} already; use --resume {name} to go on, or another --run_name"
        )
    return name, None


@contextmanager
def _mlflow_run(
    directory: str,
    name: str,
    model: LlamaConfig,
    config: TrainConfig,
    launch: LaunchConfig,
    info: DatasetInfo,
    *,
    gpu: bool,
) -> Iterator[Run]:
    """The one MLflow run of this training run: created, or found again by the `run.json` beside the checkpoints."""
    record = storage.read_text(f"{directory}/run.json") if launch.resume else None
    settings = {"model": model.to_dict(), "training": config.to_dict(), "data": {"source": info.source}}
    if record:
        run = Run.attach(json.loads(record)["run_id"])
        run.reopen()
    else:
        run = Run.create(
            experiment=launch.experiment,
            name=name,
            params=settings | {"parameters": model.num_parameters(), "world_size": launch.world_size},
            tags=standard_tags(world_size=launch.world_size, device="gpu" if gpu else "cpu"),
            description=describe_run(model, config, info, launch.world_size),
        )
        storage.write_text(
            f"{directory}/run.json", json.dumps({"run_id": run.run_id, "tracking_uri": run.uri})
        )
    run.log_config(settings | {"launch": vars(launch)})
    try:
        yield run
    except BaseException as e:
        run.finish("KILLED" if isinstance(e, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    run.finish("FINISHED")


def _publish(
    run: Run,
    checkpoint: Checkpoint,
    model: LlamaConfig,
    config: TrainConfig,
    launch: LaunchConfig,
    info: DatasetInfo,
) -> Outcome:
    with checkpoint.as_directory() as local:
        progress = load_progress(local)
        assert progress.validation_loss is not None  # the last step always validates
        version = decision = None
        if launch.register_as:
            version, decision = publish(
                run,
                Path(local),
                name=launch.register_as,
                precision=config.precision,
                policy=launch.promote,
                validation_loss=progress.validation_loss,
                data_fingerprint=info.fingerprint,
                tags={"step": str(progress.step), "tokens": str(progress.tokens)},
                description=describe_version(model, info, progress),
            )
    return Outcome(run.run_id, checkpoint.path, progress.validation_loss, version, decision)
