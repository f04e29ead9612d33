"""What Ray Train reports of a group that failed, and what the driver makes of it."""

from __future__ import annotations

import pickle

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from llama_ray.orchestration.failures import may_pass, out_of_memory_step, reason, users_error, waits_for_room
from llama_ray.storage.store import StorageError
from llama_ray.training.errors import OutOfMemory, TrainingError

DEAD = WorkerHealthCheckFailedError(
    "A worker health check failed.\nWorker info: ...", failure=ActorDiedError()
)
RESET = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4311\n  more")


def of_workers(**failures: Exception) -> TrainingFailedError:
    """The error as it arrives in the driver."""
    error = WorkerGroupError("tracebacks", {int(rank[1:]): cause for rank, cause in failures.items()})
    arrived: TrainingFailedError = pickle.loads(pickle.dumps(error))
    return arrived


def in_a_task(cause: Exception) -> ControllerError:
    return ControllerError(RayTaskError("_setup_torch_process_group", "Traceback ...", cause))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (of_workers(r0=RESET, r1=DEAD), "worker 1 was lost"),
        (of_workers(r0=RESET), f"worker 0 failed (RuntimeError: {str(RESET).splitlines()[0]})"),
        (of_workers(r3=OutOfMemory(7, "64 GiB")), "worker 3 failed (OutOfMemory: out of memory at step 7: 64 GiB)"),
        (ControllerError(WorkerGroupStartupFailedError("actors")), "a starting worker was lost"),
        (ControllerError(ActorDiedError()), "a starting worker was lost"),
        (in_a_task(RESET), f"a starting worker failed (RuntimeError: {str(RESET).splitlines()[0]})"),
        (ActorDiedError(), "the controller of the workers was lost"),
        (TimeoutError("s3 does not answer"), "Ray Train failed (TimeoutError: s3 does not answer)"),
    ],
)  # fmt: skip
def test_the_reason_of_a_restart_is_one_line(error: Exception, expected: str) -> None:
    assert reason(error) == expected
    assert users_error(error) is None
    assert not waits_for_room(error)


@pytest.mark.parametrize(
    "error",
    [
        of_workers(r1=TrainingError("seed is 2; it must be 1")),
        # The other worker may have failed for want of this one.
        of_workers(r0=RESET, r1=TrainingError("seed is 2; it must be 1")),
        in_a_task(ValueError("seed is 2;\nit must be 1")),
    ],
)
def test_an_error_of_the_user_ends_the_run_with_its_line(error: Exception) -> None:
    assert users_error(error) == "seed is 2; it must be 1"


def test_missing_room_is_waited_for() -> None:
    assert waits_for_room(ControllerError(WorkerGroupStartupTimeoutError(2)))


def test_the_step_that_ran_out_of_memory_is_told_by_whichever_worker_it_was() -> None:
    assert out_of_memory_step(of_workers(r0=RESET, r1=OutOfMemory(7, "64 GiB"))) == 7
    assert out_of_memory_step(of_workers(r0=RESET)) is None


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("seed"), False),
        (caused_by(StorageError("no dataset.json"), FileNotFoundError(2, "No such file")), False),
        (caused_by(StorageError("no dataset.json"), PermissionError(13, "Permission denied")), False),
        (caused_by(StorageError("no dataset.json"), OSError(116, "Stale file handle")), True),
        (caused_by(StorageError("bad"), caused_by(ValueError("bad"), TimeoutError())), True),
        (RuntimeError("anything else"), True),
    ],
)
def test_only_errors_that_would_come_again_are_the_users(error: Exception, expected: bool) -> None:
    assert may_pass(error) is expected
