"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from llama_ray.training.config import Schedule, TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with weight decay on matrices, not on norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )


def learning_rate(step: int, config: TrainConfig, schedule: Schedule) -> float:
    """The rate of `step` (counted from 1): linear warm-up, then a cosine down to the least ratio at the last step.

    A pure function of the step, so that nothing of it needs to be saved (Loshchilov and Hutter 2017,
    arXiv:1608.03983).
    """
    if step <= schedule.warmup_steps:
        return config.learning_rate * step / schedule.warmup_steps
    span = max(schedule.total_steps - schedule.warmup_steps, 1)
    progress = min((step - schedule.warmup_steps) / span, 1.0)
    ratio = config.min_learning_rate_ratio
    return config.learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
