"""Training on a Ray cluster: the only file that knows Ray Train."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from llama_ray.data.shards import DatasetInfo, read_info
from llama_ray.model.config import LlamaConfig
from llama_ray.orchestration.interrupts import InterruptWatcher, request_stop, until_signal, withdraw_stop
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.orchestration.mlflow_observer import MLflowObserver
from llama_ray.orchestration.publish import publish
from llama_ray.orchestration.report import describe_run, describe_version, short_count
from llama_ray.orchestration.resources import check_workers, cpu_threads, uses_gpu
from llama_ray.storage import run_directory, store
from llama_ray.storage.paths import absolute, is_uri
from llama_ray.tracking.buffer import BufferedRun
from llama_ray.tracking.registry import PromotionDecision, Version
from llama_ray.tracking.runs import Run
from llama_ray.tracking.tags import standard_tags
from llama_ray.training.checkpointing.catalog import checkpoint_name, latest_valid_checkpoint
from llama_ray.training.checkpointing.files import local_copy
from llama_ray.training.checkpointing.progress import load_progress
from llama_ray.training.config import TrainConfig
from llama_ray.training.elastic import check_range, for_workers
from llama_ray.training.errors import OutOfMemory, TrainingError
from llama_ray.training.interrupt import Stopped
from llama_ray.training.loop import train
from llama_ray.training.parallel.process_group import rank, world_size
from llama_ray.training.preflight import check_run

_EXHAUSTED = "out_of_memory.json"  # the steps at which workers of this launch ran out of memory


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
    line. A run that fails for good raises what Ray Train raised, or TrainingError where a restart is of no use,
    after its MLflow run was marked FAILED. SIGINT and SIGTERM make the workers save and end: it then raises
    Stopped, and the MLflow run is KILLED.
    """
    gpu = uses_gpu()
    least, most = launch.workers
    check_workers(least, gpu=gpu)
    if least == most:
        check_workers(most, gpu=gpu)
    check_range(config, least, most, config.tensor_parallel)
    launch = replace(launch, output_dir=absolute(launch.output_dir))
    run_directory.check_writable(launch.output_dir)
    name, checkpoint = _name_and_checkpoint(model, launch)
    resume_from = Path(checkpoint) if checkpoint and not is_uri(checkpoint) else None
    check_run(model, config, data, most, resume_from)
    info = read_info(data)
    directory = store.join(launch.output_dir, name)
    with _mlflow_run(directory, name, model, config, launch, info, gpu=gpu) as run:
        print(
            f"run {name}: checkpoints in {directory}, MLflow run {run.run_id} at {run.url or run.uri}",
            flush=True,
        )
        withdraw_stop(directory)
        store.delete(store.join(directory, _EXHAUSTED))
        trainer = TorchTrainer(
            _worker,  # type: ignore[arg-type]  # a result may be returned since V2
            train_loop_config={
                "model": model,
                "config": config,
                "data": str(Path(data).resolve()),
                "directory": directory,
                "planned": most,
                "run_id": run.run_id,
                "tracking_uri": run.uri,
            },
            torch_config=TorchConfig(timeout_s=config.collective_timeout_s),
            scaling_config=ScalingConfig(  # type: ignore[call-arg]
                num_workers=most if least == most else (least, most),  # type: ignore[arg-type]
                use_gpu=gpu,
                resources_per_worker={"CPU": 1, "GPU": 1} if gpu else {"CPU": 1},
                elastic_resize_monitor_interval_s=launch.resize_interval_s,
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # ray's stubs still name V1's
                name=name,
                storage_path=launch.output_dir,
                failure_config=FailureConfig(max_failures=launch.max_failures),
                worker_runtime_env={"env_vars": _worker_environment()},
                logging_config=LoggingConfig(log_level="WARNING"),  # the observer tells the progress itself
            ),
        )

        def stop() -> None:
            request_stop(directory)
            run.finish(
                "KILLED"
            )  # now, while there is time: `ray job stop` kills the driver after three seconds

        ending: Ending = until_signal(trainer.fit, stop).return_value  # type: ignore[attr-defined]
        if ending.error:
            raise TrainingError(ending.error)
        if ending.stopped_at is not None:
            raise Stopped(ending.stopped_at)
        return _publish(run, store.join(directory, checkpoint_name(ending.step)), model, config, launch, info)


def _worker_environment() -> dict[str, str]:
    """What workers need of the driver's environment, which does not reach them by itself."""
    credentials = {k: v for k, v in os.environ.items() if k.startswith("MLFLOW_")}
    # Ray Train would send each printed line through its logger, and so show it twice.
    return credentials | {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}


@dataclass(frozen=True)
class Ending:
    """How the workers ended, where Ray Train need not start them again."""

    step: int = 0
    stopped_at: int | None = None
    error: str = ""


def _worker(plan: dict[str, Any]) -> Ending:
    """Runs in every worker, with the process group that Ray Train has made."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # one line a rank and report otherwise
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(ray.train.get_context().get_local_world_size()))
    config: TrainConfig = plan["config"]
    tensor_parallel = config.tensor_parallel
    config = for_workers(config, world_size() // tensor_parallel, plan["planned"] // tensor_parallel)
    directory = plan["directory"]
    exhausted: list[int] = json.loads(store.read_text(store.join(directory, _EXHAUSTED)) or "[]")
    if exhausted[-1:] == exhausted[-2:-1] != []:
        return Ending(
            error=f"a worker ran out of memory at step {exhausted[-1]} twice; lower batch_size (and raise "
            "gradient_accumulation_steps), or use activation_checkpointing or more workers, and --resume"
        )
    run = BufferedRun(plan["run_id"], plan["tracking_uri"], system_metrics=True) if rank() == 0 else None
    checkpoint = latest_valid_checkpoint(directory, config.collective_timeout_s)
    try:
        with local_copy(checkpoint) if checkpoint else nullcontext() as resume_from:
            progress = train(
                plan["model"],
                config,
                plan["data"],
                device=device,
                observer=MLflowObserver(run, plan["data"], directory),
                output_dir=directory,
                resume_from=resume_from,
                run_id=plan["run_id"],
                poll_interrupt=InterruptWatcher(directory).poll,
            )
        return Ending(progress.step)
    except Stopped as e:
        return Ending(stopped_at=e.step)
    except (
        OutOfMemory
    ) as e:  # Ray Train starts the workers again, in case something else had taken the memory
        store.write_text(store.join(directory, _EXHAUSTED), json.dumps([*exhausted, e.step]))
        raise
    except TrainingError as e:  # every worker raises it, and would again after a restart
        return Ending(error=str(e))
    finally:
        if run:
            run.close()


def _name_and_checkpoint(model: LlamaConfig, launch: LaunchConfig) -> tuple[str, str | None]:
    """The run's name, and the checkpoint that it goes on from."""
    if launch.resume:
        name = run_directory.latest_run(launch.output_dir) if launch.resume == "latest" else launch.resume
        checkpoint = run_directory.latest_checkpoint(store.join(launch.output_dir, name))
        if checkpoint is None:
            raise store.StorageError(
                f"{launch.output_dir} holds no checkpoint of run {name!r}; check --output_dir, or leave out --resume"
            )
        return name, checkpoint
    name = launch.run_name or f"llama-{short_count(model.num_parameters())}-{time.strftime('%Y%m%d-%H%M%S')}"
    # Ray Train goes on with a run whose name it finds; only --resume may mean that.
    if run_directory.latest_checkpoint(store.join(launch.output_dir, name)):
        raise store.StorageError(
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
    record = store.read_text(store.join(directory, "run.json")) if launch.resume else None
    settings = {"model": model.to_dict(), "training": config.to_dict(), "data": {"source": info.source}}
    if record:
        run = Run.attach(json.loads(record)["run_id"])
        run.reopen()
    else:
        run = Run.create(
            experiment=launch.experiment,
            name=name,
            params=settings | {"parameters": model.num_parameters(), "world_size": launch.world_size},
            tags=standard_tags(world_size=launch.workers[1], device="gpu" if gpu else "cpu"),
            description=describe_run(model, config, info, launch.workers[1]),
        )
        store.write_text(
            store.join(directory, "run.json"), json.dumps({"run_id": run.run_id, "tracking_uri": run.uri})
        )
    run.log_config(settings | {"launch": vars(launch)})
    try:
        yield run
    except BaseException as e:
        run.finish("KILLED" if isinstance(e, KeyboardInterrupt | SystemExit | Stopped) else "FAILED")
        raise
    run.finish("FINISHED")


def _publish(
    run: Run,
    checkpoint: str,
    model: LlamaConfig,
    config: TrainConfig,
    launch: LaunchConfig,
    info: DatasetInfo,
) -> Outcome:
    with local_copy(checkpoint) as local:
        progress = load_progress(local)
        assert progress.validation_loss is not None  # the last step always validates
        version = decision = None
        if launch.register_as:
            version, decision = publish(
                run,
                local,
                name=launch.register_as,
                precision=config.precision,
                policy=launch.promote,
                validation_loss=progress.validation_loss,
                data_fingerprint=info.fingerprint,
                tags={"step": str(progress.step), "tokens": str(progress.tokens)},
                description=describe_version(model, info, progress),
            )
    return Outcome(run.run_id, checkpoint, progress.validation_loss, version, decision)
