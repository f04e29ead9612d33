"""Where a worker stands among the others, and how the model is spread over them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llama_ray.model.llama import Llama
from llama_ray.training.config import Precision, TrainConfig
from llama_ray.training.parallel.layout import Layout
from llama_ray.training.parallel.recompute import checkpoint_block
from llama_ray.training.parallel.shards import own_part
from llama_ray.training.parallel.tensor_parallel import apply_tensor_parallel

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Of matrix products, by precision; fp32 needs none."""

GATHER_LIMIT_BYTES = 1024**3
"""The largest sharded model that `gather_model` puts together on one worker."""


def rank() -> int:
    """The number of this worker, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many workers train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def parallelize(
    model: Llama,
    config: TrainConfig,
    layout: Layout,
    device: torch.device,
    *,
    compile_blocks: bool,
    draw: bool = True,
) -> nn.Module:
    """Spread `model` over the workers as `layout` (with its mesh, see `Layout.on`) says.

    A model on the meta device gets its memory here, each worker its share only, and the initial weights of
    `config.seed`: the same numbers, whatever the layout (a plan, which needs no numbers, says `draw=False`). One
    that has its weights already must not be sharded.
    In this order, as each needs what comes before: tensor parallelism, activation checkpointing, compilation (one
    block at a time: they are alike, so the compiler works once and not once a layer), FSDP or DDP.
    """
    fresh = model.embed_tokens.weight.is_meta
    if layout.sharded and not fresh:
        raise ValueError("a model that is to be sharded must be on the meta device")
    if layout.tensor > 1:
        assert layout.mesh is not None
        apply_tensor_parallel(model, layout.mesh["tensor"])
    for block in model.layers:
        checkpoint_block(block, config.activation_checkpointing)
        if compile_blocks:
            # The forward alone: FSDP's hooks stay outside the graph, and no name changes.
            block.forward = torch.compile(block.forward)
    if layout.sharded and layout.data_world > 1:
        _fully_shard(model, config.precision, layout)
    if fresh:
        model.materialize(device)
        if draw:
            _draw_weights(model, config.seed)
    if layout.sharded or layout.data_world == 1:
        return model
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers, 2.11 knows no other name.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            # The rotary table is the same everywhere; gradients live in the buckets that are sent, not beside them.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


@contextmanager
def micro_step(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around the forward and backward pass of one micro-step: no exchange of gradients that can wait for the last.

    DDP exchanges once. FSDP must reduce-scatter each time, since gradients of the whole model are what it is there
    to avoid; between the copies of HSDP the shares are exchanged once.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    yield


def gather_model(model: nn.Module, config: TrainConfig) -> Llama | None:
    """A plain model with the weights of what `parallelize` returned, to generate from. Every worker must call it.

    A model that is not sharded is shared, not copied, and every worker gets it. A sharded one comes to the first
    worker's host memory, and only up to GATHER_LIMIT_BYTES; else, and on the other workers, it is None.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, Llama)
    plain = Llama(inner.config, device="meta")
    if any(isinstance(p, DTensor) for p in inner.parameters()):
        if 4 * inner.config.num_parameters() > GATHER_LIMIT_BYTES:
            return None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(inner, options=options)
        if rank() != 0:
            return None
        plain.rotary.to_empty(device="cpu")
        plain.rotary.fill_tables()
    else:
        weights = inner.state_dict()
        plain.rotary = inner.rotary
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    return plain.requires_grad_(False)


def _fully_shard(model: Llama, precision: Precision, layout: Layout) -> None:
    """FSDP2, one group a block (Zhao et al. 2023, arXiv:2304.11277).

    Workers keep fp32 shares. Matrices travel in the precision that autocast would give them anyway, so sharding
    changes no matrix product; gradients are summed in fp32. Inputs are not cast: the residual stream stays as wide
    as autocast leaves it without FSDP. Embedding and last norm, which autocast does not touch, travel in fp32.
    """
    assert layout.mesh is not None
    mesh = layout.mesh["replicate", "shard"] if layout.copies > 1 else layout.mesh["shard"]
    low = MixedPrecisionPolicy()
    if precision in AUTOCAST:
        low = MixedPrecisionPolicy(AUTOCAST[precision], torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=low)
    if not model.config.tie_embeddings:  # a shared matrix must stay in the group that both its users are in
        fully_shard(model.embed_tokens, mesh=mesh)
        # Not resharded after the forward pass, since the backward pass begins with it.
        fully_shard(model.lm_head, mesh=mesh, mp_policy=low, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def _draw_weights(model: Llama, seed: int) -> None:
    """What `Llama.init_weights` does; of a sharded parameter each worker draws all and keeps its share.

    One whole parameter at a time is in memory.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            model.init_parameter(name, parameter, seed)
            continue
        local = parameter.to_local()
        whole = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
        model.init_parameter(name, whole, seed)
        local.copy_(own_part(whole, parameter))


def whole_tensor(value: Tensor) -> Tensor:
    """`value` itself, or all of it where it is sharded. Every worker that holds a share must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value
