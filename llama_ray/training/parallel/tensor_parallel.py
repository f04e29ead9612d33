"""Tensor parallelism: Megatron's division of matrices, with sequences divided between them."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from llama_ray.model.llama import Llama
from llama_ray.model.loss import Head, head_loss


def apply_tensor_parallel(model: Llama, mesh: DeviceMesh) -> None:
    """Shard every matrix of `model` (on the meta device) over the one-dimensional `mesh`.

    Attention heads and the columns of SwiGLU are divided (Shoeybi et al. 2019, arXiv:1909.08053). Norms and residuals
    work on a share of the sequence each (Korthikanti et al. 2022, arXiv:2205.05198). The loss is divided by tokens,
    not by vocabulary: each worker gathers the head's matrix and computes the loss of its share of the sequence. All
    workers do the same amount of work, and no special cross-entropy is needed.
    """
    norm = SequenceParallel()
    gather = partial(PrepareModuleInput, desired_input_layouts=(Replicate(), None, None))
    parallelize_module(
        model,
        mesh,
        {
            "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": norm,
        },
    )
    model.embed_tokens.register_forward_hook(_await_communication)
    for block in model.layers:
        parallelize_module(
            block,
            mesh,
            {
                "input_layernorm": norm,
                "post_attention_layernorm": norm,
                "self_attn": gather(input_layouts=(Shard(1), None, None)),
                "self_attn.q_proj": ColwiseParallel(),
                "self_attn.k_proj": ColwiseParallel(),
                "self_attn.v_proj": ColwiseParallel(),
                "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
                "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
            },
        )
    _divide_loss_by_tokens(model.lm_head, mesh)
    model.tie_weights()


def _await_communication(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # A reduce-scatter returns a tensor that may still be on its way. As the input of a compiled block (torch 2.13) it
    # makes the backward pass fail with "'Tensor' object has no attribute '_local_tensor'". Multiplying waits for it.
    return output * 1


def _divide_loss_by_tokens(head: Head, mesh: DeviceMesh) -> None:
    """Store the head's matrix in shards of the vocabulary; use it whole, on a share of the sequence."""

    def shard(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))

    distribute_module(head, mesh, shard)
    head.forward = partial(_loss_of_own_tokens, head, mesh)  # type: ignore[method-assign]


def _loss_of_own_tokens(
    head: Head,
    mesh: DeviceMesh,
    hidden: DTensor,
    targets: Tensor | None = None,
    scale: Tensor | float = 1.0,
    z_loss: float = 0.0,
    groups: Tensor | None = None,
    each: bool = False,
) -> Tensor:
    """Do what `Head.forward` does, on `hidden` sharded by tokens; every worker returns the whole loss."""
    assert targets is not None, "a model under tensor parallelism computes losses, not logits"
    assert not each, "the losses of tokens are on several workers"
    assert isinstance(head.weight, DTensor)
    weight = head.weight.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])
    own_targets = targets.chunk(mesh.size(), dim=1)[mesh.get_local_rank()].contiguous()
    loss = head_loss(hidden.to_local(), weight, own_targets, scale, z_loss, groups)
    return DTensor.from_local(loss, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()
