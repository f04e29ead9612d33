"""One model with random weights in each contestant's format: a Hugging Face directory, CTranslate2, GGUF."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llama_ray.exporting.export import ExportConfig, export
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained

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
        directory = hf_directory(cache, preset)
        export(ExportConfig(ref=str(directory), to=str(path), dtype=kind))  # type: ignore[arg-type]
    return path


@contextmanager
def complete_directory(path: Path) -> Iterator[Path]:
    """Yield a directory that is renamed to `path` only when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.replace(path)
