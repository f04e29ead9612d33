"""Divide a model between ranks: heads, columns and vocabulary.

Megatron's split (Shoeybi et al. 2019, arXiv:1909.08053). The weights of queries, keys, values, gate and up are divided
by outputs, so that heads and columns stay whole; o_proj and down_proj are divided by inputs, and their results are
summed over the ranks, twice in each layer. The head is divided by the tokens of the vocabulary, and the logits of the
selected rows are gathered on rank 0. Every rank holds the whole embedding (at most 2 GiB, for Llama 3 70B), so that a
lookup needs no communication.

Steps run eagerly: CUDA graphs with collectives are not supported.
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
"""The dimension of a weight [outputs, inputs] that is divided; all other weights are whole on every rank."""


def check_ranks(config: LlamaConfig, ranks: int, device: torch.device) -> None:
    """Raise ValueError if the model does not divide between `ranks` ranks, or there are too few GPUs."""
    if ranks < 1:
        raise ValueError(f"tensor_parallel is {ranks}; it must be at least 1")
    for name in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % ranks:
            raise ValueError(
                f"tensor_parallel is {ranks}; it must divide the model's {name} of {getattr(config, name)}; "
                f"this model divides by {_divisors(config)}"
            )
    if device.type == "cuda":
        if device.index:
            raise ValueError(
                f"device is {device}; tensor_parallel {ranks} takes GPUs 0 to {ranks - 1}; give device cuda and "
                "choose the GPUs with CUDA_VISIBLE_DEVICES"
            )
        if ranks > torch.cuda.device_count():
            raise ValueError(
                f"tensor_parallel is {ranks}; {torch.cuda.device_count()} GPUs are visible; lower it, or make more "
                "GPUs visible"
            )


def rank_config(config: LlamaConfig, ranks: int) -> LlamaConfig:
    """Return the shape of a rank's keys and values."""
    return dataclasses.replace(
        config, num_heads=config.num_heads // ranks, num_kv_heads=config.num_kv_heads // ranks
    )


def rank_device(kind: str, rank: int) -> torch.device:
    """Return the device of a rank: its own GPU, or the CPU for all ranks."""
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)


def rank_slicer(rank: int, ranks: int) -> WeightSlicer:
    """Return what a rank keeps of each weight, for `load_model`."""

    def slices(name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        kept = [slice(0, n) for n in shape]
        dim = _CUT.get(name.split(".")[-2])
        if dim is not None:
            n = shape[dim] // ranks
            kept[dim] = slice(rank * n, (rank + 1) * n)
        return tuple(kept)

    return slices


def cut_tied_head(model: Llama, rank: int, ranks: int) -> None:
    """Let a head that is tied to the embedding read this rank's rows of it; they take no memory of their own."""
    if model.config.tie_embeddings:
        rows = model.embed_tokens.weight.detach().chunk(ranks)[rank]
        del model.lm_head.weight
        model.lm_head.register_buffer("weight", rows, persistent=False)
        model.lm_head.out_features = len(rows)


def _divisors(config: LlamaConfig) -> str:
    sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size)
    *most, last = [str(n) for n in range(1, config.num_kv_heads + 1) if not any(size % n for size in sizes)]
    return f"{', '.join(most)} and {last}" if most else f"{last} only"
