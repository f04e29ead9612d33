"""Conversion between `LlamaConfig` and the `config.json` of a Hugging Face LLaMA checkpoint."""

from __future__ import annotations

from typing import Any

from llama_ray.model.config import LlamaConfig, RopeScaling
from llama_ray.utils.fields import shown

EosIds = int | list[int] | None
"""The token that ends a text, or all that do."""

ARCHITECTURE = "LlamaForCausalLM"
_ARCHITECTURES = (ARCHITECTURE, "LLaMAForCausalLM", "llama")
"""The second is that of the first conversions of LLaMA, the third a model type without an architecture."""


def to_hf(config: LlamaConfig, *, dtype: str, bos_id: int | None, eos_id: EosIds) -> dict[str, Any]:
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
    if not isinstance(hf, dict):
        raise ValueError(f"it holds a {type(hf).__name__}; it must hold a JSON object")
    architecture = _architecture(hf)
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"the architecture is {architecture}; it must be {ARCHITECTURE}")
    for switch in ("attention_bias", "mlp_bias"):
        if _switch(hf, switch):
            raise ValueError(f"{switch} is true; only models without biases can be loaded")
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {hf['hidden_act']!r}; it must be 'silu' (SwiGLU)")
    missing = [k for k in _REQUIRED if k not in hf]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; give the config.json of a LLaMA model")

    rope = _rope(hf)
    return LlamaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or 0,
        head_dim=hf.get("head_dim") or 0,
        intermediate_size=hf["intermediate_size"],
        max_seq_len=hf.get("max_position_embeddings", 2048),
        rope_theta=_number(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0),
        rope_scaling=_scaling(rope),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=_switch(hf, "tie_word_embeddings"),
    )


def quantization(hf: dict[str, Any]) -> str | None:
    """Return the name of the format in which the content of a `config.json` says that weights are quantized."""
    for key in ("quantization_config", "compression_config"):
        entry = hf.get(key)
        if isinstance(entry, dict) and entry:
            named = entry.get("quant_method") or entry.get("quant_algo") or entry.get("format")
            bits = any(entry.get(switch) for switch in ("load_in_4bit", "load_in_8bit"))
            return str(named)[:40] if named else "bitsandbytes" if bits else "a format without a name"
    return None


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


def _architecture(hf: dict[str, Any]) -> object:
    """Return the model type of another family, else the architecture, else the model type."""
    kind, named = hf.get("model_type"), hf.get("architectures")
    if kind not in (None, "llama"):
        return kind
    if isinstance(named, list) and named:
        return named[0]
    return named or kind or "nothing"


def _switch(hf: dict[str, Any], name: str) -> bool:
    value = hf.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; it must be true or false")
    return bool(value)


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings: `rope_parameters`, as transformers 5 writes them, or the earlier `rope_scaling`."""
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{name} is {shown(rope)}; it must be an object or null")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{name} differs between layers; it must be the same for all of them")
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {shown(partial)}; it must be 1, or be left out")
    return rope


# The settings that each kind of scaling needs, under our names.
_SCALING_FIELDS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_seq_len": "original_max_position_embeddings",
    },
}


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _SCALING_FIELDS:
        raise ValueError(f"the rope scaling is {shown(kind)}; it must be 'linear' or 'llama3'")
    names = _SCALING_FIELDS[kind]
    missing = [name for name in names.values() if rope.get(name) is None]
    if missing:
        raise ValueError(
            f"the rope scaling {kind!r} lacks {', '.join(missing)}; complete it as in the model's own config.json"
        )
    fields = {field: rope[name] for field, name in names.items()}
    original = {"original_max_seq_len": fields.pop("original_max_seq_len")} if kind == "llama3" else {}
    factors = {field: _number(value) for field, value in fields.items()}
    return RopeScaling(rope_type=kind, **factors, **original)  # type: ignore[arg-type]


def _number(value: Any) -> Any:
    """Return a whole number as the float that it stands for where a float is meant; the config checks the rest."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
