"""The options of an engine that jobs and serving hand on as they are."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ray.generation.quantize import Quantization


@dataclass(frozen=True)
class EngineOptions:
    """Keywords of `Engine.from_pretrained`, which says what they do. Raises ValueError for those that do not fit."""

    quantization: Quantization | None = None
    kv_cache_memory_bytes: int | None = None
    prompt_lookup: bool = False
    draft_model: str | None = None
    tensor_parallel: int = 1
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel is {self.tensor_parallel}; it must be at least 1")
        if self.prompt_lookup and self.draft_model is not None:
            raise ValueError(
                f"draft_model is {self.draft_model} and prompt_lookup is on; choose one of them to guess tokens"
            )
