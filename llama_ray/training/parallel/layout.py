"""How the workers of a run divide a model and its data among themselves."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama_ray.model.config import LlamaConfig
from llama_ray.training.config import TrainConfig

GIB = 1024**3
_USABLE = 0.9  # of a device's memory; the rest goes to the runtime, communication buffers and fragmentation


@dataclass(frozen=True)
class Layout:
    """`copies` of the model, each over `shards` x `tensor` workers.

    The workers of one tensor group share every layer and see the same data; `shards` groups hold a share of the
    parameters each and see different data. Ranks count tensor groups first, then shards, then copies, so that
    those who talk most are nearest.
    """

    copies: int
    shards: int
    tensor: int
    reason: str
    """What was picked and why, in one line."""
    mesh: DeviceMesh | None = field(default=None, compare=False)
    """Dimensions `replicate`, `shard` and `tensor`, as far as they are used; None where nothing is sharded."""

    @property
    def world_size(self) -> int:
        """All workers."""
        return self.copies * self.shards * self.tensor

    @property
    def data_world(self) -> int:
        """How many workers see different data."""
        return self.copies * self.shards

    @property
    def data_rank(self) -> int:
        """Which share of the data this worker sees."""
        return (dist.get_rank() if dist.is_initialized() else 0) // self.tensor

    @property
    def sharded(self) -> bool:
        """Whether no worker holds the whole model."""
        return self.shards > 1 or self.tensor > 1

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over the workers that see different data, in place; every worker gets the sum.

        Workers of a tensor group must hold the same values.
        """
        if self.world_size > 1:
            dist.all_reduce(values)
            if self.tensor > 1:
                values.div_(self.tensor, rounding_mode=None if values.is_floating_point() else "floor")
        return values

    def agree(self, value: Tensor) -> Tensor:
        """The largest of the workers' versions of `value`, in place, where each worker has added up its own way."""
        if self.sharded:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def on(self, device: torch.device) -> Layout:
        """The same layout with its device mesh, in a running process group. Every worker must call it."""
        if not self.sharded:
            return self
        sizes = {"replicate": self.copies, "shard": self.shards, "tensor": self.tensor}
        if self.copies == 1:
            del sizes["replicate"]
            if self.shards == 1:
                del sizes["shard"]
        if self.tensor == 1:
            del sizes["tensor"]
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return Layout(self.copies, self.shards, self.tensor, self.reason, mesh)


ALONE = Layout(1, 1, 1, "one worker holds everything")


def choose_layout(
    model: LlamaConfig,
    config: TrainConfig,
    world_size: int,
    *,
    memory_bytes: int | None = None,
    node_size: int | None = None,
) -> Layout:
    """Divide `world_size` workers as `config` says; `auto` picks by what fits into `memory_bytes` a worker.

    `node_size` is the number of workers on one machine (`local_world_size()` inside a run). Raises ValueError,
    with the way out, where the numbers do not divide.
    """
    node = min(node_size or world_size, world_size)
    tensor = config.tensor_parallel
    check_tensor_parallel(model, config, world_size)
    data = world_size // tensor
    over = f" x {tensor} tensor-parallel" if tensor > 1 else ""
    if config.parallelism == "ddp":
        if tensor > 1 and data > 1:
            raise ValueError(
                f"parallelism ddp does not go with tensor_parallel {tensor} on {world_size} workers; "
                "use fsdp or hsdp"
            )
        return Layout(data, 1, tensor, f"ddp on {data} workers{over}, as asked")
    if config.parallelism == "fsdp":
        return Layout(1, data, tensor, f"fsdp over {data} workers{over}, as asked")
    if config.parallelism == "hsdp":
        shards = config.fsdp_size or max(node // tensor, 1)
        if data % shards:
            raise ValueError(
                f"fsdp_size {shards} does not divide the {data} workers that see different data; "
                f"choose a divisor of {data}"
            )
        return Layout(
            data // shards, shards, tensor, f"hsdp: {data // shards} copies over {shards} workers{over}"
        )
    return _pick(model, config, world_size, memory_bytes, node)


def check_tensor_parallel(model: LlamaConfig, config: TrainConfig, world_size: int) -> None:
    """Raise ValueError where `tensor_parallel` does not divide the workers, the model or the sequence."""
    tensor = config.tensor_parallel
    sizes = {
        "world_size": world_size,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "seq_len": config.seq_len or model.max_seq_len,
    }
    for name, size in sizes.items():
        if size % tensor:
            raise ValueError(f"tensor_parallel {tensor} does not divide {name} {size}; choose one that does")


def state_bytes(model: LlamaConfig) -> int:
    """Parameters, gradients and AdamW's two averages, all in fp32."""
    return 16 * model.num_parameters()


def activation_bytes(model: LlamaConfig, config: TrainConfig) -> int:
    """Roughly what one micro-batch keeps for its backward pass on one worker, without tensor parallelism.

    Counts the tensors that a block saves (after Korthikanti et al. 2022, arXiv:2205.05198), plus the chunk of
    logits; good enough to choose a layout by, not to plan a rental by.
    """
    tokens = config.batch_size * (config.seq_len or model.max_seq_len)
    width = 4 if config.precision == "fp32" else 2
    heads = (2 * model.num_heads + 4 * model.num_kv_heads) * model.head_dim
    block = 12 * model.hidden_size + width * (2 * model.hidden_size + heads + 4 * model.intermediate_size)
    kept = 4 * model.hidden_size
    per_token = {
        "none": model.num_layers * block,
        "selective": model.num_layers * (kept + block) // 2,
        "full": model.num_layers * kept + block,
    }[config.activation_checkpointing]
    return tokens * per_token + 12 * model.vocab_size * model.hidden_size


def memory_per_worker(device: torch.device, node_size: int) -> int:
    """Bytes that one worker may use: its GPU's memory, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // node_size


def local_world_size(world_size: int) -> int:
    """Workers on this machine: LOCAL_WORLD_SIZE, which torchrun and Ray Train set, or all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _pick(
    model: LlamaConfig, config: TrainConfig, world_size: int, memory_bytes: int | None, node: int
) -> Layout:
    tensor = config.tensor_parallel
    data = world_size // tensor
    states, activations = state_bytes(model), activation_bytes(model, config)
    room = None if memory_bytes is None else int(memory_bytes * _USABLE)

    def need(shards: int, tensor: int) -> int:
        return states // (shards * tensor) + activations // tensor

    def fits(shards: int, tensor: int) -> bool:
        return room is None or need(shards, tensor) <= room

    def because(shards: int, tensor: int) -> str:
        return f"about {need(shards, tensor) / GIB:.3g} GiB a worker" + (
            "" if memory_bytes is None else f" of {memory_bytes / GIB:.3g}"
        )

    if world_size == 1:
        return Layout(1, 1, 1, f"auto: one worker holds everything, {because(1, 1)}")
    over = f" x {tensor} tensor-parallel" if tensor > 1 else ""
    if tensor == 1 and fits(1, 1):
        return Layout(data, 1, 1, f"auto: ddp on {data} workers, the whole model fits: {because(1, 1)}")
    within = node // tensor
    if 1 < within < data and data % within == 0 and fits(within, tensor):
        reason = f"auto: hsdp, {data // within} copies, each sharded within a node of {within}{over}: "
        return Layout(data // within, within, tensor, reason + because(within, tensor))
    if fits(data, tensor):
        return Layout(1, data, tensor, f"auto: fsdp over {data} workers{over}: {because(data, tensor)}")
    # Activations are what is left too large; tensor parallelism divides them, at the price of fewer batches at once.
    wider = tensor * 2
    while tensor == 1 and wider <= node and not world_size % wider and _divides(model, config, wider):
        if fits(world_size // wider, wider):
            reason = f"auto: fsdp over {world_size // wider} x {wider} tensor-parallel, as activations need dividing: "
            return Layout(1, world_size // wider, wider, reason + because(world_size // wider, wider))
        wider *= 2
    return Layout(
        1,
        data,
        tensor,
        f"auto: fsdp over {data} workers{over}, which may not fit: {because(data, tensor)}; "
        "lower batch_size, raise activation_checkpointing or take more workers",
    )


def _divides(model: LlamaConfig, config: TrainConfig, tensor: int) -> bool:
    sizes = (model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
    return not any(n % tensor for n in (*sizes, config.seq_len or model.max_seq_len))
