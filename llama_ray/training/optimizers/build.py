"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.optimizers.muon import Muon


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) or Muon, with weight decay on matrices, not norms.

    Under Muon the matrices of the blocks are orthogonalised; embedding, head and norms stay with AdamW. Build it
    on what `parallelize` returned: sharding replaces the parameters.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [(n, p) for n, p in named if p.dim() >= 2]
    hidden = [p for n, p in matrices if "layers." in n and config.optimizer == "muon"]
    groups = [
        {
            "params": [p for n, p in matrices if all(p is not h for h in hidden)],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": 1e-8, "fused": True}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)  # type: ignore[arg-type]
    turned = {"params": hidden, "weight_decay": config.weight_decay, "muon": True}
    return Muon([turned, *({**g, "muon": False} for g in groups)], **settings)  # type: ignore[arg-type]


def learning_rate(step: int, config: TrainConfig, schedule: Schedule) -> float:
    """The rate of `step` (counted from 1): linear warm-up, then down to the least ratio at the last step.

    Down a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983), a line, or (wsd) flat and then down a line in the
    last `decay_fraction` of the run (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395). A pure function of
    the step, so that nothing of it needs to be saved.
    """
    if step <= schedule.warmup_steps:
        return config.learning_rate * step / schedule.warmup_steps
    start = schedule.warmup_steps
    if config.schedule == "wsd":
        start = max(start, schedule.total_steps - round(config.decay_fraction * schedule.total_steps))
    progress = min(max(step - start, 0) / max(schedule.total_steps - start, 1), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    ratio = config.min_learning_rate_ratio
    return config.learning_rate * (ratio + (1 - ratio) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
