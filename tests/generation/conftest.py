"""A tokenizer trained on a few texts, and a small random model with an engine."""

from __future__ import annotations

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.model.llama import Llama
from tests.small_models import random_model, small_config, small_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "漢字とかな 🙂🙃 and emoji 👩‍👩‍👧",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return small_tokenizer(TEXTS, 320)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Llama:
    config = small_config(tokenizer.vocab_size, hidden_size=48, intermediate_size=96, max_seq_len=160)
    return random_model(config)


@pytest.fixture
def engine(model: Llama, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, max_num_seqs=4)
