"""Pre-train, register and serve LLaMA models on Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_ray.data.tokenizing.tokenizer import Tokenizer
    from llama_ray.generation.engine import Engine
    from llama_ray.generation.sampling.params import SamplingParams
    from llama_ray.model.config import LlamaConfig
    from llama_ray.model.llama import Llama
    from llama_ray.pretrained import load_pretrained, save_pretrained

__all__ = [
    "Engine",
    "Llama",
    "LlamaConfig",
    "SamplingParams",
    "Tokenizer",
    "load_pretrained",
    "save_pretrained",
]

_HOMES = {
    "Engine": "generation.engine",
    "Llama": "model.llama",
    "LlamaConfig": "model.config",
    "SamplingParams": "generation.sampling.params",
    "Tokenizer": "data.tokenizing.tokenizer",
    "load_pretrained": "pretrained",
    "save_pretrained": "pretrained",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: a job that only prepares data, or a driver, need not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
