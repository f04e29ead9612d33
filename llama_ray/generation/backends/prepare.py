"""Choose what a model runs with on its device: CPU kernels, Triton kernels or plain torch."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.cpu import build, ops
from llama_ray.generation.backends.cpu.backend import CpuBackend
from llama_ray.generation.backends.quantize import GROUP_SIZE, Quantization, check_quantization
from llama_ray.generation.sampling.draw import TORCH_OPS, SamplerOps
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_REQUIREMENTS = {"cuda": "Triton; pip install triton", "cpu": "dtype bfloat16 or float32 and a C++ compiler"}


def prepare(
    model: Llama,
    quantization: Quantization | None = None,
    *,
    batch_invariant: bool = False,
    cache_config: LlamaConfig | None = None,
) -> Backend:
    """Convert a model, in place, to the fastest form for its device; the caller must not use `model` afterwards.

    With `batch_invariant` a token's logits have the same bits whatever else is computed in the step. The CPU kernels
    always have this property. On CUDA it is slower: products go through our own kernel in fixed tiles instead of
    cuBLAS. For `cache_config` see `Backend`. Raises ValueError for a quantization that is unknown, or that the model's
    shape or device does not support.
    """
    _check_quantization(model, quantization)
    weight = model.embed_tokens.weight
    if _runs_on_triton(weight.device):
        from llama_ray.generation.backends.cuda.backend import CudaBackend

        return CudaBackend.convert(model, quantization, batch_invariant, cache_config)
    if weight.device.type == "cpu" and weight.dtype in _CPU_DTYPES and build.load() is not None:
        return CpuBackend.convert(model, quantization, cache_config, sampler_ops(weight.device))
    if quantization is not None or batch_invariant:
        wanted = f"quantization {quantization}" if quantization else "batch_invariant"
        required = _REQUIREMENTS.get(weight.device.type, "a CPU or CUDA")
        raise ValueError(f"{wanted} on {weight.device.type} needs {required}")
    return plain_backend(model, cache_config)


def plain_backend(model: Llama, cache_config: LlamaConfig | None = None) -> Backend:
    """Return a backend that leaves the layers of `model` as they are, on the best cache for its device."""
    device = model.embed_tokens.weight.device
    if _runs_on_triton(device):
        from llama_ray.generation.backends.cuda.backend import CudaBackend

        return CudaBackend(model, cache_config)
    return Backend(model, cache_config, sampler_ops=sampler_ops(device))


def as_backend(model: Llama | Backend) -> Backend:
    """Return a backend as it is, and the plain one for a model."""
    return model if isinstance(model, Backend) else plain_backend(model)


def sampler_ops(device: torch.device) -> SamplerOps:
    """Return the fastest sampling operations for logits on `device`."""
    if device.type == "cpu" and build.load() is not None:
        return SamplerOps(ops.top_candidates, ops.draw_filtered, ops.draw_from_all)
    if _runs_on_triton(device):
        from llama_ray.generation.backends.cuda.drawing import TRITON_OPS

        return TRITON_OPS
    return TORCH_OPS


def _check_quantization(model: Llama, quantization: Quantization | None) -> None:
    config = model.config
    sizes = [config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size]
    # The CPU kernels pad the last group, so that any number of inputs will do.
    for size in sizes if model.embed_tokens.weight.is_cuda else [GROUP_SIZE]:
        check_quantization(quantization, size)


def _runs_on_triton(device: torch.device) -> bool:
    # Torch for CUDA installs Triton, except on Windows.
    return device.type == "cuda" and find_spec("triton") is not None
