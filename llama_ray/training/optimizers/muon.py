"""Muon: momentum, orthogonalised matrix by matrix before it is applied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama_ray.training.parallel.process_group import rank, world_size
from llama_ray.training.parallel.shards import own_shard, whole_tensor

# Keller Jordan's quintic: the steepest at zero of those that keep singular values near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) in the groups with `muon=True`, AdamW elsewhere.

    Updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that both can use one learning
    rate and one weight decay. torch.optim.Muon is not used because it orthogonalises each worker's shard by itself and
    ignores `found_inf`. Here a sharded matrix is gathered, and the workers take turns at orthogonalising matrices.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the weights once. The caller may set two attributes to scalars on the device, as torch.amp does.

        With `found_inf` at 1 (not 0) nothing changes; gradients are divided by `grad_scale`.
        """
        groups = self.param_groups
        try:
            self.param_groups = [g for g in groups if not g["muon"]]
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._orthogonal_step(group)

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        """Update the matrices of `group`, in batches of one matrix per worker."""
        parameters = [p for p in group["params"] if p.grad is not None]
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for start in range(0, len(parameters), world_size()):
            batch = parameters[start : start + world_size()]
            own: Tensor | None = None
            for owner, parameter in enumerate(batch):
                momentum = whole_tensor(self._update_momentum(parameter, found_inf))
                if owner == rank():
                    own = orthogonalize(momentum)
                # Only one gathered matrix at a time is in memory.
                del momentum
            for owner, parameter in enumerate(batch):
                if owner == rank():
                    assert own is not None
                    update = own.contiguous()
                else:
                    update = torch.empty(parameter.shape, dtype=torch.bfloat16, device=parameter.device)
                if world_size() > 1:
                    dist.broadcast(update, src=owner)
                _apply(parameter, update, group, found_inf)

    def _update_momentum(self, parameter: Tensor, found_inf: Tensor | None) -> Tensor:
        """Add the gradient to the running average; return Nesterov's look-ahead of it, sharded like the parameter."""
        state = self.state[parameter]
        if not state:
            # `step` is what AdamW's state has: both go into one state dict.
            state["step"] = torch.zeros((), device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1 if found_inf is None else 1 - found_inf
        gradient = parameter.grad
        assert gradient is not None
        average, new = _local(state["momentum_buffer"]), _local(gradient)
        if (scale := getattr(self, "grad_scale", None)) is not None:
            new = new / scale
        updated = average.lerp(new, 1 - _MOMENTUM)
        average.copy_(updated if found_inf is None else torch.where(found_inf > 0, average, updated))
        ahead = new.lerp(average, _MOMENTUM)
        if isinstance(parameter, DTensor):
            return DTensor.from_local(
                ahead,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        return ahead


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return, in bf16, the nearest matrix with singular values of about 1 (0.7 to 1.2), by Newton-Schulz iteration."""
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x


def _apply(parameter: Tensor, update: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
    rate = group["lr"]
    size = 0.2 * math.sqrt(max(parameter.shape))
    if isinstance(parameter, DTensor):
        update = own_shard(update, parameter)
    local = _local(parameter)
    changed = local * (1 - rate * group["weight_decay"]) - (rate * size) * update
    local.copy_(changed if found_inf is None else torch.where(found_inf > 0, local, changed))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
