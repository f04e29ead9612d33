"""Our training step, and that of the usual loop around transformers' model: same shape, optimizer and precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.config import LlamaConfig
from llama_ray.model.hf_config import to_hf
from llama_ray.model.llama import Llama
from llama_ray.training.config import Precision, TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import SINGLE_WORKER
from llama_ray.training.parallel.parallelize import parallelize
from llama_ray.training.step import Stepper


@dataclass(frozen=True)
class Contestant:
    """A trained model; `step(batch)` takes one optimizer step and returns the loss."""

    step: Callable[[Batch], Tensor]
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def move(self, device: torch.device) -> None:
        """Move weights and optimizer state to `device`."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(device)
        for state in self.optimizer.state.values():
            for key, value in state.items():
                # Step counters (scalars) stay where the fused optimizer keeps them.
                if value.dim():
                    state[key] = value.to(device)


def ours(config: LlamaConfig, precision: Precision, device: torch.device, *, compiled: bool) -> Contestant:
    """Build our model and optimizer; a step is that of the training loop."""
    train = TrainConfig(precision=precision)
    model = parallelize(Llama(config, device="meta"), train, SINGLE_WORKER, device, compile_blocks=compiled)
    optimizer = build_optimizer(model, train)
    stepper = Stepper(model, optimizer, train, device=device)
    return Contestant(lambda batch: stepper.step([batch]).loss, model, optimizer)


def transformers(
    config: LlamaConfig, precision: Precision, device: torch.device, *, compiled: bool
) -> Contestant:
    """Build LlamaForCausalLM; a step is that of the usual loop: its own loss, autocast, clipping, fused AdamW."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    train = TrainConfig(precision=precision)
    described = HFConfig(
        **to_hf(config, dtype="float32", bos_id=None, eos_id=None), attn_implementation="sdpa"
    )
    # Initial weights are drawn on the device, in seconds instead of a minute.
    with device:
        plain = LlamaForCausalLM(described).float()
    plain.config.use_cache = False
    model = torch.compile(plain) if compiled else plain
    optimizer = build_optimizer(plain, train)

    def step(batch: Batch) -> Tensor:
        inputs, targets = batch.inputs, batch.targets
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss: Tensor = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(plain.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Contestant(step, plain, optimizer)
