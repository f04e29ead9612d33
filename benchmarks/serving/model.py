"""The model that is served: random weights, and a tokenizer of the same vocabulary."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.weights import complete_directory, random_model
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.pretrained import save_pretrained

_CHARACTERS = 8_000_000
"""Text that has 32,000 entries to learn."""


def model_directory(cache: Path, preset: str) -> Path:
    """Return the directory of `preset` with random weights in bf16, which the first call writes."""
    path = cache / f"{preset}-served"
    if not path.is_dir():
        config = LlamaConfig.preset(preset)
        with complete_directory(path) as partial:
            save_pretrained(random_model(config), Tokenizer.train(texts(), config.vocab_size), partial)
    return path


def texts() -> Iterator[str]:
    """Yield modules of the standard library."""
    read = 0
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        yield text
        read += len(text)
        if read > _CHARACTERS:
            return
