"""A pool of actors of Ray Data that items flow through, each of them to one actor."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy


def map_on_actors(
    actor: type,
    config: object,
    items: Sequence[Mapping[str, Any]],
    compute: ActorPoolStrategy,
    *,
    gpus: int,
    max_deaths: int,
    env_vars: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """Yield what the actors `actor(config)` return of `items`, as it comes; each takes a CPU, and `gpus` GPUs.

    An item whose actor dies goes to another one. Raises RayActorError once it has cost more than `max_deaths` of them.
    """
    # The job's own progress line reads better in a log.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    results = ray.data.from_items(list(items), override_num_blocks=len(items)).map(
        actor,
        fn_constructor_args=(config,),
        compute=compute,
        num_cpus=1,
        num_gpus=gpus or None,
        scheduling_strategy="SPREAD",
        max_restarts=-1,
        max_task_retries=max_deaths,
        runtime_env={"env_vars": dict(env_vars)},
    )
    yield from results.iter_rows()
