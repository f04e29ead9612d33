"""Find the configuration nearest to one that does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import get_args

from llama_ray.model.config import LlamaConfig
from llama_ray.training.config import ActivationCheckpointing, TrainConfig
from llama_ray.training.parallel.layout import state_bytes
from llama_ray.training.planning.plan import Cluster, Plan, make_plan
from llama_ray.training.planning.traffic import MAX_GPUS

MAX_TRACES = 24
"""Configurations to trace before the search gives up, as each takes seconds."""

_CHECKPOINTING: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
"""Modes from the most memory to the least; each costs one more than the one before."""

_MAX_HALVINGS = 7
"""Halvings of the batch size to try: down to 1/128 of what was asked for."""

_MAX_TENSOR_DOUBLINGS = 3
"""Doublings of tensor parallelism to try: from 1 to all 8 GPUs of a usual node."""

_TENSOR_DOUBLING_COST = 2
"""Cost of a doubling, where any other change costs 1: the GPU has to wait for tensor-parallel communication."""


def nearest_that_fits(plan: Plan, *, max_traces: int = MAX_TRACES) -> Plan | None:
    """Return the plan that fits and changes least of what `plan` asked for, or None.

    These may change, and the cheapest change is tried first: activation checkpointing; the batch of a micro-step (more
    gradient accumulation keeps the global batch); the parallelism to FSDP; tensor parallelism. If none of that helps,
    the configuration that needs least memory is tried on twice as many GPUs, up to MAX_GPUS.
    """
    found = _first_that_fits(plan, plan.cluster, _alternatives(plan), max_traces)
    cluster = plan.cluster
    while found is None and 2 * cluster.gpus <= MAX_GPUS:
        cluster = replace(cluster, gpus=2 * cluster.gpus)
        found = _first_that_fits(plan, cluster, [_thriftiest(plan.config)], max_traces=1)
    return found


def _alternatives(plan: Plan) -> list[TrainConfig]:
    """Return the configurations that the plan's cluster may run instead, from the least changed to the most."""
    asked = plan.config
    # Adapters are not trained with tensor parallelism.
    tensor_doublings = 0 if asked.lora else _MAX_TENSOR_DOUBLINGS
    least_checkpointing = _CHECKPOINTING.index(asked.activation_checkpointing)
    costs: dict[TrainConfig, int] = {}
    for checkpointing, halvings, parallelism, doublings in product(
        range(least_checkpointing, len(_CHECKPOINTING)),
        range(_MAX_HALVINGS + 1),
        (asked.parallelism, "fsdp"),
        range(tensor_doublings + 1),
    ):
        batch_size = asked.batch_size >> halvings
        tensor_parallel = asked.tensor_parallel << doublings
        if batch_size < 1 or tensor_parallel > plan.cluster.gpus_per_node:
            continue
        config = replace(
            _with_batch_size(asked, batch_size, times=2**doublings),
            activation_checkpointing=_CHECKPOINTING[checkpointing],
            parallelism=parallelism,
            fsdp_size=asked.fsdp_size if parallelism == asked.parallelism else 0,
            tensor_parallel=tensor_parallel,
        )
        changes = checkpointing + halvings + (parallelism != asked.parallelism)
        costs.setdefault(config, changes + _TENSOR_DOUBLING_COST * doublings)
    costs.pop(asked, None)
    return sorted(costs, key=lambda config: costs[config])


def _thriftiest(asked: TrainConfig) -> TrainConfig:
    """Return the configuration with the least memory per GPU, apart from more tensor parallelism."""
    return replace(
        _with_batch_size(asked, 1),
        activation_checkpointing=_CHECKPOINTING[-1],
        parallelism="fsdp",
        fsdp_size=0,
    )


def _with_batch_size(asked: TrainConfig, batch_size: int, *, times: int = 1) -> TrainConfig:
    """Change the batch of a micro-step, and accumulate `times` the sequences that `asked` does."""
    sequences = asked.gradient_accumulation_steps * asked.batch_size * times
    return replace(asked, batch_size=batch_size, gradient_accumulation_steps=sequences // batch_size)


def _first_that_fits(
    plan: Plan, cluster: Cluster, configs: Iterable[TrainConfig], max_traces: int
) -> Plan | None:
    traces = 0
    for config in configs:
        if traces == max_traces:
            return None
        if not _may_fit(plan.model, config, cluster):
            continue
        candidate = make_plan(plan.model, config, cluster, mfu=plan.mfu)
        traces += 1
        if candidate.fits:
            return candidate
    return None


def _may_fit(model: LlamaConfig, config: TrainConfig, cluster: Cluster) -> bool:
    """Whether the cluster can be divided so, and whether weights and optimizer state fit; needs no trace."""
    try:
        layout = cluster.layout(model, config)
    except ValueError:
        return False
    return state_bytes(model, config) <= cluster.gpu_memory_bytes * layout.shards * layout.tensor
