"""What a device computes with: the kernels and the cache that suit it."""

from __future__ import annotations

import torch

from llama_ray.generation.kv_cache import KVCache, TorchCache
from llama_ray.generation.sampler import Sampler
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama

BLOCK_SIZE = 32
"""Tokens in a block of the cache."""


def make_cache(config: LlamaConfig, num_blocks: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """An empty cache of so many blocks."""
    return TorchCache(config, num_blocks, dtype, device, BLOCK_SIZE)


def make_sampler(device: torch.device) -> Sampler:
    """A sampler for logits on `device`."""
    return Sampler()


def prepare(model: Llama, quantization: str | None) -> Llama:
    """Give a model that nobody else uses the fastest form it has on its device; its weights are changed in place."""
    return model


def weight_bytes(model: Llama) -> int:
    """What the weights take."""
    return sum(p.nbytes for p in model.parameters())
