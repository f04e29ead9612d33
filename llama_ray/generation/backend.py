"""What a device computes with: the kernels, the cache and the weights that suit it."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from llama_ray.generation.cpu import build, ops
from llama_ray.generation.cpu.cache import CpuCache
from llama_ray.generation.cpu.modules import PackedRMSNorm
from llama_ray.generation.cpu.modules import accelerate as accelerate_on_cpu
from llama_ray.generation.kv_cache import KVCache, TorchCache
from llama_ray.generation.quantize import GROUP_SIZE, Quantization, check_quantization
from llama_ray.generation.runner import Runner
from llama_ray.generation.sampling.draw import SamplerOps
from llama_ray.generation.sampling.sampler import Sampler
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama

BLOCK_SIZE = 32
"""Tokens in a block of the cache."""

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def prepare(model: Llama, quantization: Quantization | None, *, batch_invariant: bool = False) -> Llama:
    """Give a model that nobody else uses the fastest form it has on its device; its weights are changed in place.

    With `batch_invariant` a token's logits have the same bits whatever else is computed in the step, on CUDA at a
    price: products then go through a kernel of ours in fixed tiles, not through cuBLAS. The CPU kernels are so
    always. Raises ValueError for a quantization that is unknown, or that the model's shape or its device cannot have.
    """
    config, weight = model.config, model.embed_tokens.weight
    inputs = [config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size]
    for size in (
        inputs if weight.device.type == "cuda" else [GROUP_SIZE]
    ):  # the CPU kernels pad the last group
        check_quantization(quantization, size)
    if weight.device.type == "cuda" and _has_triton():
        from llama_ray.generation.cuda.modules import accelerate

        return accelerate(model, quantization, batch_invariant)
    if weight.device.type == "cpu" and weight.dtype in _CPU_DTYPES and build.load() is not None:
        return accelerate_on_cpu(model, quantization)
    if quantization is not None or batch_invariant:
        wanted = f"quantization {quantization}" if quantization else "batch_invariant"
        needed = {"cuda": "Triton; pip install triton", "cpu": "dtype bfloat16 or float32 and a C++ compiler"}
        raise ValueError(
            f"{wanted} on {weight.device.type} needs {needed.get(weight.device.type, 'a CPU or CUDA')}"
        )
    return model


def make_runner(model: Llama, num_blocks: int, max_num_seqs: int, max_seq_len: int) -> Runner:
    """A model with an empty cache, for batches of so many sequences of up to `max_seq_len` tokens."""
    if model.embed_tokens.weight.device.type == "cuda" and _has_triton():
        from llama_ray.generation.cuda.graphs import GraphRunner

        return GraphRunner(model, make_cache(model, num_blocks), max_num_seqs, max_seq_len)
    return Runner(model, make_cache(model, num_blocks))


def make_cache(model: Llama, num_blocks: int, shape: LlamaConfig | None = None) -> KVCache:
    """An empty cache of so many blocks; `shape` where the model holds only a share of its config's heads."""
    config = shape or model.config
    weight = model.embed_tokens.weight
    if weight.device.type == "cuda" and _has_triton():
        from llama_ray.generation.cuda.cache import PagedCache

        invariant = getattr(model.lm_head, "batch_invariant", False)
        return PagedCache(
            config, num_blocks, weight.dtype, weight.device, BLOCK_SIZE, batch_invariant=invariant
        )
    if _on_cpu_kernels(model):
        return CpuCache(config, num_blocks, weight.dtype)
    return TorchCache(config, num_blocks, weight.dtype, weight.device, BLOCK_SIZE)


def block_bytes(model: Llama, shape: LlamaConfig | None = None) -> int:
    """What a block of such a cache takes."""
    cache = CpuCache if _on_cpu_kernels(model) else TorchCache
    return cache.block_bytes(shape or model.config, BLOCK_SIZE, model.embed_tokens.weight.dtype)


def make_sampler(device: torch.device) -> Sampler:
    """A sampler for logits on `device`."""
    if device.type == "cpu" and build.load() is not None:
        return Sampler(SamplerOps(ops.top_candidates, ops.draw_filtered, ops.draw_from_all))
    return Sampler()


def weight_bytes(model: Llama) -> int:
    """What the weights take, in whatever form."""
    packed = sum(int(getattr(module, "nbytes", 0)) for module in model.modules())
    return packed + sum(p.nbytes for p in model.parameters())


def _on_cpu_kernels(model: Llama) -> bool:
    return isinstance(model.norm, PackedRMSNorm)


def _has_triton() -> bool:
    """Torch for CUDA brings Triton along, except on Windows."""
    return find_spec("triton") is not None
