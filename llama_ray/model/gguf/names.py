"""What llama.cpp calls the weights of a LLaMA, and the order in which it has the rows of queries and keys."""

from __future__ import annotations

from torch import Tensor

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which llama.cpp divides rotary frequencies; the format has it beside the weights."""

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Return what GGUF calls a Hugging Face weight: `blk.3.ffn_up.weight` is `model.layers.3.mlp.up_proj.weight`."""
    if name in _NAMES:
        return _NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_IN_LAYER[rest.removesuffix('.weight')]}.weight"


def is_query(name: str) -> bool:
    """Return whether the Hugging Face weight `name` makes queries."""
    return name.endswith("q_proj.weight")


def is_key(name: str) -> bool:
    """Return whether the Hugging Face weight `name` makes keys."""
    return name.endswith("k_proj.weight")


def in_halves(rows: Tensor, heads: int) -> Tensor:
    """Take rows of queries or keys, in the first dimension, from llama.cpp's order to that of Hugging Face.

    llama.cpp rotates neighbouring rows of a head together; we and Hugging Face rotate its first half with its second.
    """
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Undo `in_halves`."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
