"""One model with random weights in each contestant's format: a Hugging Face directory, CTranslate2, GGUF."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.parameter_names import hf_name
from llama_ray.pretrained import load_pretrained, save_pretrained

# With plain random weights attention scores are near 0: every token gets the same attention, and a peer with mixed-up
# positions or heads would pass the comparison of log-probabilities. Larger queries and keys make attention sharp.
SHARPNESS = 2.0


def random_model(config: LlamaConfig, device: torch.device | str = "cpu") -> Llama:
    """Return a model with random bfloat16 weights, the same for one config, device and version of torch."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = Llama(config, device=device, dtype=torch.bfloat16)
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(SHARPNESS)
    return model


def hf_directory(cache: Path, preset: str) -> Path:
    """Return the Hugging Face directory of `preset`, without a tokenizer: prompts are token ids."""
    path = cache / preset
    if not (path / "config.json").is_file():
        with complete_directory(path) as partial:
            save_pretrained(random_model(LlamaConfig.preset(preset)), None, partial)
    return path


def ct2_directory(cache: Path, preset: str) -> Path:
    """Return the model as CTranslate2 converts it, in float32; int8 is quantised from it at load time."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]
        # Conversion needs only the vocabulary of a tokenizer.
        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return _Words(LlamaConfig.preset(preset).vocab_size)

    path = cache / f"{preset}-ct2"
    if not path.is_dir():
        with complete_directory(path) as partial:
            Converter(str(hf_directory(cache, preset))).convert(
                str(partial), quantization="float32", force=True
            )
    return path


class _Words:
    """A vocabulary of token ids as decimal strings; CTranslate2 takes prompts as such strings."""

    bos_token, eos_token, unk_token = "1", "2", "0"

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self._vocab_size)}


def gguf_file(cache: Path, preset: str, kind: str) -> Path:
    """Return the model as llama.cpp reads it: matrices in `kind` (f32, bf16 or q8_0), norms in f32."""
    path = cache / f"{preset}-{kind}.gguf"
    if not path.is_file():
        model, _ = load_pretrained(hf_directory(cache, preset), dtype=torch.float32)
        partial = path.with_suffix(".partial")
        _write_gguf(model, partial, kind)
        partial.replace(path)
    return path


_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Return the GGUF name of a Hugging Face weight: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def _write_gguf(model: Llama, path: Path, kind: str) -> None:
    import gguf

    config = model.config
    if config.rope_scaling is not None:
        raise ValueError(
            f"rope_scaling is {config.rope_scaling}; it must be None for this writer; take another preset"
        )
    quantization = gguf.GGMLQuantizationType[kind.upper()]
    file_type = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        for suffix, heads in (("q_proj.weight", config.num_heads), ("k_proj.weight", config.num_kv_heads)):
            if name.endswith(suffix):
                array = _interleaved(array, heads)
        target = quantization if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array), target)
        writer.add_tensor(gguf_name(hf_name(name)), data, raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder for llama.cpp, which rotates neighbouring pairs; ours and Hugging Face rotate the halves of a head."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


@contextmanager
def complete_directory(path: Path) -> Iterator[Path]:
    """Yield a directory that is renamed to `path` only when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.replace(path)
