"""Load a model and its tokenizer from a reference, and save them to a directory."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from pathlib import Path

import torch

from llama_ray.data.tokenizing.files import has_tokenizer, superseded_files
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.adapter_files import base_of, is_adapter, open_adapter, save_adapter
from llama_ray.model.checkpoint import WeightSlicer, read_model
from llama_ray.model.config import LlamaConfig
from llama_ray.model.config_files import GENERATION_FILE
from llama_ray.model.llama import Llama
from llama_ray.model.merging import check_base, merged
from llama_ray.model.saving import save_model
from llama_ray.model.stored_config import CONFIG_FILE
from llama_ray.model.stored_model import StoredModel, open_model
from llama_ray.model.weight_files import CheckpointError
from llama_ray.references import hub, remote
from llama_ray.storage import run_directory
from llama_ray.storage.paths import is_model_ref, is_uri
from llama_ray.utils.errors import printable

# Imported only for a reference to the registry: a directory must load without MLflow, and this module may not depend
# on llama_ray.tracking.
_REGISTRY = "llama_ray.tracking.registry"


def resolve(ref: str | Path, *, weights: bool = True) -> Path:
    """Return the local directory or `.gguf` file of `ref`.

    `ref` is a directory that was saved here, by transformers or by PEFT (an adapter), a checkpoint of a training run, a
    `.gguf` file, one of these in an object store (`s3://BUCKET/DIR`), `hf://ORG/NAME[@REVISION]` on the Hugging Face
    hub, or `models:/name/version` or `models:/name@alias` in the MLflow registry. What is not on this machine is
    fetched once; with `weights` False only what describes the model and its tokenizer, where that can be told apart.
    Raises CheckpointError, or TrackingError for the registry: both are ValueErrors.
    """
    ref = str(ref)
    if is_model_ref(ref):
        return Path(importlib.import_module(_REGISTRY).download(ref))
    if hub.is_hub_ref(ref):
        return hub.fetch(ref, weights=weights)
    if is_uri(ref):
        return remote.fetch(ref, weights=weights)
    return _local(ref, Path(ref).expanduser())


def fixed(ref: str | Path) -> str:
    """Return the reference that always means what `ref` means now.

    An alias becomes a version, a name of the hub a commit, and a relative path an absolute one. Raises as `resolve`.
    """
    ref = str(ref)
    if is_model_ref(ref):
        return str(importlib.import_module(_REGISTRY).resolve_version(ref).uri)
    if hub.is_hub_ref(ref):
        return hub.fixed(ref)
    return ref if is_uri(ref) else str(_local(ref, Path(ref).expanduser()).resolve())


def open_pretrained(ref: str | Path, stack: ExitStack, *, check_weights: bool = True) -> StoredModel:
    """Open the model of `ref` (see `resolve`); `stack` closes its files.

    An adapter opens the model that it was trained on, and is added to the weights as they are read. They must still be
    the same, for which they are all read, unless `check_weights` is False. Raises CheckpointError.
    """
    path = resolve(ref)
    if not is_adapter(path):
        return open_model(path, stack)
    adapter = open_adapter(path, stack)
    base = open_pretrained(adapter.base, stack, check_weights=check_weights)
    if check_weights:
        check_base(base, adapter)
    return merged(base, adapter)


def load_pretrained(
    ref: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    slicer: WeightSlicer | None = None,
) -> tuple[Llama, Tokenizer | None]:
    """Load the model and the tokenizer of `ref` (see `resolve`); the tokenizer is None if there is none.

    `dtype` None keeps the stored dtype; for `slicer` see `load_model`. Raises CheckpointError or TokenizerError, which
    are ValueErrors, with the reason in one line.
    """
    path = resolve(ref)
    with ExitStack() as stack:
        model = read_model(open_pretrained(path, stack), dtype, device, slicer)
    return model, load_tokenizer(path, model.config.vocab_size)


def load_shape(ref: str | Path) -> LlamaConfig:
    """Return the shape of the model of `ref`, whose weights are checked but not read; see `resolve`."""
    with ExitStack() as stack:
        return open_pretrained(ref, stack, check_weights=False).config


def load_tokenizer(ref: str | Path, vocab_size: int | None = None) -> Tokenizer | None:
    """Return the tokenizer of `ref` in whatever form it is there (see `read_tokenizer`); None if there is none.

    That of an adapter without one is its base's. Raises CheckpointError if it needs more than the `vocab_size` of a
    model, and TokenizerError if it cannot be read.
    """
    path = resolve(ref, weights=False)
    if not has_tokenizer(path):
        return load_tokenizer(base_of(path), vocab_size) if is_adapter(path) else None
    tokenizer = Tokenizer.load(path)
    if vocab_size is not None and (needed := tokenizer.needed_vocab_size()) > vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {needed} tokens; it must have at most {vocab_size}, the "
            "model's vocab_size; give the model's own tokenizer"
        )
    return tokenizer


def _local(ref: str, path: Path) -> Path:
    """Return `path`, which `ref` names, if it is a directory or a GGUF file, or the GGUF file in a directory."""
    if path.is_dir():
        if (path / CONFIG_FILE).exists() or is_adapter(path):
            return path
        models = sorted(path.glob("*.gguf"))
        if len(models) == 1:
            return models[0]
        if newest := next(iter(run_directory.list_checkpoints(str(path.resolve()))), None):
            raise CheckpointError(
                f"{printable(ref)} is the directory of a run; give one of its checkpoints, such as {newest}"
            )
        return path
    if path.is_file() and path.suffix == ".gguf":
        return path
    raise CheckpointError(
        f"{printable(ref)} is not a directory or a .gguf file; give one, hf://ORG/NAME, models:/name/version, or "
        "models:/name@alias"
    )


def export_adapter(source: Path, directory: Path) -> None:
    """Write the adapter in `source`, such as a training checkpoint, to `directory` in the layout of PEFT.

    Its tokenizer and `generation_config.json` come with it.
    """
    with ExitStack() as stack:
        adapter = open_adapter(source, stack)
        beside = Tokenizer.load(source).files() if has_tokenizer(source) else {}
        if (generation := source / GENERATION_FILE).is_file():
            beside[GENERATION_FILE] = generation.read_text(encoding="utf-8")
        save_adapter(
            directory,
            adapter.config,
            {name: (a.read(), b.read()) for name, (a, b) in adapter.factors.items()},
            base=adapter.base,
            base_weights=adapter.base_weights,
            beside=beside,
        )


def save_pretrained(model: Llama, tokenizer: Tokenizer | None, directory: str | Path) -> None:
    """Write the Hugging Face LLaMA layout, which transformers and vLLM read as it is.

    A model and a tokenizer that `directory` holds are replaced, once the new ones are complete; see `save_model`.
    """
    bos_id = eos_id = None
    files: dict[str, str] = {}
    if tokenizer is not None:
        files = tokenizer.files()
        # A token that the model lacks is not named, because readers would look for its row.
        if tokenizer.bos_id is not None and tokenizer.bos_id < model.config.vocab_size:
            bos_id = tokenizer.bos_id
        eos_id = tokenizer.all_eos_ids(model.config.vocab_size)
    superseded = dict.fromkeys(superseded_files(Path(directory), files))
    save_model(model, directory, bos_id=bos_id, eos_id=eos_id, beside={**superseded, **files})
