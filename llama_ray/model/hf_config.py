"""Conversion between `LlamaConfig` and the `config.json` of a Hugging Face LLaMA checkpoint."""

from __future__ import annotations

from typing import Any

from llama_ray.model.config import LlamaConfig, RopeScaling

ARCHITECTURE = "LlamaForCausalLM"


def to_hf(config: LlamaConfig, *, dtype: str, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """Return the content of `config.json`; `dtype` is torch's name without the prefix, such as "bfloat16".

    Rotary settings are written in the older form, `rope_theta` and `rope_scaling` at the top level, which every
    reader knows.
    """
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        s = config.rope_scaling
        scaling = {"rope_type": s.rope_type, "factor": s.factor}
        if s.rope_type == "llama3":
            scaling["low_freq_factor"] = s.low_freq_factor
            scaling["high_freq_factor"] = s.high_freq_factor
            scaling["original_max_position_embeddings"] = s.original_max_seq_len
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_seq_len,
        "mlp_bias": False,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def from_hf(hf: dict[str, Any]) -> LlamaConfig:
    """Return the config that the content of a `config.json` describes, with rotary settings in the old or new form.

    Raises ValueError for another architecture, and for variants of LLaMA that `Llama` does not implement.
    """
    architecture = (hf.get("architectures") or [hf.get("model_type", "nothing")])[0]
    if architecture not in (ARCHITECTURE, "llama"):
        raise ValueError(f"the architecture is {architecture}; it must be {ARCHITECTURE}")
    for switch in ("attention_bias", "mlp_bias"):
        if hf.get(switch):
            raise ValueError(f"{switch} is true; only models without biases can be loaded")
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {hf['hidden_act']!r}; it must be 'silu' (SwiGLU)")
    missing = [k for k in _REQUIRED if k not in hf]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; give the config.json of a LLaMA model")

    # transformers 5 writes both into `rope_parameters`, earlier versions `rope_theta` and `rope_scaling` separately.
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0
    return LlamaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or 0,
        head_dim=hf.get("head_dim") or 0,
        intermediate_size=hf["intermediate_size"],
        max_seq_len=hf.get("max_position_embeddings", 2048),
        rope_theta=float(theta),
        rope_scaling=_scaling(rope),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(rope_type="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            rope_type="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_seq_len=int(rope["original_max_position_embeddings"]),
        )
    raise ValueError(f"the rope scaling is {kind!r}; it must be 'linear' or 'llama3'")
