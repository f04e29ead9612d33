"""One model over several ranks: each holds a share of every layer's heads and columns, and of the vocabulary.

Megatron's split (Shoeybi et al. 2019, arXiv:1909.08053). Queries, keys, values, gate and up are cut by their outputs,
so that heads and columns stay whole; o_proj and down_proj by their inputs, and what the ranks get from those two is
added up, twice a layer. The head is cut by tokens of the vocabulary and gathered on rank 0, for the rows that are
wanted. The embedding is whole on every rank: a lookup then needs nobody else, for at most 2 GiB (Llama 3 70B).

Steps run eagerly: collectives inside CUDA graphs are not attempted.
"""

from __future__ import annotations

import dataclasses

import torch

from llama_ray.model.checkpoint import WeightSlicer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama

_CUT = {
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "gate_proj": 0, "up_proj": 0, "lm_head": 0, "o_proj": 1, "down_proj": 1
}  # fmt: skip
"""The dimension of a weight [outputs, inputs] that is divided; all others are whole on every rank."""


def check_ranks(config: LlamaConfig, ranks: int, device: torch.device) -> None:
    """Raise ValueError where a model cannot be divided between so many ranks, or there are no GPUs for them."""
    if ranks < 1:
        raise ValueError(f"tensor_parallel is {ranks}; it must be at least 1")
    for name in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % ranks:
            raise ValueError(
                f"tensor_parallel is {ranks}, which does not divide the model's {name} of {getattr(config, name)}; "
                f"this model divides by {_divisors(config)}"
            )
    if device.type == "cuda":
        if device.index:
            raise ValueError(
                f"device is {device}, but tensor_parallel takes GPUs 0 to {ranks - 1}; give device cuda and choose "
                "GPUs by CUDA_VISIBLE_DEVICES"
            )
        if ranks > torch.cuda.device_count():
            raise ValueError(
                f"tensor_parallel is {ranks}, and {torch.cuda.device_count()} GPUs are visible; lower it, or make "
                "more of them visible"
            )


def rank_config(config: LlamaConfig, ranks: int) -> LlamaConfig:
    """The shape that a rank's keys and values have."""
    return dataclasses.replace(
        config, num_heads=config.num_heads // ranks, num_kv_heads=config.num_kv_heads // ranks
    )


def rank_device(kind: str, rank: int) -> torch.device:
    """Where a rank computes: each on its own GPU, or all on the CPU."""
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)


def share(rank: int, ranks: int) -> WeightSlicer:
    """What a rank keeps of each weight, for `load_model`."""

    def part(name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        kept = [slice(0, n) for n in shape]
        dim = _CUT.get(name.split(".")[-2])
        if dim is not None:
            n = shape[dim] // ranks
            kept[dim] = slice(rank * n, (rank + 1) * n)
        return tuple(kept)

    return part


def cut_tied_head(model: Llama, rank: int, ranks: int) -> None:
    """Where the head reads the embedding, let it read this rank's rows of it; they take no memory of their own."""
    if model.config.tie_embeddings:
        rows = model.embed_tokens.weight.detach().chunk(ranks)[rank]
        del model.lm_head.weight
        model.lm_head.register_buffer("weight", rows, persistent=False)
        model.lm_head.out_features = len(rows)


def _divisors(config: LlamaConfig) -> str:
    sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size)
    *most, last = [str(n) for n in range(1, config.num_kv_heads + 1) if not any(size % n for size in sizes)]
    return f"{', '.join(most)} and {last}" if most else f"{last} only"
