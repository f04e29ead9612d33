"""A tokenizer of a few texts, and small random models whose next token is not a foregone conclusion."""

from __future__ import annotations

import pytest
import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "漢字とかな 🙂🙃 and emoji 👩‍👩‍👧",
]


def random_model(config: LlamaConfig, seed: int = 1) -> Llama:
    """Larger weights than training starts from: attention then matters, and logits are far apart."""
    model = Llama(config, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
            else:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(TEXTS * 5), 320)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Llama:
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=96,
        max_seq_len=160,
    )
    return random_model(config)


@pytest.fixture
def engine(model: Llama, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, max_num_seqs=4)
