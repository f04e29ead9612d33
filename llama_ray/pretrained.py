"""Load a model and its tokenizer from a reference, and save them to a directory."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from llama_ray.data.tokenizing.files import superseded_files
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.checkpoint import WeightSlicer, load_model, save_model
from llama_ray.model.llama import Llama
from llama_ray.model.weight_files import CheckpointError
from llama_ray.storage.paths import is_model_ref

# Imported only for a reference to the registry: a directory must load without MLflow, and this module may not depend
# on llama_ray.tracking.
_REGISTRY = "llama_ray.tracking.registry"


def resolve(ref: str | Path) -> Path:
    """Return the local directory of `ref`.

    `ref` is a directory that was saved here or by transformers, or `models:/name/version` or `models:/name@alias` in
    the MLflow registry, which is downloaded once. Raises CheckpointError for a directory that does not exist.
    """
    if is_model_ref(str(ref)):
        return Path(importlib.import_module(_REGISTRY).download(str(ref)))
    path = Path(ref).expanduser()
    if not path.is_dir():
        raise CheckpointError(
            f"{ref} is not a directory; give one, or models:/name/version, or models:/name@alias"
        )
    return path


def load_pretrained(
    ref: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    slicer: WeightSlicer | None = None,
) -> tuple[Llama, Tokenizer | None]:
    """Load the model and the tokenizer of `ref` (see `resolve`); the tokenizer is None if the directory has none.

    `dtype` None keeps the stored dtype; for `slicer` see `load_model`. Raises CheckpointError or TokenizerError, which
    are ValueErrors, with the reason in one line.
    """
    directory = resolve(ref)
    model = load_model(directory, dtype=dtype, device=device, slicer=slicer)
    if not (directory / "tokenizer.json").is_file():
        return model, None
    tokenizer = Tokenizer.load(directory)
    needed = tokenizer.needed_vocab_size()
    if needed > model.config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {needed} tokens; it must have at most {model.config.vocab_size}, the "
            "model's vocab_size; give the model's own tokenizer"
        )
    return model, tokenizer


def save_pretrained(model: Llama, tokenizer: Tokenizer | None, directory: str | Path) -> None:
    """Write the Hugging Face LLaMA layout, which transformers and vLLM read as it is.

    A model and a tokenizer that `directory` holds are replaced, once the new ones are complete; see `save_model`.
    """
    bos_id = eos_id = None
    files: dict[str, str] = {}
    if tokenizer is not None:
        files = tokenizer.files()
        # A token that the model lacks is not named, because readers would look for its row.
        bos_id, eos_id = (
            id if id is not None and id < model.config.vocab_size else None
            for id in (tokenizer.bos_id, tokenizer.eos_id)
        )
    superseded = dict.fromkeys(superseded_files(Path(directory), files))
    save_model(model, directory, bos_id=bos_id, eos_id=eos_id, beside={**superseded, **files})
