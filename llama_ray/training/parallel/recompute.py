"""Activation checkpointing: computing activations again in the backward pass in place of keeping them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llama_ray.training.config import Checkpointing
from llama_ray.utils.torch_private import reduce_scatter_op

_aten = torch.ops.aten
_MATMULS = {_aten.mm.default, _aten.addmm.default, _aten.linear.default}
_ATTENTION = {
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}
_COMMUNICATION = {reduce_scatter_op()}


def checkpoint_block(block: nn.Module, mode: Checkpointing) -> None:
    """Let `block` keep less of its forward pass (Chen et al. 2016, arXiv:1604.06174).

    `full` keeps the block's input alone. `selective` also keeps what is dear to compute again: attention, what
    came over the network, and every second matrix product, so that about half the memory goes for a small part
    of the time. Names of parameters do not change.
    """
    if mode == "none":
        return
    more: dict[str, Any] = {"context_fn": _keep_what_is_dear} if mode == "selective" else {}
    # Nothing in a block draws random numbers, so there is no generator state to keep.
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **more)


def _keep_what_is_dear() -> Any:
    seen = {False: 0, True: 0}  # matrix products so far: in the forward pass, in the recomputation

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _MATMULS:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] % 2 == 1
        else:
            keep = op in _ATTENTION or op in _COMMUNICATION
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
