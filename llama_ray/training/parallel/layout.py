"""How the workers of a run divide the model and the data."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llama_ray.model.config import LlamaConfig
from llama_ray.training.config import TrainConfig
from llama_ray.training.parallel.process_group import rank
from llama_ray.training.precision import DTYPES

GIB = 1024**3

_USABLE = 0.9
"""Share of a device's memory to plan with; the rest is for the runtime, communication buffers and fragmentation."""


@dataclass(frozen=True)
class Layout:
    """`replicas` of the model, each over `shards` x `tensor` workers.

    The workers of one tensor-parallel group share every layer and see the same data. A replica consists of `shards`
    such groups, which hold a share of the parameters each and see different data. Ranks count within a tensor-parallel
    group first, then over shards, then over replicas, so that the workers that communicate most are nearest.
    """

    replicas: int
    shards: int
    tensor: int
    reason: str
    """What was picked and why, in one line."""
    mesh: DeviceMesh | None = field(default=None, compare=False)
    """Has those of the dimensions `replicate`, `shard` and `tensor` that are used; None if nothing is sharded."""

    @property
    def world_size(self) -> int:
        """Number of all workers."""
        return self.replicas * self.shards * self.tensor

    @property
    def data_world(self) -> int:
        """Number of workers that see different data."""
        return self.replicas * self.shards

    @property
    def data_rank(self) -> int:
        """Index of this worker's share of the data, from 0 to `data_world - 1`."""
        return rank() // self.tensor

    @property
    def sharded(self) -> bool:
        """Whether each worker holds only a part of the model."""
        return self.shards > 1 or self.tensor > 1

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` in place over the workers that see different data; every worker gets the sum.

        The workers of a tensor-parallel group must hold the same values.
        """
        if self.world_size > 1:
            dist.all_reduce(values)
            if self.tensor > 1:
                values.div_(self.tensor, rounding_mode=None if values.is_floating_point() else "floor")
        return values

    def max(self, value: Tensor) -> Tensor:
        """Replace `value`, in place, by its maximum over the workers, whose sums may differ in the last bit.

        Does nothing where the model is not sharded: each worker then computes the same sum in the same order.
        """
        if self.sharded:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def with_mesh(self, device: torch.device) -> Layout:
        """Return the same layout with its device mesh. Every worker of the process group must call it."""
        if not self.sharded:
            return self
        sizes = {"replicate": self.replicas, "shard": self.shards, "tensor": self.tensor}
        if self.replicas == 1:
            del sizes["replicate"]
            if self.shards == 1:
                del sizes["shard"]
        if self.tensor == 1:
            del sizes["tensor"]
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return replace(self, mesh=mesh)


SINGLE_WORKER = Layout(1, 1, 1, "one worker holds everything")


def choose_layout(
    model: LlamaConfig,
    config: TrainConfig,
    world_size: int,
    *,
    memory_bytes: int | None = None,
    node_size: int | None = None,
) -> Layout:
    """Divide `world_size` workers as `config` says; `auto` picks by what fits into `memory_bytes` per worker.

    `node_size` is the number of workers on one machine (`local_world_size()` inside a run), by default all. Raises
    ValueError if the sizes do not divide.
    """
    node = min(node_size or world_size, world_size)
    tensor = config.tensor_parallel
    check_tensor_parallel(model, config, world_size)
    data = world_size // tensor
    over = _times_tensor(tensor)
    if config.parallelism == "ddp":
        if tensor > 1 and data > 1:
            raise ValueError(
                f"parallelism is ddp; with tensor_parallel {tensor} on {world_size} workers it must be fsdp or hsdp"
            )
        return Layout(data, 1, tensor, f"ddp on {data} workers{over}, as asked")
    if config.parallelism == "fsdp":
        return Layout(1, data, tensor, f"fsdp over {data} workers{over}, as asked")
    if config.parallelism == "hsdp":
        shards = config.fsdp_size or max(node // tensor, 1)
        if data % shards:
            raise ValueError(
                f"fsdp_size is {shards}; it must divide {data}, the number of workers that see different data"
            )
        replicas = data // shards
        return Layout(
            replicas, shards, tensor, f"hsdp: {replicas} replicas, each over {shards} workers{over}"
        )
    return _pick(model, config, world_size, memory_bytes, node)


def check_tensor_parallel(model: LlamaConfig, config: TrainConfig, world_size: int) -> None:
    """Raise ValueError if `tensor_parallel` does not divide the workers, the model or the sequence."""
    tensor = config.tensor_parallel
    sizes = {"world_size": world_size, **_divided_sizes(model, config)}
    for name, size in sizes.items():
        if size % tensor:
            raise ValueError(f"tensor_parallel is {tensor}; it must divide {name}, which is {size}")


def state_bytes(model: LlamaConfig, config: TrainConfig) -> int:
    """Return the bytes of parameters, gradients and AdamW's two averages, all in fp32.

    With adapters only they have these, beside the frozen weights in the dtype of matrix products.
    """
    lora = config.lora
    if lora is None:
        return 16 * model.num_parameters()
    return DTYPES[config.precision].itemsize * model.num_parameters() + 16 * lora.num_parameters(model)


def activation_bytes(model: LlamaConfig, config: TrainConfig) -> int:
    """Estimate the bytes that one micro-batch saves for its backward pass on one worker, without tensor parallelism.

    Counts the tensors that a block saves (after Korthikanti et al. 2022, arXiv:2205.05198), and one chunk of logits.
    That is accurate enough to choose a layout; `planning` traces a step for the exact figure.
    """
    tokens = config.batch_size * (config.seq_len or model.max_seq_len)
    width = 4 if config.precision == "fp32" else 2
    heads = (2 * model.num_heads + 4 * model.num_kv_heads) * model.head_dim
    block = 12 * model.hidden_size + width * (2 * model.hidden_size + heads + 4 * model.intermediate_size)
    block_input = 4 * model.hidden_size
    per_token = {
        "none": model.num_layers * block,
        "selective": model.num_layers * (block_input + block) // 2,
        "full": model.num_layers * block_input + block,
    }[config.activation_checkpointing]
    return tokens * per_token + 12 * model.vocab_size * model.hidden_size


def memory_per_worker(device: torch.device, node_size: int) -> int:
    """Return the bytes that one worker may use: its GPU's memory, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // node_size


@dataclass(frozen=True)
class _MemoryEstimate:
    """What a run needs in all, and what one worker has (None where that is unknown and everything fits)."""

    states: int
    activations: int
    per_worker: int | None

    def needed(self, shards: int, tensor: int) -> int:
        """Return the bytes that each worker needs if the model is divided so."""
        return self.states // (shards * tensor) + self.activations // tensor

    def fits(self, shards: int, tensor: int) -> bool:
        return self.per_worker is None or self.needed(shards, tensor) <= int(self.per_worker * _USABLE)

    def describe(self, shards: int, tensor: int) -> str:
        limit = "" if self.per_worker is None else f" of {self.per_worker / GIB:.3g}"
        return f"about {self.needed(shards, tensor) / GIB:.3g} GiB a worker{limit}"


def _pick(
    model: LlamaConfig, config: TrainConfig, world_size: int, memory_bytes: int | None, node_size: int
) -> Layout:
    """Pick the layout that communicates least among those that fit."""
    memory = _MemoryEstimate(state_bytes(model, config), activation_bytes(model, config), memory_bytes)
    if world_size == 1:
        return replace(SINGLE_WORKER, reason=f"auto: one worker holds everything, {memory.describe(1, 1)}")
    tensor = config.tensor_parallel
    data = world_size // tensor
    over = _times_tensor(tensor)
    if tensor == 1 and memory.fits(1, 1):
        return Layout(
            data, 1, 1, f"auto: ddp on {data} workers, the whole model fits: {memory.describe(1, 1)}"
        )
    within = node_size // tensor
    if 1 < within < data and data % within == 0 and memory.fits(within, tensor):
        reason = f"auto: hsdp, {data // within} replicas, each sharded within a node of {within}{over}"
        return Layout(data // within, within, tensor, f"{reason}: {memory.describe(within, tensor)}")
    if memory.fits(data, tensor):
        return Layout(
            1, data, tensor, f"auto: fsdp over {data} workers{over}: {memory.describe(data, tensor)}"
        )
    if tensor == 1 and (wider := _pick_tensor_parallel(model, config, world_size, memory, node_size)):
        return wider
    return Layout(
        1,
        data,
        tensor,
        f"auto: fsdp over {data} workers{over}, which may not fit: {memory.describe(data, tensor)}; "
        "lower batch_size, raise activation_checkpointing or take more workers",
    )


def _pick_tensor_parallel(
    model: LlamaConfig, config: TrainConfig, world_size: int, memory: _MemoryEstimate, node_size: int
) -> Layout | None:
    """Pick the least tensor parallelism within a node that fits.

    It is the last resort: it divides the activations, which FSDP does not, but fewer batches run at once.
    """
    tensor = 2
    while tensor <= node_size and world_size % tensor == 0 and _divides(model, config, tensor):
        shards = world_size // tensor
        if memory.fits(shards, tensor):
            reason = f"auto: fsdp over {shards} x {tensor} tensor-parallel, as activations need dividing"
            return Layout(1, shards, tensor, f"{reason}: {memory.describe(shards, tensor)}")
        tensor *= 2
    return None


def _divides(model: LlamaConfig, config: TrainConfig, tensor: int) -> bool:
    # Adapters are not trained with tensor parallelism.
    return config.lora is None and all(size % tensor == 0 for size in _divided_sizes(model, config).values())


def _divided_sizes(model: LlamaConfig, config: TrainConfig) -> dict[str, int]:
    """Return the sizes that tensor parallelism divides, by name."""
    return {
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "seq_len": config.seq_len or model.max_seq_len,
        **{f"the seq_len of {stage}": stage.seq_len for stage in config.stages if stage.seq_len},
    }


def _times_tensor(tensor: int) -> str:
    return f" x {tensor} tensor-parallel" if tensor > 1 else ""
