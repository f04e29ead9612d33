"""Which token ids end a text, as the files of a stored model name them."""

from __future__ import annotations

import json
from collections.abc import Collection
from numbers import Integral
from pathlib import Path
from typing import Any

from llama_ray.storage.gguf import read_gguf

# What ends a text, an answer, and a message that calls a tool, in the words of llama.cpp.
_GGUF_ENDS = ("eos", "eot", "eom")


def stored_eos_ids(directory: Path, vocab_size: int) -> list[int]:
    """Return `eos_token_id` (one or several) of generation_config.json or, if that names none, of config.json.

    A GGUF file names them in its metadata. Raises ValueError for a file that is not a JSON object, and for anything but
    ids below `vocab_size`.
    """
    if directory.is_file():
        metadata = read_gguf(directory).metadata
        keys = [key for end in _GGUF_ENDS if (key := f"tokenizer.ggml.{end}_token_id") in metadata]
        for key in keys:
            check_eos_ids([metadata[key]], vocab_size, f"{directory}: {key}", "convert the model again")
        return [int(str(metadata[key])) for key in keys]
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        stored = _read_object(file).get("eos_token_id")
        ids: list[int] = stored if isinstance(stored, list) else [] if stored is None else [stored]
        if ids:
            check_eos_ids(ids, vocab_size, f"{file}: eos_token_id", "correct the file")
            return ids
    return []


def check_eos_ids(ids: Collection[object], vocab_size: int, name: str, way_out: str) -> None:
    """Raise ValueError unless all `ids` are token ids below `vocab_size`; `name` is what they are in the message."""
    for id in ids:
        # In Python True is an integer, too.
        if isinstance(id, bool) or not isinstance(id, Integral) or not 0 <= int(id) < vocab_size:
            shown = json.dumps(id, default=str)[:80]
            raise ValueError(
                f"{name} is {shown}; it must be a token id of the model, 0 to {vocab_size - 1}, or several; {way_out}"
            )


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; {} if there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except ValueError as error:
        raise ValueError(
            f"{file} is not a JSON object ({error}); save the checkpoint again or remove the file"
        ) from error
    return content
