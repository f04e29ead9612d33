"""One optimizer step, and one validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.attention.documents import DocumentAttention
from llama_ray.training.config import TrainConfig
from llama_ray.training.hosts.memory import keep_freed_memory
from llama_ray.training.objectives import objective_of
from llama_ray.training.optimizers.scaler import LossScaler
from llama_ray.training.parallel.layout import SINGLE_WORKER, Layout
from llama_ray.training.parallel.parallelize import micro_step
from llama_ray.training.parallel.shards import whole_tensor
from llama_ray.training.precision import DTYPES
from llama_ray.utils.targets import IGNORE_INDEX


@dataclass(frozen=True)
class StepResult:
    """Tensors that stay on the device until they are read, so that a step does not wait for the device.

    They are the same on every worker. `loss` (nats per token, without z-loss; or per pair, see `PairObjective`) and
    `tokens` (targets; or pairs) are those of the global batch, `grad_norm` is the norm of its gradient before clipping.
    `skipped` is true if the loss or the gradient was not finite; the weights and the optimizer's state are then
    unchanged. All are scalars but `source_losses`, the loss of each source of a mixture: NaN for one without targets in
    this step, and empty without a mixture; and `measures`, the means of what the objective measures.
    """

    loss: Tensor
    tokens: Tensor
    grad_norm: Tensor
    skipped: Tensor
    source_losses: Tensor
    measures: Tensor


@dataclass(frozen=True)
class Validation:
    """Mean losses in nats per token: over all targets, and over those of each source of a mixture, else empty.

    `measures` are the means of what the objective measures.
    """

    loss: float
    source_losses: tuple[float, ...]
    measures: tuple[float, ...] = ()


class Stepper:
    """Forward, backward and update in one precision (mixed: Micikevicius et al. 2018, arXiv:1710.03740).

    `model` comes from `parallelize`, called with `layout`, and `optimizer` from `build_optimizer(model, config)`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        device: torch.device,
        layout: Layout = SINGLE_WORKER,
        num_sources: int = 0,
    ) -> None:
        """With `num_sources`, the losses of so many sources are told apart; batches must have `sources` then."""
        self.model, self.optimizer, self.config = model, optimizer, config
        self.device, self.layout = device, layout
        self.num_sources = num_sources
        self.objective = objective_of(config)
        # fp16 gradients of small losses underflow; bf16 has the range of fp32 and needs no scaling.
        self.scaler = LossScaler(device, enabled=config.precision == "fp16")
        if device.type == "cpu":
            keep_freed_memory()

    def step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Accumulate the gradients of `micro_batches`, then update the weights once.

        The loss is the mean over all targets, or pairs, of the global batch. Each worker therefore divides its sum by
        their global number, and multiplies it by the number of workers to undo the averaging of DDP and FSDP. So how a
        global batch is split into workers and micro-steps changes the update by rounding only.
        """
        batches = [batch.to(self.device) for batch in micro_batches]
        tokens = self.layout.sum(torch.stack([self._targets(batch) for batch in batches]).sum(0))
        scale = self.scaler.scale * self.layout.data_world / tokens[0].clamp(min=1)
        sums = torch.zeros(1 + self.num_sources + len(self.objective.measures), device=self.device)
        for i, (batch, given) in enumerate(zip(batches, micro_batches, strict=True)):
            with micro_step(self.model, last=i == len(batches) - 1):
                loss = self._loss(self.model, batch, self._attend(given), scale)
                objective, *cross_entropies = loss.unbind()
                torch.autograd.backward(objective * scale)
            sums += torch.stack(cross_entropies).detach()
        return self._update(sums, tokens)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> Validation:
        """Return the mean losses over the batches of all workers, which may have unequal numbers."""
        # Without gradients DDP's forward pass is not needed; FSDP's is, because it gathers the weights.
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        model.eval()
        width = 1 + self.num_sources
        sums = torch.zeros(width + len(self.objective.measures), dtype=torch.float64, device=self.device)
        counts = torch.zeros(width, dtype=torch.float64, device=self.device)
        for given in self._in_lockstep(batches) if self.layout.sharded else batches:
            attend, batch = self._attend(given), given.to(self.device)
            sums += self._loss(model, batch, attend)[1:]
            counts += self._targets(batch)
        model.train()
        self.layout.sum(sums)
        self.layout.sum(counts)
        loss, *of_sources = (sums[:width] / counts).tolist()
        return Validation(loss, tuple(of_sources), tuple((sums[width:] / counts[0]).tolist()))

    def _targets(self, batch: Batch) -> Tensor:
        """Return the number of targets, or pairs, of `batch`, and that of each source: int64 [1 + sources]."""
        of_rows = self.objective.counts(batch)
        groups = self._sources(batch)
        if groups is None:
            return of_rows.sum(0, keepdim=True)
        return torch.cat((of_rows.sum(0, keepdim=True), (groups * of_rows.unsqueeze(1)).sum(0)))

    def _sources(self, batch: Batch) -> Tensor | None:
        """Return int64 [batch, sources] with a 1 for the source of each row; None without a mixture."""
        if not self.num_sources:
            return None
        assert batch.sources is not None
        return nn.functional.one_hot(batch.sources, self.num_sources)

    def _attend(self, batch: Batch) -> DocumentAttention | None:
        """Return the attention within the documents of `batch`, which is not on the device yet; None: causal."""
        if batch.starts is None:
            return None
        return DocumentAttention.of(batch.starts, self.device, DTYPES[self.config.precision])

    def _loss(
        self,
        model: nn.Module,
        batch: Batch,
        attend: DocumentAttention | None,
        scale: Tensor | float = 1.0,
    ) -> Tensor:
        """Return `Objective.loss` of `batch`, with its sources as the groups."""
        sources = self._sources(batch)
        groups = None if sources is None else sources.float()
        with self._autocast():
            return self.objective.loss(model, batch, attend, groups, scale)

    def _in_lockstep(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield this worker's batches, then batches without targets until every worker is done.

        All workers take part in each forward pass of a sharded model, so they must do the same number.
        """
        iterator = iter(batches)
        filler: Batch | None = None
        while True:
            batch = next(iterator, None)
            if not self.layout.sum(torch.tensor(float(batch is not None), device=self.device)).item():
                return
            if batch is None:
                if filler is None:
                    length = self.config.seq_len or self.layout.tensor
                    nothing = torch.zeros(1, length, dtype=torch.int64)
                    filler = Batch(nothing, nothing, sources=torch.zeros(1, dtype=torch.int64))
                # Nor may it hold pairs.
                starts = None if filler.starts is None else torch.zeros_like(filler.starts)
                nothing = torch.full_like(filler.targets, IGNORE_INDEX)
                batch = replace(filler, targets=nothing, starts=starts)
            else:
                filler = batch
            yield batch

    def _update(self, sums: Tensor, tokens: Tensor) -> StepResult:
        """Clip, apply and clear the gradients; do not apply them if the loss or the gradient is not finite.

        `sums` [1 + sources + measures] are this worker's summed losses of all targets and of those of each source, and
        what the objective measures; `tokens` the numbers of these targets on all workers.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            gradient = parameter.grad
            # The gradient of a replicated norm under tensor parallelism is still one partial sum per worker.
            if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
                parameter.grad = gradient.redistribute(placements=parameter.placements)
        gradients = [p.grad for p in parameters if p.grad is not None]
        grad_norm = whole_tensor(nn.utils.get_total_norm(gradients, foreach=True)) / self.scaler.scale
        # If one worker skips the step all must, or their weights would differ from then on.
        broken = ~(sums[:1] + grad_norm).isfinite()
        shared = self.layout.sum(torch.cat((sums.double(), broken.double())))
        skipped = shared[-1] > 0
        # Each worker sums the sharded gradients in another order. Clipped by norms that differ in the last bit, the
        # replicas of a weight would drift apart.
        grad_norm = self.layout.max(grad_norm)
        # The fused kernels read these two on the device, as they do for torch.amp.GradScaler: whether to skip the step,
        # and the divisor of the gradients, which saves separate passes for clipping and unscaling.
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.grad_scale = self._divisor(grad_norm)  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.found_inf, self.optimizer.grad_scale  # type: ignore[attr-defined]
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update(~skipped)
        loss = shared[0] / tokens[0].clamp(min=1)
        measures = shared[len(tokens) : -1] / tokens[0].clamp(min=1)
        return StepResult(loss, tokens[0], grad_norm, skipped, shared[1 : len(tokens)] / tokens[1:], measures)

    def _divisor(self, grad_norm: Tensor) -> Tensor | None:
        """Return the divisor of the gradients: the loss scale, times norm / max_grad_norm where that is above 1."""
        limit = self.config.max_grad_norm
        if limit:
            return self.scaler.scale * ((grad_norm + 1e-6) / limit).clamp(min=1.0)
        return self.scaler.scale if self.scaler.enabled else None

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.config.precision])
