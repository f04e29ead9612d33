"""Every layer over several workers: Megatron's split of matrices, with sequences split between them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from llama_ray.model.llama import Llama
from llama_ray.model.loss import Head, head_loss


def apply_tensor_parallel(model: Llama, mesh: DeviceMesh) -> None:
    """Shard every matrix of `model` (on the meta device) over the one-dimensional `mesh`.

    Attention heads and SwiGLU's columns are divided (Shoeybi et al. 2019, arXiv:1909.08053); norms and residuals
    work on a share of the sequence each (Korthikanti et al. 2022, arXiv:2205.05198). The loss is divided by
    tokens, not by vocabulary: each worker gathers the head's matrix and takes its share of the sequence through
    it, which is the same work for everyone and needs no special cross-entropy.
    """
    norm = SequenceParallel()
    gather = partial(PrepareModuleInput, desired_input_layouts=(Replicate(), None, None))
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": norm,
    }
    parallelize_module(model, mesh, plan)
    model.embed_tokens.register_forward_hook(_arrive)
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
    parallelize_module(model, mesh, {"lm_head": _LossByTokens()})
    model.tie_weights()


def _arrive(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    # What reduce-scatter returns is a tensor still under way. As the input of a compiled block (torch 2.13) it makes
    # the backward pass fail, with "'Tensor' object has no attribute '_local_tensor'"; a product waits for it.
    return output * 1


class _LossByTokens(ParallelStyle):
    """The head's matrix is stored in shares of the vocabulary and used whole, on a share of the sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def shard(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for key, parameter in part.named_parameters(recurse=False):
                local = torch.distributed.tensor.distribute_tensor(parameter, mesh, [Shard(0)])
                part.register_parameter(key, nn.Parameter(local))

        assert isinstance(module, Head)
        distribute_module(module, device_mesh, shard)
        module.forward = partial(_loss_by_tokens, module, device_mesh)  # type: ignore[method-assign]
        return module


def _loss_by_tokens(
    module: Head,
    mesh: DeviceMesh,
    hidden: DTensor,
    targets: Tensor | None = None,
    scale: Tensor | float = 1.0,
    z_loss: float = 0.0,
) -> Tensor:
    assert targets is not None, "a model under tensor parallelism computes losses, not logits"
    weight = module.weight
    assert isinstance(weight, DTensor)
    whole = weight.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])
    mine = targets.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]
    local = head_loss(hidden.to_local(), whole, mine.contiguous(), scale, z_loss)
    return DTensor.from_local(local, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()
