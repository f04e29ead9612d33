"""GGUF files written by the package `gguf`, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def tensors_of(model: Llama) -> dict[str, np.ndarray]:
    """The weights of `model` by their names in GGUF, with the rows of queries and keys in llama.cpp's order."""
    found = {}
    for name, weight in model.named_parameters():
        parts = name.split(".")
        layer = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        array = weight.detach().float().numpy()
        heads = {"q_proj": model.config.num_heads, "k_proj": model.config.num_kv_heads}.get(parts[-2])
        if heads is not None:
            halves = array.reshape(heads, 2, len(array) // heads // 2, -1)
            array = halves.swapaxes(1, 2).reshape(array.shape)
        found[f"{layer}{NAMES[parts[-2]]}.weight"] = array
    return found


def metadata_of(config: LlamaConfig) -> dict[str, Any]:
    """The metadata without which llama.cpp loads no model."""
    return {
        "general.architecture": "llama",
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
    }


def write(file: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray], kind: str = "F32") -> Path:
    """Write a file whose matrices are quantized to `kind`; metadata that are None are left out."""
    writer = gguf.GGUFWriter(str(file), metadata["general.architecture"])
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            add[type(value)](key, value)
    for name, array in tensors.items():
        target = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), target), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_model(file: Path, model: Llama, kind: str = "F32", **metadata: Any) -> Path:
    """Write `model`; `metadata` replace those of its shape."""
    return write(file, metadata_of(model.config) | metadata, tensors_of(model), kind)


def llama_3_factors(config: LlamaConfig) -> torch.Tensor:
    """The tensor `rope_freqs.weight` as llama.cpp's converter computes it."""
    scaling = config.rope_scaling
    assert scaling is not None
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    factors = []
    for wavelength in (2 * torch.pi / frequencies).tolist():
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(scaling.factor)
        else:
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return torch.tensor(factors)
