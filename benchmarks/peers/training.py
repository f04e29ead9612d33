"""Our training step, and that of the usual loop around transformers' model: same shape, optimizer and precision.

With `lora_rank` adapters are trained beside frozen weights, those of transformers by peft.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.config import LlamaConfig
from llama_ray.model.hf_config import to_hf
from llama_ray.model.lora_config import LoraConfig
from llama_ray.training.config import Precision, TrainConfig
from llama_ray.training.optimizers.build import build_optimizer
from llama_ray.training.parallel.layout import SINGLE_WORKER
from llama_ray.training.parallel.parallelize import parallelize, unallocated_model
from llama_ray.training.precision import DTYPES
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


def ours(
    config: LlamaConfig, precision: Precision, device: torch.device, *, compiled: bool, lora_rank: int = 0
) -> Contestant:
    """Build our model and optimizer; a step is that of the training loop."""
    train = _train_config(precision, lora_rank)
    llama = unallocated_model(config, train)
    model = parallelize(llama, train, SINGLE_WORKER, device, compile_blocks=compiled)
    if lora_rank:
        # Frozen weights are not given initial values.
        llama.init_weights(seed=0)
    optimizer = build_optimizer(model, train)
    stepper = Stepper(model, optimizer, train, device=device)
    return Contestant(lambda batch: stepper.step([batch]).loss, model, optimizer)


def transformers(
    config: LlamaConfig, precision: Precision, device: torch.device, *, compiled: bool, lora_rank: int = 0
) -> Contestant:
    """Build LlamaForCausalLM; a step is that of the usual loop: its own loss, autocast, clipping, fused AdamW."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    train = _train_config(precision, lora_rank)
    described = HFConfig(
        **to_hf(config, dtype="float32", bos_id=None, eos_id=None), attn_implementation="sdpa"
    )
    # Initial weights are drawn on the device, in seconds instead of a minute.
    with device:
        plain = LlamaForCausalLM(described).float()
    plain.config.use_cache = False
    if train.lora is not None:
        plain = _with_peft(plain.to(DTYPES[precision]), train.lora)
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


def _train_config(precision: Precision, lora_rank: int) -> TrainConfig:
    if not lora_rank:
        return TrainConfig(precision=precision)
    return TrainConfig(precision=precision, lora_rank=lora_rank, init_from="random weights")


def _with_peft(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """Give `model` adapters of peft, which are fp32 as ours."""
    import peft

    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, settings)
