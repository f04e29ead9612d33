"""The requests of an evaluation over the cluster: Ray Data carries their parts to a pool of engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy

from llama_ray.batch_inference.actor_pool import map_on_actors
from llama_ray.batch_inference.pool import PoolSize
from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.evaluation.parts import Part
from llama_ray.evaluation.results import EvaluationError
from llama_ray.generation.engine import Engine
from llama_ray.orchestration.resources import cpu_threads, nodes
from llama_ray.utils.errors import first_line
from llama_ray.utils.integers import ceil_div
from llama_ray.utils.redact import RedactedRepr

_MAX_WORKER_DEATHS = 4
"""Deaths of the workers on one part before the evaluation ends; a part that kills its worker does so each time."""


@dataclass(frozen=True, repr=False)
class EvaluatorConfig(RedactedRepr):
    """What a worker needs to know: the model, where answers go, and what its engine is made with.

    `secrets` are environment variables that Ray must not show.
    """

    model: str
    directory: str
    workers_on_node: int
    engine: dict[str, Any] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict, repr=False)


class Evaluator:
    """A Ray actor with one engine. Errors that the user can mend are returned: Ray would wrap them in a traceback."""

    def __init__(self, config: EvaluatorConfig) -> None:
        os.environ.update(config.secrets)
        # The engine uses the cores.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._directory, self._failure = config.directory, ""
        if config.engine.get("device") == "cpu":
            torch.set_num_threads(cpu_threads(config.workers_on_node))
        try:
            self._scorer = EngineScorer(config.model, Engine.from_pretrained(config.model, **config.engine))
        except ValueError as error:
            self._failure = f"a worker cannot load the model: {error}"

    def __call__(self, item: dict[str, str]) -> dict[str, Any]:
        """Answer the part `item["part"]` and keep its answers; return how many, or why it failed."""
        part, failure = Part.from_json(item["part"]), self._failure
        if not failure:
            try:
                part.answer(self._scorer, self._directory)
            except ValueError as error:
                failure = str(error)
        return {"requests": len(part.requests), "failure": failure}


def compute_on_cluster(
    config: EvaluatorConfig, size: PoolSize, env_vars: Mapping[str, str]
) -> Callable[[Sequence[Part]], Iterator[int]]:
    """Return what answers parts on a pool of `size`; needs a Ray connection. It raises EvaluationError."""
    return partial(_compute, config, size, env_vars)


def _compute(
    config: EvaluatorConfig, size: PoolSize, env_vars: Mapping[str, str], parts: Sequence[Part]
) -> Iterator[int]:
    workers = min(size.replicas, len(parts))
    config = replace(
        config,
        workers_on_node=ceil_div(workers, max(1, nodes())),
        engine={**config.engine, "device": size.device},
    )
    results = map_on_actors(
        Evaluator,
        config,
        [{"part": part.to_json()} for part in parts],
        ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        gpus=size.gpus_per_replica,
        max_deaths=_MAX_WORKER_DEATHS,
        env_vars=env_vars,
    )
    try:
        for result in results:
            if result["failure"]:
                raise EvaluationError(result["failure"])
            yield result["requests"]
    except ray.exceptions.RayActorError as error:
        raise EvaluationError(
            f"the workers on one part died {_MAX_WORKER_DEATHS + 1} times ({first_line(error)}); finished parts are "
            "kept; start again, with a smaller --max_num_seqs if memory was short"
        ) from error
