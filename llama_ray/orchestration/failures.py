"""Why a group of workers failed, and whether another start can help.

The rule: an error of the user ends the run at once, with its one line. Anything else, such as a lost process, node or
connection, is answered by a restart from the newest checkpoint.
"""

from __future__ import annotations

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from llama_ray.training.errors import OutOfMemory, TrainingError
from llama_ray.utils.errors import first_line, one_line

FAILURES = (TrainingFailedError, RayError, OSError)
"""What `TorchTrainer.fit` raises when workers, their controller, their nodes or the storage fail."""

_LOST = (
    RayActorError,
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
_OF_THE_USER = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def may_pass(error: BaseException) -> bool:
    """Return whether storage that did not answer, or another fault of the system, is behind an error of a worker."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and not isinstance(cause, _OF_THE_USER):
            return True
        cause = cause.__cause__
    return not isinstance(error, ValueError)


def users_error(error: Exception) -> str | None:
    """Return the message of an error that every restart would meet again; None if there is none."""
    return next((str(cause) for cause in _causes(error).values() if isinstance(cause, TrainingError)), None)


def out_of_memory_step(error: Exception) -> int | None:
    """Return the step at which a worker ran out of memory; None if none did."""
    return next((cause.step for cause in _causes(error).values() if isinstance(cause, OutOfMemory)), None)


def waits_for_room(error: Exception) -> bool:
    """Return whether no worker was started, because the cluster had no room for all of them."""
    return any(isinstance(cause, WorkerGroupStartupTimeoutError) for cause in _causes(error).values())


def reason(error: Exception) -> str:
    """Return in one line what happened; a lost worker comes first, since the errors of others follow from it."""
    causes = _causes(error)
    who = min(causes, key=lambda who: not isinstance(causes[who], _LOST))
    if isinstance(causes[who], _LOST):
        return f"{who} was lost"
    return f"{who} failed ({type(causes[who]).__name__}: {first_line(causes[who])})"


def _causes(error: Exception) -> dict[str, Exception]:
    """Who failed -> with which exception."""
    if isinstance(error, WorkerGroupError):
        return {f"worker {rank}": cause for rank, cause in sorted(error.worker_failures.items())}
    if isinstance(error, ControllerError):
        return {"a starting worker": _of_a_task(error.controller_failure)}
    return {"the controller of the workers" if isinstance(error, RayActorError) else "Ray Train": error}


def _of_a_task(error: Exception) -> Exception:
    """Return what was raised within a task of the group's start, such as making torch's process group."""
    if not isinstance(error, RayTaskError):
        return error
    return error.cause if may_pass(error.cause) else TrainingError(one_line(error.cause))
