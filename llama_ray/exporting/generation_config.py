"""The `generation_config.json` of a model that is written elsewhere: its own, with all tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path

from llama_ray.model.config_files import GENERATION_FILE, to_text
from llama_ray.model.end_of_text import stored_eos_ids
from llama_ray.model.hf_config import EosIds


def eos_ids_of(paths: list[Path], vocab_size: int) -> list[int]:
    """Return the tokens that end a text or an answer according to stored models, those of the first path first."""
    ids = [id for path in paths for id in stored_eos_ids(path, vocab_size)]
    return list(dict.fromkeys(ids))


def as_field(ids: list[int]) -> EosIds:
    """Return ids as `eos_token_id` has them."""
    return ids[0] if len(ids) == 1 else ids or None


def generation_config(paths: list[Path], bos_id: int | None, eos_ids: list[int]) -> str:
    """Return the text of `generation_config.json`: the first of `paths` that has one gives its other settings."""
    files = [file for path in paths if (file := path / GENERATION_FILE).is_file()]
    # Read before, for its tokens that end an answer, and so known to be an object.
    content = json.loads(files[0].read_text(encoding="utf-8")) if files else {"do_sample": True}
    tokens = {"bos_token_id": bos_id, "eos_token_id": as_field(eos_ids)}
    return to_text(content | {name: value for name, value in tokens.items() if value is not None})
