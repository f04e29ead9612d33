"""Evaluations as tasks of Ray, in the room that training leaves."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
import torch
from ray._private.state import state as cluster_state
from ray.exceptions import RayTaskError

from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.evaluation.evaluate import EvaluationConfig, Questions, evaluate
from llama_ray.evaluation.results import Evaluation, EvaluationError
from llama_ray.generation.engine import Engine
from llama_ray.orchestration.checkpoint_evaluations import Measured, Running, due, saved_steps
from llama_ray.storage import run_directory
from llama_ray.tracking.environment import open_variables, secret_variables
from llama_ray.training.checkpointing.files import local_copy
from llama_ray.utils.errors import one_line, printable
from llama_ray.utils.ray_cluster import largest
from llama_ray.utils.redact import RedactedRepr

_MOST_CPUS = 8
_ATTEMPTS = 3
"""At checkpoints that the run deletes while they are read."""


@dataclass(frozen=True)
class Room:
    """What an evaluation takes of a node: CPUs, and perhaps a GPU, on which it then computes."""

    cpus: int
    gpus: int

    @classmethod
    def beside(cls, workers: int, *, gpu: bool) -> Room | None:
        """Return the room beside `workers`, of which each has a CPU and, with `gpu`, a GPU; None if there is none.

        What the cluster has when it has grown counts, too. Nothing is taken that workers may want when they start
        again, also where they do not run yet.
        """
        spare = int(largest("CPU")) - workers
        if spare < 1:
            return None
        # A task runs on one node.
        nodes = cluster_state.available_resources_per_node().values()  # type: ignore[no-untyped-call]
        free = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        return cls(max(1, min(spare, free, _MOST_CPUS)), int(gpu and largest("GPU") - workers >= 1))

    @property
    def device(self) -> str:
        """The device of the evaluation."""
        return "cuda" if self.gpus else "cpu"


@dataclass(frozen=True, repr=False)
class EvaluationPlan(RedactedRepr):
    """What a task is told. `secrets` are environment variables that Ray must not show."""

    config: EvaluationConfig
    room: Room
    secrets: dict[str, str] = field(default_factory=secret_variables, repr=False)


def evaluate_on_cluster(ref: str, config: EvaluationConfig, *, gpu: bool) -> Evaluation:
    """Evaluate the model `ref` in a task of its own, once a node has room for it. Raises EvaluationError."""
    room = Room.beside(0, gpu=gpu) or Room(1, 0)
    plan = EvaluationPlan(config, room)
    try:
        text: str = ray.get(_task(_measure_reference, room).remote(plan, ref))
    except ray.exceptions.RayError as error:
        raise EvaluationError(_reason(error)) from error
    return Evaluation.from_json(text)


def start_newest(
    directory: str,
    every: int,
    config: EvaluationConfig,
    workers: int,
    gpu: bool,
    before: frozenset[int],
    ended: bool,
) -> Running:
    """Start a task that evaluates what is `due` of the run in `directory` when the cluster has room for it."""
    room = Room.beside(0 if ended else workers, gpu=gpu) or Room(1, 0)
    plan = EvaluationPlan(config, room)
    reference = _task(_measure_newest, room).remote(plan, directory, every, before, ended)
    return Running(reference.future(), partial(ray.cancel, reference, force=True))


def measure(ref: str, directory: str, config: EvaluationConfig, device: str) -> Evaluation:
    """Evaluate the model in `directory` in this process, under the name `ref`. Raises a ValueError."""
    questions = Questions.read(config)
    with Engine.from_pretrained(directory, device=device) as engine:
        return evaluate(EngineScorer(ref, engine), questions, {"device": device})


def _task(function: Callable[..., object], room: Room) -> Any:
    # A process of its own, so that the model's memory is free again afterwards.
    remote = ray.remote(max_calls=1, max_retries=1)(function)
    return remote.options(num_cpus=room.cpus, num_gpus=room.gpus, runtime_env={"env_vars": open_variables()})


def _measure_reference(plan: EvaluationPlan, ref: str) -> str:
    _begin(plan)
    return measure(ref, ref, plan.config, plan.room.device).to_json()


def _measure_newest(
    plan: EvaluationPlan, directory: str, every: int, before: frozenset[int], ended: bool
) -> Measured:
    _begin(plan)
    for _ in range(_ATTEMPTS):
        step = due(saved_steps(directory), every, before, ended)
        if step is None:
            break
        checkpoint = run_directory.checkpoint_of(directory, step)
        try:
            with local_copy(checkpoint) as local:
                return Measured(step, measure(checkpoint, str(local), plan.config, plan.room.device))
        # Whatever it is, it is one line for the driver, with the step that it belongs to.
        except Exception as error:
            if run_directory.read_marker(checkpoint) is not None:
                return Measured(step, None, _reason(error))
    raise EvaluationError(
        f"{directory} has no checkpoint that stays as long as it is read; raise --keep_checkpoints"
    )


def _begin(plan: EvaluationPlan) -> None:
    os.environ.update(plan.secrets)
    torch.set_num_threads(plan.room.cpus)


def _reason(error: BaseException) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return printable(one_line(cause))
