"""Random adapters in PEFT's layout, and models into which they are merged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from llama_ray.generation.adapters.weights import AdapterWeights
from llama_ray.model.adapter_files import ADAPTER_BASE, save_adapter
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.lora import merge
from llama_ray.model.lora_config import TARGETS, LoraConfig, linear_sizes


def save_random_adapter(
    directory: Path,
    config: LlamaConfig,
    seed: int,
    *,
    rank: int = 4,
    targets: Sequence[str] = TARGETS,
    base: str = "base",
    base_weights: str | None = None,
    layers: Sequence[int] | None = None,
) -> Path:
    """Save an adapter that changes what the model says; return `directory`."""
    generator = torch.Generator().manual_seed(seed)
    lora = LoraConfig(rank=rank, alpha=2 * rank, targets=tuple(targets))
    factors = {}
    for layer in range(config.num_layers) if layers is None else layers:
        for target in targets:
            inputs, outputs = linear_sizes(config)[target]
            room = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            factors[f"model.layers.{layer}.{room}.{target}.weight"] = (
                torch.randn(rank, inputs, generator=generator) * inputs**-0.5,
                torch.randn(outputs, rank, generator=generator) * 0.1,
            )
    save_adapter(directory, lora, factors, base=base, base_weights=base_weights or "")
    if base_weights is None:
        # As peft leaves it.
        (directory / ADAPTER_BASE).unlink()
    return directory


def merged(model: Llama, directory: Path) -> Llama:
    """Return a copy of a plain model with the adapter in its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for (layer, target), factor in AdapterWeights.read(directory).factors.items():
            block = model.layers[layer]
            room = block.self_attn if hasattr(block.self_attn, target) else block.mlp
            weight = getattr(room, target).weight
            weight.copy_(merge(weight, factor.a, factor.b, factor.scale))
    return model
