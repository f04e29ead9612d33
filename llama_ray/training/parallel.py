"""Where a worker stands among the others, and how the model is spread over them."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llama_ray.model.llama import Llama


def rank() -> int:
    """The number of this worker, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many workers train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_workers(values: Tensor) -> Tensor:
    """Add up `values` of all workers, in place; every worker gets the sum."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def parallelize(model: Llama, device: torch.device, *, compile_blocks: bool) -> nn.Module:
    """Prepare a model that already lies on `device`: compile its blocks, then replicate it where there are peers.

    Blocks are compiled one by one: they are alike, so the compiler works once and not once a layer.
    """
    if compile_blocks:
        for block in model.layers:
            block.compile()
    if world_size() == 1:
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


def unwrap(model: nn.Module) -> Llama:
    """The plain model inside what `parallelize` returned; its forward pass talks to no peer."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(inner, Llama)
    return inner


def without_gradient_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, backward passes keep gradients on the worker: for all micro-steps but the last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
