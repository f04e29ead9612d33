"""Build the optimizer, and set its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from llama_ray.training.config import Schedule, TrainConfig
from llama_ray.training.optimizers.muon import Muon


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build fused AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) or Muon; weight decay is for matrices only.

    Muon takes the matrices of the blocks; embedding, head and norms stay with AdamW. `model` is what `parallelize`
    returned, because sharding replaces the parameters.
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
    settings = {
        "lr": config.peak_learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": 1e-8,
        "fused": True,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)  # type: ignore[arg-type]
    orthogonal = {"params": hidden, "weight_decay": config.weight_decay, "muon": True}
    return Muon([orthogonal, *({**g, "muon": False} for g in groups)], **settings)  # type: ignore[arg-type]


def learning_rate(step: int, config: TrainConfig, schedule: Schedule) -> float:
    """Return the learning rate of `step` (counted from 1): a linear warm-up, then the decay of `config.schedule`.

    The last step of the warm-up, or else the first step, has the highest rate; the last step of the run has
    `min_learning_rate_ratio` of it. `cosine` decays along a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983),
    `linear` along a line. `wsd` (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395) stays flat and decays along
    a line in the last `decay_fraction` of the run. As a pure function of the step, the schedule has no state to save.
    """
    step, total_steps = schedule.progress(step)
    if step <= schedule.warmup_steps:
        return config.peak_learning_rate * step / schedule.warmup_steps
    start = max(schedule.warmup_steps, 1)
    if config.schedule == "wsd":
        start = max(start, total_steps - round(config.decay_fraction * total_steps))
    progress = min(max(step - start, 0) / max(total_steps - start, 1), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    ratio = config.min_learning_rate_ratio
    return config.peak_learning_rate * (ratio + (1 - ratio) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
