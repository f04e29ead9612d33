"""One optimizer step, and one validation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama_ray.data.loader import Batch
from llama_ray.model.loss import IGNORE, cross_entropy_sum
from llama_ray.training.config import Precision
from llama_ray.training.parallel import sum_over_workers, unwrap, without_gradient_sync, world_size

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """Scalars that stay on the device until somebody asks, so that a step need not wait for the host.

    `loss_sum` is in nats over this worker's `tokens` (its targets); `grad_norm` is that of the whole global batch,
    before clipping.
    """

    loss_sum: Tensor
    tokens: Tensor
    grad_norm: Tensor

    def mean_loss(self) -> float:
        """Nats per token over the global batch. Every worker must ask: the workers' sums are added up."""
        total = sum_over_workers(torch.stack((self.loss_sum.double(), self.tokens.double())))
        return (total[0] / total[1]).item()


class Stepper:
    """Forward, backward and update in one precision (mixed: Micikevicius et al. 2018, arXiv:1710.03740)."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        precision: Precision,
        max_grad_norm: float,
    ) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self.precision, self.max_grad_norm = precision, max_grad_norm
        # fp16 gradients of small losses underflow; bf16 has the range of fp32 and needs no scaling.
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Accumulate over `micro_batches`, then update the weights once.

        The loss is the mean over all targets of the global batch. Each worker therefore divides its sums by the
        global number of targets, and multiplies by the number of workers to undo DDP's averaging: how a global
        batch is split into workers and micro-steps changes the update by rounding only.
        """
        batches = [
            (x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True))
            for x, y in micro_batches
        ]
        tokens = torch.stack([(y != IGNORE).sum() for _, y in batches]).sum()
        weight = world_size() / sum_over_workers(tokens.clone()).clamp(min=1)
        loss_sum = torch.zeros((), device=self.device)
        for i, (inputs, targets) in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else without_gradient_sync(self.model):
                with self._autocast():
                    logits = self.model(inputs)
                loss = cross_entropy_sum(logits, targets)
                self.scaler.scale(loss * weight).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        grad_norm = self._update()
        return StepResult(loss_sum, tokens, grad_norm)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean loss in nats per token over the batches of all workers; the workers' shares may differ in size."""
        model = unwrap(self.model)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for x, y in batches:
            inputs, targets = x.to(self.device), y.to(self.device)
            with self._autocast():
                logits = model(inputs)
            total[0] += cross_entropy_sum(logits, targets)
            total[1] += (targets != IGNORE).sum()
        sum_over_workers(total)
        return (total[0] / total[1]).item()

    def _update(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.max_grad_norm or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.precision])
