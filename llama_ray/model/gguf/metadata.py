"""The shape of a model in the metadata of a GGUF file."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from llama_ray.model.config import LlamaConfig, RopeScaling
from llama_ray.model.gguf.names import ROPE_FACTORS
from llama_ray.model.gguf.rope import scaling_of
from llama_ray.storage.gguf import Gguf, Value

ARCHITECTURE = "llama"
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def read_config(gguf: Gguf, rope: Tensor | None) -> LlamaConfig:
    """Return the shape of the model in `gguf`, whose tensor ROPE_FACTORS is `rope`.

    Raises ValueError for a model that `Llama` does not implement, and GgufError for missing metadata.
    """
    architecture = gguf.get("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"the architecture is {architecture!r:.40}; it must be {ARCHITECTURE!r}; give a LLaMA"
        )
    if gguf.get("split.count", int, 1) > 1:
        raise ValueError("it is one of several files; join them with: llama-gguf-split --merge FIRST ALL")
    if experts := gguf.get("llama.expert_count", int, 0):
        raise ValueError(f"it has {experts} experts; it must have none; give a LLaMA without experts")
    if _EMBEDDING not in gguf.tensors:
        raise ValueError(f"it has no {_EMBEDDING}; give the file of a whole model")
    hidden_size, num_heads = (
        gguf.get(f"llama.{name}", int) for name in ("embedding_length", "attention.head_count")
    )
    head_dim = _head_dim(gguf, hidden_size // max(num_heads, 1))
    theta = _float(gguf, "llama.rope.freq_base", 10_000.0)
    return LlamaConfig(
        # Some files name more tokens than the embedding has rows for.
        vocab_size=gguf.tensors[_EMBEDDING].shape[0],
        hidden_size=hidden_size,
        num_layers=gguf.get("llama.block_count", int),
        num_heads=num_heads,
        num_kv_heads=gguf.get("llama.attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        intermediate_size=gguf.get("llama.feed_forward_length", int),
        max_seq_len=gguf.get("llama.context_length", int),
        rope_theta=theta,
        rope_scaling=_scaling(gguf, rope, head_dim, theta),
        norm_eps=_float(gguf, "llama.attention.layer_norm_rms_epsilon", None),
        tie_embeddings=_HEAD not in gguf.tensors,
    )


def to_metadata(config: LlamaConfig) -> dict[str, Value]:
    """Return the metadata from which `read_config` makes `config`, with the tensor of `rope_factors`."""
    metadata: dict[str, Value] = {
        "general.architecture": ARCHITECTURE,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "linear":
        metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(scaling.factor)}
    elif scaling is not None:
        # llama.cpp takes the factors of the tensor; this tells for which length they are.
        metadata["llama.rope.scaling.original_context_length"] = scaling.original_max_seq_len
    return metadata


def _head_dim(gguf: Gguf, default: int) -> int:
    head_dim = gguf.get("llama.attention.key_length", int, default)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (other := gguf.get(f"llama.{name}", int, head_dim)) != head_dim:
            raise ValueError(
                f"llama.{name} is {other}; it must be {head_dim}, the width of a head of the keys"
            )
    return head_dim


def _scaling(gguf: Gguf, rope: Tensor | None, head_dim: int, theta: float) -> RopeScaling | None:
    # As in llama.cpp, a factor without a type is that of linear scaling, and 0 is none.
    kind = gguf.get("llama.rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"the rope scaling is {kind!r:.40}; it must be 'none', 'linear' or that of Llama 3.1"
        )
    # Older files have it by another name.
    names = [f"llama.rope.{name}" for name in ("scaling.factor", "scale_linear") if kind == "linear"]
    factor = next((_float(gguf, name, None) for name in names if name in gguf.metadata), 1.0)
    linear = RopeScaling(rope_type="linear", factor=factor) if factor not in (0, 1) else None
    if rope is None:
        return linear
    if rope.shape != (head_dim // 2,):
        raise ValueError(f"{ROPE_FACTORS} is {list(rope.shape)}; it must be [{head_dim // 2}]")
    original = gguf.get("llama.rope.scaling.original_context_length", int, 0) or None
    try:
        scaling = scaling_of(rope.float(), head_dim, theta, original)
    except ValueError as error:
        raise ValueError(f"{ROPE_FACTORS} cannot be expressed as a rope_scaling: {error}") from error
    if scaling is not None and linear is not None:
        raise ValueError(
            f"it has {ROPE_FACTORS} and a linear rope scaling of {factor}; it must have one of them"
        )
    return scaling or linear


def _float(gguf: Gguf, key: str, default: float | None) -> float:
    """Return the number of the fewest digits that is this one in the file's single precision."""
    value = gguf.get(key, float, default)
    return (
        float(np.format_float_positional(np.float32(value), unique=True)) if key in gguf.metadata else value
    )
