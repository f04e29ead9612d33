"""The JSON files of the Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llama_ray.model.config import LlamaConfig
from llama_ray.model.hf_config import EosIds, to_hf
from llama_ray.model.stored_config import CONFIG_FILE
from llama_ray.storage.atomic import write_text

GENERATION_FILE = "generation_config.json"


def config_files(
    config: LlamaConfig, dtype: torch.dtype, *, bos_id: int | None = None, eos_id: EosIds = None
) -> dict[str, str]:
    """Return the texts of `generation_config.json` and `config.json`, by name, for weights of `dtype`."""
    generation = {"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": True}
    name = str(dtype).removeprefix("torch.")
    return {
        GENERATION_FILE: to_text({k: v for k, v in generation.items() if v is not None}),
        CONFIG_FILE: to_text(to_hf(config, dtype=name, bos_id=bos_id, eos_id=eos_id)),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically: readers see the old file or the new one, also after a crash."""
    write_text(path, to_text(content))


def to_text(content: dict[str, Any]) -> str:
    """Return `content` as the text of a JSON file."""
    return f"{json.dumps(content, indent=2)}\n"
