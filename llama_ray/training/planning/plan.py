"""What a run will need, before anyone rents a machine: the real model, spread out for real, on fake tensors.

A step is run under FakeTensorMode in a fake process group of the asked size: every operation, FSDP's gathers and the
optimizer included, happens to tensors that have a shape and no memory, and each is counted (`MemoryTrace`); so is
what the workers send one another (`TrafficTrace`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, product
from typing import Any

import torch
from torch import Tensor, nn

from llama_ray.data.loader import Batch
from llama_ray.model.config import LlamaConfig
from llama_ray.model.layers import flash_attention
from llama_ray.model.llama import Llama
from llama_ray.training.config import ActivationCheckpointing, TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import GIB, SINGLE_WORKER, Layout, choose_layout, state_bytes
from llama_ray.training.parallel.parallelize import parallelize
from llama_ray.training.planning.memory_trace import Kind, MemoryTrace
from llama_ray.training.planning.traffic import Collective, Links, Traffic, TrafficTrace
from llama_ray.training.step import Stepper
from llama_ray.utils.torch_private import fake_process_group, fake_tensors

RUNTIME_BYTES = int(1.5 * GIB)
"""What a GPU holds beside tensors: the CUDA context, NCCL's channels, cuBLAS's workspaces."""

FRAGMENTATION = 0.05
"""Share of the tensors' bytes that the caching allocator is assumed to lose between them."""

_DEPTHS = (4, 6)  # layers traced of a deeper model: enough for FSDP's prefetching to be in full swing
_RECOMPUTE: dict[ActivationCheckpointing, float] = {"none": 1.0, "selective": 7 / 6, "full": 4 / 3}

Memory = dict[Kind, int]


@dataclass(frozen=True, kw_only=True)
class Cluster(Links):
    """What a run would be given. `gpu_flops` is the data sheet's dense rate in the run's precision, per second."""

    gpus: int
    gpu_memory_bytes: int
    gpu_flops: float = 989e12

    def __post_init__(self) -> None:
        for name in (
            "gpus",
            "gpu_memory_bytes",
            "gpu_flops",
            "gpus_per_node",
            "node_bandwidth",
            "network_bandwidth",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True)
class Trace:
    """What one worker was seen to do in a step: memory by part of the step, traffic by micro-step and of the update."""

    peaks: dict[str, Memory]
    micro_step: Traffic
    """Of every micro-step but the last, which may put something off."""
    last_micro_step: Traffic
    update: Traffic

    @property
    def memory(self) -> Memory:
        """At the fullest moment."""
        return max(self.peaks.values(), key=lambda memory: sum(memory.values()))


@dataclass(frozen=True)
class Plan:
    """What one GPU holds at its fullest moment, and how long a step takes.

    `mfu` is the share of the data sheet's rate that computing alone is assumed to reach.
    """

    model: LlamaConfig
    config: TrainConfig
    cluster: Cluster
    layout: Layout
    trace: Trace
    mfu: float

    @property
    def memory(self) -> Memory:
        """Bytes by kind at the fullest moment of a step."""
        return self.trace.memory

    @property
    def needed_bytes(self) -> int:
        """Of a GPU's memory: tensors, what is lost between them, and the runtime."""
        return int(sum(self.memory.values()) * (1 + FRAGMENTATION)) + RUNTIME_BYTES

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.needed_bytes <= self.cluster.gpu_memory_bytes

    @property
    def tokens_per_step(self) -> int:
        """Of the global batch."""
        sequences = self.config.batch_size * self.config.gradient_accumulation_steps * self.layout.data_world
        return sequences * self.seq_len

    @property
    def seq_len(self) -> int:
        """Tokens of one sequence."""
        return self.config.seq_len or self.model.max_seq_len

    @property
    def compute_s(self) -> float:
        """Seconds of a step that a GPU computes, at the assumed MFU; recomputed activations come on top."""
        flops = self.tokens_per_step * self.model.flops_per_token(self.seq_len)
        recompute = _RECOMPUTE[self.config.activation_checkpointing]
        return flops * recompute / (self.cluster.gpus * self.cluster.gpu_flops * self.mfu)

    @property
    def overlapped_s(self) -> float:
        """Seconds of a step in which parameters and gradients travel, while the GPU computes."""
        return sum(self._seconds(waited_for=False))

    @property
    def waited_s(self) -> float:
        """Seconds of a step in which the GPU waits: for tensor-parallel activations, and in the optimizer's update."""
        return sum(self._seconds(waited_for=True))

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step: the longer of computing and what travels meanwhile, then what is waited for."""
        return max(self.compute_s, self.overlapped_s) + self.waited_s

    def _seconds(self, *, waited_for: bool) -> Iterator[float]:
        others = self.config.gradient_accumulation_steps - 1
        for traffic, times in ((self.trace.micro_step, others), (self.trace.last_micro_step, 1)):
            for collective, size in traffic.items():
                if _between_tensor_parallel(collective, self.layout) is waited_for:
                    yield times * self.cluster.seconds(collective, size)
        if waited_for:
            yield from (self.cluster.seconds(*transfer) for transfer in self.trace.update.items())

    def days(self, tokens: float) -> float:
        """To train on so many tokens."""
        return tokens / self.tokens_per_step * self.step_s / 86400


def make_plan(model: LlamaConfig, config: TrainConfig, cluster: Cluster, *, mfu: float = 0.4) -> Plan:
    """Trace the run that `config` asks for. Must be called outside of any process group.

    Raises ValueError where the workers cannot be divided as asked.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu is {mfu}; it must be above 0 and at most 1")
    layout = choose_layout(
        model,
        config,
        cluster.gpus,
        memory_bytes=cluster.gpu_memory_bytes,
        node_size=min(cluster.gpus_per_node, cluster.gpus),
    )
    return Plan(model, config, cluster, layout, trace_step(model, config, layout), mfu)


def nearest_that_fits(plan: Plan, *, tries: int = 24) -> Plan | None:
    """The configuration that fits with the least changed of what `plan` asked for, or None.

    What may change, the cheapest first: activation checkpointing, the batch of a micro-step (made up for by gradient
    accumulation), FSDP for DDP, tensor parallelism; and where none of it helps, the number of GPUs.
    """
    found = _search(plan, plan.cluster, tries)
    cluster = plan.cluster
    while found is None and cluster.gpus < 16384:
        cluster = replace(cluster, gpus=cluster.gpus * 2)
        found = _search(plan, cluster, tries=3, thrifty=True)
    return found


def _search(plan: Plan, cluster: Cluster, tries: int, thrifty: bool = False) -> Plan | None:
    asked = plan.config
    modes: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
    options: list[tuple[int, int, TrainConfig]] = []
    for mode, halvings, sharding, wider in product(
        modes, range(8), (asked.parallelism, "fsdp"), (1, 2, 4, 8)
    ):
        size = asked.batch_size >> halvings
        tensor = asked.tensor_parallel * wider
        less = modes.index(mode) < modes.index(asked.activation_checkpointing)
        if size < 1 or less or tensor > cluster.gpus_per_node:
            continue
        if thrifty and (mode != "full" or size > 1 or sharding != "fsdp" or wider > 1):
            continue
        cost = modes.index(mode) + halvings + (sharding != asked.parallelism) + 2 * (wider.bit_length() - 1)
        accumulate = asked.gradient_accumulation_steps * asked.batch_size * wider // size
        change: dict[str, Any] = {
            "activation_checkpointing": mode,
            "batch_size": size,
            "parallelism": sharding,
            "tensor_parallel": tensor,
            "gradient_accumulation_steps": accumulate,
        }
        options.append((cost, len(options), replace(asked, **change)))
    seen: set[TrainConfig] = {asked}
    for _, _, config in sorted(options, key=lambda option: option[:2]):
        if config in seen and cluster == plan.cluster:
            continue
        seen.add(config)
        if tries == 0:
            return None
        try:
            layout = choose_layout(plan.model, config, cluster.gpus, node_size=cluster.gpus_per_node)
            if state_bytes(plan.model) > cluster.gpu_memory_bytes * layout.shards * layout.tensor:
                continue  # not even without activations
            candidate = make_plan(plan.model, config, cluster, mfu=plan.mfu)
        except ValueError:  # heads or GPUs that cannot be divided so
            continue
        tries -= 1
        if candidate.fits:
            return candidate
    return None


def _between_tensor_parallel(collective: Collective, layout: Layout) -> bool:
    return layout.tensor > 1 and collective.ranks == tuple(range(layout.tensor))


def trace_step(model: LlamaConfig, config: TrainConfig, layout: Layout) -> Trace:
    """What the first worker of `layout` does in a step, once there is optimizer state.

    A model deeper than 6 layers is traced with 4 and with 6; at each part of a step memory and traffic grow by the
    same amount with every further layer, so the rest follows.
    """
    if model.num_layers <= _DEPTHS[-1]:
        return _trace(model, config, layout)
    few, more = (_trace(replace(model, num_layers=depth), config, layout) for depth in _DEPTHS)
    steps = (model.num_layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])

    def extend(less: Mapping[Any, float], more: Mapping[Any, float]) -> dict[Any, int]:
        return {key: int(less.get(key, 0) + steps * (size - less.get(key, 0))) for key, size in more.items()}

    return Trace(
        {part: extend(few.peaks[part], more.peaks[part]) for part in few.peaks},
        extend(few.micro_step, more.micro_step),
        extend(few.last_micro_step, more.last_micro_step),
        extend(few.update, more.update),
    )


def _trace(config: LlamaConfig, train: TrainConfig, layout: Layout) -> Trace:
    # DDP's constructor talks to its peers about real bytes. It adds nothing but its buckets, which are the gradients,
    # and their exchange.
    replicated = not layout.sharded and layout.world_size > 1
    device = torch.device("cpu")  # stands for the GPU: FSDP asks a CUDA device for streams
    model = Llama(config, device="meta")
    # GPUs attend with a kernel that keeps no scores, whatever the CPU does.
    model.forward = partial(model.forward, attend=flash_attention)  # type: ignore[method-assign]
    with fake_process_group(layout.world_size) if layout.world_size > 1 else nullcontext():
        divided = SINGLE_WORKER if replicated else layout.with_mesh(device)
        # Spread out before tensors are fake, since meshes look up ranks in tensors of their own.
        spread = parallelize(
            model, train, divided, torch.device("meta"), compile_blocks=False, init_weights=False
        )
        with fake_tensors():
            model.materialize(device)
            trace = _trace_step(spread, model, train, divided, device)
    if replicated:
        gradients = 4 * config.num_parameters()
        for memory in trace.peaks.values():
            memory["gradients"] = gradients
        exchange = {Collective("all_reduce", tuple(range(layout.world_size))): gradients}
        trace = replace(trace, last_micro_step=exchange)
    return trace


def _trace_step(
    spread: nn.Module, model: Llama, train: TrainConfig, layout: Layout, device: torch.device
) -> Trace:
    stepper = Stepper(spread, build_optimizer(spread, train), train, device=device, layout=layout)
    seq_len = train.seq_len or model.config.max_seq_len
    tokens = torch.zeros(train.batch_size, seq_len, dtype=torch.int64)
    stepper.step([(tokens[:1], tokens[:1])])  # makes the optimizer's state
    return watch_step(stepper, model, [(tokens, tokens)] * min(train.gradient_accumulation_steps, 2))


def watch_step(stepper: Stepper, model: Llama, micro_batches: Sequence[Batch]) -> Trace:
    """Take a step, real or fake, of one or two micro-steps, and say what it did. `model` is inside `stepper.model`."""
    with TrafficTrace() as traffic, MemoryTrace() as memory:
        memory.watch(stepper.model, stepper.optimizer)
        _mark_parts(memory, model, stepper.optimizer)
        micro_steps = count(1)

        def begin_micro_step(*_: Any) -> None:
            traffic.begin("last" if next(micro_steps) == len(micro_batches) else "micro-step")

        # Before a sharded model gathers its first parameters in a hook of its own.
        stepper.model.register_forward_pre_hook(begin_micro_step, prepend=True)
        stepper.optimizer.register_step_pre_hook(lambda *_: traffic.begin("update"))
        stepper.step(micro_batches)
    return Trace(memory.peaks, *(traffic.parts[part] for part in ("micro-step", "last", "update")))


def _mark_parts(trace: MemoryTrace, model: Llama, optimizer: torch.optim.Optimizer) -> None:
    """Divide a step where memory may be fullest, so that each part grows evenly with the number of layers."""

    def begins_backward(part: str) -> Any:
        def mark(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(lambda grad: trace.begin(part))  # type: ignore[no-untyped-call]

        return mark

    last = len(model.layers) - 1
    parts = {last - 1: "middle blocks", last: "top block", 0: "bottom block"}
    for i, block in enumerate(model.layers):
        if i in parts:
            block.register_forward_hook(begins_backward(parts[i]))
    model.embed_tokens.register_forward_pre_hook(lambda *_: trace.begin("forward and head"))
    optimizer.register_step_pre_hook(lambda *_: trace.begin("update"))
