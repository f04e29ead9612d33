"""Write a model with its tokenizer as a Hugging Face directory that other programs read as it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from llama_ray.data.tokenizing.files import superseded_files
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.adapter_files import base_of, is_adapter
from llama_ray.model.config_files import GENERATION_FILE, to_text
from llama_ray.model.end_of_text import stored_eos_ids
from llama_ray.model.saving import MAX_SHARD_BYTES, save_stored
from llama_ray.model.stored_model import StoredModel
from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import resolve
from llama_ray.utils.errors import printable


def check_apart(to: Path, sources: Iterable[Path]) -> None:
    """Raise CheckpointError if `to` is one of the models that are read: it would be lost."""
    read = {place.resolve() for source in sources for place in described_in(source)}
    if to.resolve() in read:
        raise CheckpointError(
            f"to is {printable(str(to))}, a model that the new one is made of; give another place"
        )


def write_directory(
    model: StoredModel,
    tokenizer: Tokenizer | None,
    source: Path,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` in `dtype` or as it is, a part of a tensor at a time; see `save_stored`.

    The generation config is that of `source`, from which the model is, with all tokens that end an answer: other
    servers know them only from there.
    """
    rows = model.config.vocab_size
    eos_ids = eos_ids_of(source, tokenizer, rows)
    bos = None if tokenizer is None else tokenizer.bos_id
    # A token that the model lacks is not named, because readers would look for its row.
    bos = bos if bos is not None and bos < rows else None
    files = {} if tokenizer is None else tokenizer.files()
    save_stored(
        model,
        directory,
        dtype=dtype,
        bos_id=bos,
        eos_id=_field(eos_ids),
        max_shard_bytes=max_shard_bytes,
        beside={
            **dict.fromkeys(superseded_files(Path(directory), files)),
            **files,
            GENERATION_FILE: generation_text(source, bos, eos_ids),
        },
    )


def eos_ids_of(source: Path, tokenizer: Tokenizer | None, rows: int) -> list[int]:
    """Return all tokens below `rows` that end a text or an answer: those that `source` names, then its tokenizer's."""
    ids = [id for path in described_in(source) for id in stored_eos_ids(path, rows)]
    if tokenizer is not None:
        own = (tokenizer.eos_id, *sorted(tokenizer.end_of_turn_ids()))
        ids += [id for id in own if id is not None and id < rows]
    return list(dict.fromkeys(ids))


def generation_text(source: Path, bos: int | None, eos_ids: Sequence[int]) -> str:
    """Return the text of `generation_config.json`, with what `source` has of other settings."""
    files = [file for path in described_in(source) if (file := path / GENERATION_FILE).is_file()]
    # Read before, for its tokens that end an answer, and so known to be an object.
    content = {"do_sample": True} | (json.loads(files[0].read_text(encoding="utf-8")) if files else {})
    tokens = {"bos_token_id": bos, "eos_token_id": _field(eos_ids)}
    return to_text(content | {name: value for name, value in tokens.items() if value is not None})


def described_in(path: Path) -> list[Path]:
    """Return where the model at `path` is described: for an adapter, also its base."""
    return [path, *described_in(resolve(base_of(path), weights=False))] if is_adapter(path) else [path]


def _field(ids: Sequence[int]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else list(ids) or None
