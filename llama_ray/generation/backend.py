"""What a device computes with: the kernels and the cache that suit it."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from llama_ray.generation.kv_cache import KVCache, TorchCache
from llama_ray.generation.quantize import Quantization, check_quantization
from llama_ray.generation.runner import Runner
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama

BLOCK_SIZE = 32
"""Tokens in a block of the cache."""


def make_cache(
    config: LlamaConfig,
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch_invariant: bool = False,
) -> KVCache:
    """An empty cache of so many blocks; see `prepare` for batch_invariant."""
    if _has_kernels(device):
        from llama_ray.generation.cuda.cache import PagedCache

        return PagedCache(config, num_blocks, dtype, device, BLOCK_SIZE, batch_invariant=batch_invariant)
    return TorchCache(config, num_blocks, dtype, device, BLOCK_SIZE)


def make_runner(model: Llama, num_blocks: int, max_batch_size: int, max_seq_len: int) -> Runner:
    """A model with an empty cache, for batches of so many sequences of up to `max_seq_len` tokens."""
    weight = model.embed_tokens.weight
    invariant = getattr(model.lm_head, "batch_invariant", False)
    cache = make_cache(model.config, num_blocks, weight.dtype, weight.device, batch_invariant=invariant)
    if _has_kernels(weight.device):
        from llama_ray.generation.cuda.graphs import GraphRunner

        return GraphRunner(model, cache, max_batch_size, max_seq_len)
    return Runner(model, cache)


def prepare(model: Llama, quantization: Quantization | None, *, batch_invariant: bool = False) -> Llama:
    """Give a model that nobody else uses the fastest form it has on its device; its weights are changed in place.

    With `batch_invariant` a token's logits have the same bits whatever else is computed in the step, on CUDA at a
    price: products then go through a kernel of ours in fixed tiles, not through cuBLAS. Raises ValueError for a
    quantization that is unknown, or that the model's shape or its device cannot have.
    """
    config, device = model.config, model.embed_tokens.weight.device
    for inputs in (config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size):
        check_quantization(quantization, inputs)
    if _has_kernels(device):
        from llama_ray.generation.cuda.modules import accelerate

        return accelerate(model, quantization, batch_invariant)
    if device.type == "cuda" and (quantization is not None or batch_invariant):
        wanted = f"quantization {quantization}" if quantization else "batch_invariant"
        raise ValueError(f"{wanted} needs Triton on CUDA, which is not installed; pip install triton")
    if quantization is not None:
        raise ValueError(f"quantization {quantization} is not available on {device.type}; leave it out")
    return model


def _has_kernels(device: torch.device) -> bool:
    """Torch for CUDA brings Triton along, except on Windows."""
    return device.type == "cuda" and find_spec("triton") is not None


def weight_bytes(model: Llama) -> int:
    """What the weights take."""
    return sum(p.nbytes for p in model.parameters())
