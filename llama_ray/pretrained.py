"""A reference -> a model and its tokenizer, and back."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.model.checkpoint import CheckpointError, WeightSlicer, load_model, save_model
from llama_ray.model.llama import Llama
from llama_ray.storage.paths import MODEL_SCHEME

# Resolvers are named, not imported: a plain directory must load where no MLflow is installed, and this floor
# lies below the registry's.
_RESOLVERS = {MODEL_SCHEME: "llama_ray.tracking.registry:download"}


def resolve(ref: str | Path) -> Path:
    """The local directory that `ref` stands for.

    `ref` is a directory (saved here or by transformers), or `models:/name/version` or `models:/name@alias` in
    the MLflow registry, which is fetched once and kept. Raises CheckpointError where there is no such directory.
    """
    for scheme, target in _RESOLVERS.items():
        if str(ref).startswith(scheme):
            module, function = target.split(":")
            return Path(getattr(importlib.import_module(module), function)(str(ref)))
    path = Path(ref).expanduser()
    if not path.is_dir():
        raise CheckpointError(
            f"{ref} is no directory; give one, or models:/name/version, or models:/name@alias"
        )
    return path


def load_pretrained(
    ref: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    slicer: WeightSlicer | None = None,
) -> tuple[Llama, Tokenizer | None]:
    """The model and tokenizer that `ref` stands for (see `resolve`); None where it holds no tokenizer.

    `dtype` None keeps the stored one; `part` is that of `load_model`. Raises CheckpointError, a ValueError
    that says what is wrong.
    """
    directory = resolve(ref)
    model = load_model(directory, dtype=dtype, device=device, slicer=slicer)
    if not (directory / "tokenizer.json").is_file():
        return model, None
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is "
            f"{model.config.vocab_size}; they do not belong together"
        )
    return model, tokenizer


def save_pretrained(model: Llama, tokenizer: Tokenizer | None, directory: str | Path) -> None:
    """Write the Hugging Face LLaMA layout, which transformers, vLLM and llama.cpp's converter read as it is."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    bos_id = eos_id = None
    if tokenizer is not None:
        tokenizer.save(directory)
        bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
    save_model(model, directory, bos_id=bos_id, eos_id=eos_id)
