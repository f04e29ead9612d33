"""Muon: momentum whose matrices are orthogonalised before they are applied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama_ray.training.parallel.shards import own_part

# Keller Jordan's quintic, steepest at zero among those that keep singular values near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) in the groups with `muon=True`, AdamW elsewhere.

    Updates are scaled to the size that AdamW's have (Liu et al. 2025, arXiv:2502.16982), so that one learning rate
    and one weight decay serve both. torch.optim.Muon would orthogonalise every worker's shard by itself and knows
    no `found_inf`; here a sharded matrix is gathered, and each worker orthogonalises its turn of the matrices.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update. The caller may set, as torch.amp does, two scalars on the device.

        `found_inf` (0 or 1) at 1 changes nothing; gradients are divided by `grad_scale`.
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
        parameters = [p for p in group["params"] if p.grad is not None]
        found: Tensor | None = getattr(self, "found_inf", None)
        turns = dist.get_world_size() if dist.is_initialized() else 1
        me = dist.get_rank() if dist.is_initialized() else 0
        for start in range(0, len(parameters), turns):
            batch = parameters[start : start + turns]
            mine: Tensor | None = None
            for turn, parameter in enumerate(batch):
                direction = self._momentum(parameter, found)
                whole = direction.full_tensor() if isinstance(direction, DTensor) else direction
                if turn == me:
                    mine = orthogonalize(whole)
                del whole, direction
            for turn, parameter in enumerate(batch):
                if turn == me:
                    assert mine is not None
                    update = mine.contiguous()
                else:
                    update = torch.empty(parameter.shape, dtype=torch.bfloat16, device=parameter.device)
                if turns > 1:
                    dist.broadcast(update, src=turn)
                _apply(parameter, update, group, found)

    def _momentum(self, parameter: Tensor, found: Tensor | None) -> Tensor:
        """The running average of gradients, looked ahead by one step (Nesterov); sharded as the parameter is."""
        state = self.state[parameter]
        if not state:
            # AdamW, whose state dicts these become part of, counts updates too.
            state["step"] = torch.zeros((), device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1 if found is None else 1 - found
        gradient = parameter.grad
        assert gradient is not None
        average, new = _local(state["momentum_buffer"]), _local(gradient)
        if (scale := getattr(self, "grad_scale", None)) is not None:
            new = new / scale
        updated = average.lerp(new, 1 - _MOMENTUM)
        average.copy_(updated if found is None else torch.where(found > 0, average, updated))
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
    """The nearest matrix with singular values of about 1 (0.7 to 1.2), in bf16, by Newton-Schulz iteration."""
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x


def _apply(parameter: Tensor, update: Tensor, group: dict[str, Any], found: Tensor | None) -> None:
    rate = group["lr"]
    size = 0.2 * math.sqrt(max(parameter.shape))
    if isinstance(parameter, DTensor):
        update = own_part(update, parameter)
    local = _local(parameter)
    changed = local * (1 - rate * group["weight_decay"]) - (rate * size) * update
    local.copy_(changed if found is None else torch.where(found > 0, local, changed))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
