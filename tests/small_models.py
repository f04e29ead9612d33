"""A small tokenizer and small models with random weights, in memory or saved in a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained

FOX = "The quick brown fox. 漢字 🙂"


def small_tokenizer(texts: Sequence[str] = (FOX,), vocab_size: int = 300) -> Tokenizer:
    """Return a tokenizer trained on `texts`, of at most `vocab_size` entries."""
    # Pairs that occur only once are not merged.
    return Tokenizer.train(iter([*texts] * 5), vocab_size)


def small_config(vocab_size: int, **fields: Any) -> LlamaConfig:
    """Return a shape with grouped-query attention; `fields` replace the defaults."""
    shape = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "max_seq_len": 256,
    }
    return LlamaConfig(vocab_size=vocab_size, **{**shape, **fields})


def random_model(config: LlamaConfig, seed: int = 1) -> Llama:
    """Return a model with larger weights than initial ones, so that attention matters and logits differ."""
    model = Llama(config, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
            else:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return model


def save_small_model(directory: Path, **fields: Any) -> Path:
    """Save a model with initial weights, whose next token is almost uniform, and its tokenizer; return `directory`."""
    tokenizer = small_tokenizer()
    config = small_config(tokenizer.vocab_size, **fields)
    save_pretrained(Llama(config, dtype=torch.float32), tokenizer, directory)
    return directory
