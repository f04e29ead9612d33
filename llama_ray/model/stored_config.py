"""Read the shape of a stored model."""

from __future__ import annotations

import json
from pathlib import Path

from llama_ray.model.config import LlamaConfig
from llama_ray.model.gguf.reading import read_gguf_config
from llama_ray.model.hf_config import from_hf, quantization
from llama_ray.model.weight_checks import refuse_quantized
from llama_ray.model.weight_files import CheckpointError

CONFIG_FILE = "config.json"


def load_config(directory: str | Path) -> LlamaConfig:
    """Read `directory/config.json`, or the metadata of a GGUF file. Raises CheckpointError."""
    if Path(directory).is_file():
        return read_gguf_config(Path(directory))
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        cut = any(path.parent.glob(f".{CONFIG_FILE}.*"))
        way_out = (
            "its last save was cut short: save it again"
            if cut
            else "give the directory of a saved LLaMA model"
        )
        raise CheckpointError(f"{directory} holds no {CONFIG_FILE}; {way_out}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = from_hf(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if kind := quantization(content):
        refuse_quantized(path.parent, kind)
    return config
