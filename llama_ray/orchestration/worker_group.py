"""The group of workers: Ray Train starts it, and here it is started again after a failure, until it ends.

Ray Train can restart a group too, but not if a worker dies while the group starts: depending on the instant, that ends
the run, or the half-started group keeps its resources and the next one waits for them for ever. And a controller that
dies ends the run in any case. So each group has a controller of its own, with which everything ends that belongs to it,
and restarts are made and counted in the driver.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import ray

# `ray.train` exports these at run time, but type checkers see the classes of the first version there.
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from llama_ray.orchestration.devices import CheckedTorchConfig
from llama_ray.orchestration.failures import (
    FAILURES,
    out_of_memory_step,
    reason,
    users_error,
    waits_for_room,
)
from llama_ray.orchestration.interrupts import stop_requested
from llama_ray.orchestration.launch import LaunchConfig
from llama_ray.orchestration.placement_groups import remove_orphans
from llama_ray.orchestration.worker import Ending, WorkerPlan, run_worker
from llama_ray.storage import run_directory, store
from llama_ray.tracking.environment import open_variables
from llama_ray.training.errors import TrainingError
from llama_ray.utils.redact import redact

_ADDRESS = "RAY_ADDRESS"


def run_workers(plan: WorkerPlan, launch: LaunchConfig, *, gpu: bool) -> Ending:
    """Run the workers until they have ended; after a failure, start them again from the newest checkpoint.

    Raises TrainingError for an error that would come again, and when `launch.max_failures` restarts were not enough;
    Superseded once a newer attempt at the run has begun.
    """
    restarts = _Restarts(launch.max_failures)
    while True:
        plan.attempt.check()
        try:
            # The annotation of `fit` names the first version's result.
            with _address_for_ray_train():
                ending: Ending = _trainer(plan, launch, gpu).fit().return_value  # type: ignore[attr-defined]
        except FAILURES as error:
            if stop_requested(plan.attempt.run):
                return Ending(stopped_at=_newest_step(plan.attempt.run))
            print(restarts.answer(error), flush=True)
        else:
            if ending.superseded:
                plan.attempt.check()
            if ending.error:
                raise TrainingError(ending.error)
            return ending
        # The next group may need the room.
        remove_orphans()


@contextmanager
def _address_for_ray_train() -> Iterator[None]:
    """Tell Ray Train's own actors which cluster is theirs.

    One of them removes the workers once their controller is dead. It asks the Ray that started last on the machine,
    to which the controller may not belong.
    """
    ENV_VARS_TO_PROPAGATE.add(_ADDRESS)
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ADDRESS]
        else:
            os.environ[_ADDRESS] = before


class _Restarts:
    """Decides after each failure whether the workers start again."""

    def __init__(self, most: int) -> None:
        self._most, self._failures = most, 0
        self._out_of_memory_step: int | None = None

    def answer(self, error: Exception) -> str:
        """Return what to tell the user before the next start. Raises TrainingError if there is to be none."""
        if waits_for_room(error):
            return "waiting until the cluster has room for all workers"
        if message := users_error(error):
            raise TrainingError(message) from error
        self._end_if_out_of_memory_again(error)
        self._failures += 1
        if self._failures <= self._most:
            return f"{reason(error)}; restart {self._failures} of at most {self._most}"
        # With the tracebacks, which are of use if the reason is an error of the program.
        print(redact(str(error)), file=sys.stderr, flush=True)
        raise TrainingError(
            f"{reason(error)}, after {self._most} restarts; --resume goes on from the newest checkpoint, "
            "--max_failures N allows more restarts"
        ) from error

    def _end_if_out_of_memory_again(self, error: Exception) -> None:
        """Raise TrainingError at the second time in a row; the first time, something else may have taken the memory."""
        step, before = out_of_memory_step(error), self._out_of_memory_step
        if step is not None and step == before:
            raise TrainingError(
                f"a worker ran out of memory at step {step} twice; lower batch_size (and raise "
                "gradient_accumulation_steps), or use activation_checkpointing or more workers, and --resume"
            ) from error
        self._out_of_memory_step = step


def _trainer(plan: WorkerPlan, launch: LaunchConfig, gpu: bool) -> TorchTrainer:
    least, most = launch.workers
    filesystem, path = store.open_storage(launch.output_dir)
    return TorchTrainer(
        partial(run_worker, plan),
        torch_config=CheckedTorchConfig(timeout_s=plan.config.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if gpu else {"CPU": 1},
            elastic_resize_monitor_interval_s=launch.resize_interval_s,
        ),
        run_config=RunConfig(
            name=store.name_of(plan.attempt.run),
            # Not the URI, which may hold a key: Ray's dashboard shows it.
            storage_path=path,
            storage_filesystem=filesystem,
            # Only a preempted node, which is announced, leads to a restart within Ray Train.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": _worker_environment()},
            # The observer reports progress, and the driver each failure. Ray Train's own log files hold the rest.
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _worker_environment() -> dict[str, str]:
    """Return the variables that workers need; they do not inherit the driver's environment."""
    # Ray Train would send each printed line through its logger, and so show it twice.
    return open_variables() | {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}


def _newest_step(directory: str) -> int:
    """Return the step of the newest checkpoint, 0 without one."""
    newest = run_directory.latest_checkpoint(directory)
    marker = newest and run_directory.read_marker(newest)
    return int(marker["step"]) if marker else 0
