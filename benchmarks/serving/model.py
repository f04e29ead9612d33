"""The model that is served: random weights, and a tokenizer of the same vocabulary."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.weights import complete_directory, random_model
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.pretrained import save_pretrained

_CHARACTERS = 250
"""Text that has an entry of a vocabulary to learn."""


def model_directory(cache: Path, preset: str) -> Path:
    """Return the directory of `preset` with random weights in bf16, which the first call writes."""
    path = cache / f"{preset}-served"
    if not path.is_dir():
        config = LlamaConfig.preset(preset)
        with complete_directory(path) as partial:
            save_pretrained(random_model(config), tokenizer(config.vocab_size), partial)
    return path


def tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer that was trained on modules of the standard library."""
    return Tokenizer.train(_texts(vocab_size * _CHARACTERS), vocab_size)


def _texts(characters: int) -> Iterator[str]:
    read = 0
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        if "site-packages" not in path.parts and read < characters:
            text = path.read_text(encoding="utf-8", errors="replace")
            yield text
            read += len(text)
