"""Give a model adapters, and merge them into it."""

from __future__ import annotations

import torch
from torch import nn

from llama_ray.model.llama import Llama
from llama_ray.model.lora import FACTOR_A, FACTOR_B, LoraLinear
from llama_ray.model.lora_config import LoraConfig


def add_adapters(model: Llama, config: LoraConfig) -> None:
    """Give the blocks of `model` adapters, in place, and freeze all other weights.

    The factors are fp32, whatever the dtype of `model`; A gets random values and B zeros (see
    `Llama.init_parameter`, by seed 0), so that the model computes what it did. On the meta device nothing is
    initialised.
    """
    model.requires_grad_(False)
    for block in model.layers:
        for name, module in list(block.named_modules()):
            if name.rpartition(".")[2] in config.targets:
                assert isinstance(module, nn.Linear)
                block.set_submodule(name, LoraLinear(module, config))
    model.lora = config
    if not model.embed_tokens.weight.is_meta:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                model.init_parameter(name, parameter, seed=0)


@torch.no_grad()
def merged_model(model: Llama) -> Llama:
    """Return a model without adapters that computes what `model` does; it shares the weights that have none."""
    plain = Llama(model.config, device="meta")
    weights = {
        name: weight
        for name, weight in model.state_dict().items()
        if f".{FACTOR_A}." not in name and f".{FACTOR_B}." not in name
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            weights[f"{name}.weight"] = module.merged_weight()
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.rotary = model.rotary
    return plain.requires_grad_(False)
