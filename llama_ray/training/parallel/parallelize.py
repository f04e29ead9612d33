"""Spread a model over the workers, and gather it again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llama_ray.model.adapters import add_adapters, merged_model
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.training.config import Precision, TrainConfig
from llama_ray.training.parallel.float8 import use_float8
from llama_ray.training.parallel.layout import Layout
from llama_ray.training.parallel.process_group import rank
from llama_ray.training.parallel.recompute import checkpoint_block
from llama_ray.training.parallel.shards import own_shard
from llama_ray.training.parallel.tensor_parallel import apply_tensor_parallel
from llama_ray.training.precision import DTYPES

GATHER_LIMIT_BYTES = 1024**3
"""Default size of the largest sharded model that `gather_model` gathers on one worker."""


def unallocated_model(model_config: LlamaConfig, config: TrainConfig) -> Llama:
    """Return the model that is trained, on the meta device.

    With adapters its other weights are frozen, in the dtype of matrix products.
    """
    model = Llama(model_config, device="meta")
    if config.lora is not None:
        model.to(DTYPES[config.precision])
        add_adapters(model, config.lora)
    return model


def parallelize(
    model: Llama,
    config: TrainConfig,
    layout: Layout,
    device: torch.device,
    *,
    compile_blocks: bool,
    init_weights: bool = True,
) -> nn.Module:
    """Spread `model` over the workers as `layout` (with its mesh, see `Layout.with_mesh`) says.

    A model on the meta device gets its memory here, on each worker only for its share. It also gets the initial
    weights of `config.seed`, which are the same for every layout; `init_weights=False` leaves them out, where they come
    from elsewhere. Those of a frozen weight always do.
    A model that already has its weights must not be sharded (ValueError).

    The order matters, as each stage needs the ones before it: tensor parallelism, activation checkpointing,
    compilation, FSDP or DDP. Blocks are compiled one at a time: they are alike, so the compiler works once and not
    once per layer.
    """
    fresh = model.embed_tokens.weight.is_meta
    if layout.sharded and not fresh:
        raise ValueError(
            f"the model is on {model.embed_tokens.weight.device}; it must be on the meta device to be sharded"
        )
    if config.precision == "fp8":
        use_float8(model, config.batch_size * (config.seq_len or model.config.max_seq_len))
    if layout.tensor > 1:
        assert layout.mesh is not None
        apply_tensor_parallel(model, layout.mesh["tensor"])
    for block in model.layers:
        checkpoint_block(block, config.activation_checkpointing, random=config.lora_dropout > 0)
        if compile_blocks:
            # Only the forward function: FSDP's hooks stay outside of the graph, and no name changes.
            block.forward = torch.compile(block.forward)
    if compile_blocks and device.type == "cuda":
        model.lm_head.compile_loss()
    if layout.mesh is not None and "shard" in (layout.mesh.mesh_dim_names or ()):
        _fully_shard(model, config.precision, layout)
    if fresh:
        model.materialize(device)
        if init_weights:
            _init_weights(model, config.seed)
    if layout.sharded or layout.data_world == 1:
        return model
    return _replicate(model, device)


def _replicate(model: Llama, device: torch.device) -> DistributedDataParallel:
    """Let DDP average the gradients of all workers."""
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers; 2.11 knows only this name.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            # The only buffer, the rotary table, is the same on every worker.
            broadcast_buffers=False,
            # Gradients are views of the buckets that are sent, so they take no memory of their own.
            gradient_as_bucket_view=True,
        )


@contextmanager
def micro_step(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Run the forward and backward pass of one micro-step inside; defer gradient all-reduces to the last one.

    DDP all-reduces once per step. FSDP must reduce-scatter in every micro-step, because no worker has room for the
    gradients of the whole model; HSDP all-reduces the sharded gradients between its replicas once per step.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    yield


def gather_model(model: nn.Module, *, limit_bytes: int = GATHER_LIMIT_BYTES) -> Llama | None:
    """Return a plain model with the weights of `model`, which `parallelize` returned. Every worker must call it.

    If the model is not sharded, every worker gets one that shares its weights. If it is sharded, the first worker gets
    a copy in host memory and the others None; above `limit_bytes` the first one gets None as well. Adapters are merged,
    into weights of which the first worker alone gets a copy.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, Llama)
    sharded = any(isinstance(p, DTensor) for p in inner.parameters())
    if inner.lora is not None and not sharded and rank() != 0:
        return None
    plain = Llama(inner.config, device="meta")
    if inner.lora is not None:
        add_adapters(plain, inner.lora)
    if sharded:
        if sum(p.nbytes for p in inner.parameters()) > limit_bytes:
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
    return plain.requires_grad_(False) if inner.lora is None else merged_model(plain)


def _fully_shard(model: Llama, precision: Precision, layout: Layout) -> None:
    """Apply FSDP2 with one group per block (Zhao et al. 2023, arXiv:2304.11277).

    Workers keep fp32 shards. Matrices are gathered in the precision that autocast would cast them to anyway, so
    sharding changes no matrix product; gradients are summed in fp32. Inputs are not cast: the residual stream stays as
    wide as autocast leaves it without FSDP. Embedding and last norm, which autocast does not cast, are gathered in
    fp32.
    """
    assert layout.mesh is not None
    mesh = layout.mesh["replicate", "shard"] if layout.replicas > 1 else layout.mesh["shard"]
    mixed = MixedPrecisionPolicy()
    if precision != "fp32":
        mixed = MixedPrecisionPolicy(DTYPES[precision], torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    # A tied matrix must stay in the group that both of its users belong to: the whole model.
    if not model.config.tie_embeddings:
        fully_shard(model.embed_tokens, mesh=mesh)
        # Kept gathered after the forward pass, because the backward pass begins with it.
        fully_shard(model.lm_head, mesh=mesh, mp_policy=mixed, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def _init_weights(model: Llama, seed: int) -> None:
    """Set the same weights as `Llama.init_weights`, whatever the layout.

    Each worker generates all of a sharded parameter and keeps its shard, so one whole parameter at a time is in memory.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not isinstance(parameter, DTensor):
            model.init_parameter(name, parameter, seed)
            continue
        local = parameter.to_local()
        whole = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
        model.init_parameter(name, whole, seed)
        local.copy_(own_shard(whole, parameter))
