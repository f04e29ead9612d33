from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.generation.engine import Engine
from llama_ray.pretrained import save_pretrained
from tests.small_models import random_model, small_config, small_tokenizer

WORDS = (
    "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:",
    "def f(self): return None",
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose limit is shorter than many texts, and whose tokenizer adds bos as Llama's does."""
    tokenizer = small_tokenizer(WORDS, 320).for_documents()
    directory = tmp_path_factory.mktemp("evaluated") / "checkpoint"
    save_pretrained(random_model(small_config(tokenizer.vocab_size, max_seq_len=128)), tokenizer, directory)
    return directory


@pytest.fixture
def scorer(checkpoint: Path) -> Iterator[EngineScorer]:
    with Engine.from_pretrained(checkpoint, device="cpu", kv_cache_memory_bytes=2**24) as engine:
        yield EngineScorer(str(checkpoint), engine)
