"""Activation checkpointing: recompute activations in the backward pass instead of keeping them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llama_ray.training.config import ActivationCheckpointing
from llama_ray.utils.torch_private import reduce_scatter_op

_aten = torch.ops.aten
_MATMULS = {_aten.mm.default, _aten.addmm.default, _aten.linear.default, _aten._scaled_mm.default}
_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    # Within documents, see `DocumentAttention`. That of GPUs exists only once it is imported, hence names.
    "llama_ray::document_attention",
    "torch_attn::_varlen_attn",
}
_COMMUNICATION = {reduce_scatter_op()}


def checkpoint_block(block: nn.Module, mode: ActivationCheckpointing, *, random: bool = False) -> None:
    """Let `block` keep less of its forward pass (Chen et al. 2016, arXiv:1604.06174).

    `full` keeps only the block's input. `selective` also keeps what is expensive to recompute: the output of
    attention, what came over the network, and every second matrix product. That saves about half of the memory for a
    small part of the time. Names of parameters do not change. `random` says that the block draws random numbers.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"context_fn": _save_expensive_ops} if mode == "selective" else {}
    block.forward = partial(
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=random, **options
    )


def _save_expensive_ops() -> Any:
    # Matrix products seen so far: in the forward pass (False) and in the recomputation (True).
    seen = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _MATMULS:
            seen[context.is_recompute] += 1
            save = seen[context.is_recompute] % 2 == 1
        else:
            save = op.name() in _ATTENTION or op in _COMMUNICATION
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
