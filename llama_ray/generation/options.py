"""The options of an engine, declared once for Python, jobs and serving."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llama_ray.generation.backends.quantize import Quantization
from llama_ray.utils.fields import check_fields, limits

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 256, 2048
"""Default `max_num_batched_tokens`: enough for efficient matrix products."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How much an engine runs at once.

    A value out of range raises ValueError.

    Args:
        max_num_seqs: Sequences that run at once.
        max_seq_len: Tokens of prompt and output of one sequence; None takes the model's limit.
        max_num_batched_tokens: Tokens that one step computes; None takes 2048 on a GPU and 256 on a CPU.
        kv_cache_memory_bytes: Memory for keys and values, on each rank of a sharded model, which must be free; None
            takes what is free of 90% of a GPU's memory, and on a CPU up to 4 GiB or half of what is free.
        enable_prefix_caching: Reuse the keys and values of prompts that begin with the same tokens.
        num_draft_tokens: Draft tokens of a sequence in one step, if there is a draft model or prompt lookup.
        max_loras: Adapters of the sequences that run at once; requests for further ones wait.
        max_lora_rank: The largest rank of an adapter.
    """

    max_num_seqs: int = field(default=64, metadata=limits(1))
    max_seq_len: int | None = field(default=None, metadata=limits(2))
    max_num_batched_tokens: int | None = field(default=None, metadata=limits(1))
    kv_cache_memory_bytes: int | None = field(default=None, metadata=limits(1, 2**63 - 1))
    enable_prefix_caching: bool = True
    num_draft_tokens: int = field(default=4, metadata=limits(1))
    max_loras: int = field(default=8, metadata=limits(1))
    max_lora_rank: int = field(default=64, metadata=limits(1))

    def __post_init__(self) -> None:
        check_fields(self)

    def batch_tokens(self, device: torch.device) -> int:
        """Return the number of tokens that one step computes on `device`."""
        default = GPU_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS
        return self.max_num_batched_tokens or default


@dataclass(frozen=True, kw_only=True)
class EngineOptions(RunOptions):
    """How an engine loads its model and how much it runs at once.

    Values that are out of range or exclude each other raise ValueError.

    Args:
        quantization: int8 or int4 rounds the weights of matrix products as they are loaded; None keeps them.
        batch_invariant: On CUDA, make tokens independent of the other requests in a batch, at a price in speed; the CPU
            kernels always do.
        draft_model: Draft tokens with this small model of the same tokenizer; the output does not change.
        prompt_lookup: Draft tokens from the text itself; the output does not change.
        tensor_parallel: GPUs of one machine that share the model; on a CPU, processes.
    """

    quantization: Quantization | None = None
    batch_invariant: bool = False
    draft_model: str | None = None
    prompt_lookup: bool = False
    tensor_parallel: int = field(default=1, metadata=limits(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_lookup and self.draft_model is not None:
            raise ValueError(
                f"draft_model is {self.draft_model} and prompt_lookup is on; choose one of them to draft tokens"
            )
